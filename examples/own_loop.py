"""Prune inside a training loop of one's own: the stations of `psenet.prune`, one by one.

    python examples/own_loop.py
    python examples/own_loop.py --tiny

For those whose training is their own: another optimizer, several losses, data that is no DataLoader. Here a net takes
noise off handwritten digits, which come with scikit-learn; it is judged by PSNR, in dB. What psenet asks of such a loop
is three things: subnets from a strategy for every step, `supernet(x, widths)` in place of `model(x)`, and the loss of
every subnet for the history.

Legend: B images of a batch, n subnets.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import psenet
import shown
from psenet.budget import uniform_widths
from psenet.evaluate import recalibrate

NOISE, BATCH, NUM_SUBNETS = 0.4, 64, 4
Batch = tuple[torch.Tensor, torch.Tensor]


# The user's own -------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Tells the noise that is in an image, and takes it off (Zhang et al. 2017)."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the image without noise, shaped as it came."""
        return x - self.body(x)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images of shape (N, 1, 8, 8), 0 to 1: to train on, to choose by, and to test on once."""

    train: torch.Tensor
    validation: list[Batch]
    test: list[Batch]


def read_data(*, num_train: int, seed: int) -> Data:
    """Return the digits; those to validate and test on have the same noise every time."""
    digits: Any = load_digits()
    torch.manual_seed(seed)
    images = torch.from_numpy(digits.images).float().unsqueeze(1)[torch.randperm(len(digits.images))] / 16
    test, validation, train = images.split([400, 250, len(images) - 650])
    fixed = [[(noisy(part), part) for part in each.split(BATCH)] for each in (validation, test)]
    return Data(train=train[:num_train], validation=fixed[0], test=fixed[1])


def noisy(images: torch.Tensor) -> torch.Tensor:
    """Return images with new noise."""
    return images + NOISE * torch.randn_like(images)


def batches_of(images: torch.Tensor) -> Iterator[Batch]:
    """Give the images in random order, with new noise."""
    for clean in images[torch.randperm(len(images))].split(BATCH):
        yield noisy(clean), clean


def squared_error(outputs: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Return one loss for each image, shape (B,)."""
    return (outputs - clean).square().flatten(1).mean(1)


def psnr(module: nn.Module, batches: Any) -> float:
    """Return the ratio of peak signal to noise, in dB: higher is better."""
    errors = torch.cat([squared_error(module(x), clean) for x, clean in batches])
    return -10 * float(errors.mean().log10())


def train_alone(module: nn.Module, images: torch.Tensor, *, epochs: int, learning_rate: float) -> None:
    """Train one net: the loop that was there before psenet."""
    optimizer, schedule = _optimizer(module, epochs=epochs, learning_rate=learning_rate)
    module.train()
    for _ in range(epochs):
        for x, clean in batches_of(images):
            optimizer.zero_grad()
            squared_error(module(x), clean).mean().backward()
            optimizer.step()
        schedule.step()


def _optimizer(module: nn.Module, *, epochs: int, learning_rate: float) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))


# What psenet needs of it ----------------------------------------------------------------------------------------------


def train_together(
    supernet: psenet.Supernet, images: torch.Tensor, *, epochs: int, learning_rate: float, seed: int
) -> psenet.History:
    """Train all subnets at once: the same loop, with three lines for psenet."""
    optimizer, schedule = _optimizer(supernet, epochs=epochs, learning_rate=learning_rate)
    strategy = psenet.make_strategy("parallel", supernet.space, num_subnets=NUM_SUBNETS, seed=seed)
    history, step = psenet.History(supernet.space), 0
    supernet.train()
    for _ in range(epochs):
        for x, clean in batches_of(images):
            # A short last batch feeds fewer subnets: batch norm wants two images of each.
            widths = strategy.next_widths()[: len(x) // 2]
            optimizer.zero_grad()
            losses_B = squared_error(supernet(x, widths), clean)  # image j goes through subnet j % n
            losses_B.mean().backward()
            optimizer.step()
            losses_n = torch.stack([losses_B[first :: len(widths)].mean() for first in range(len(widths))])
            history.append(step, widths, losses_n.detach())
            step += 1
        schedule.step()
    return history


def search(supernet: psenet.Supernet, history: psenet.History, data: Data, arguments: Any) -> dict[str, psenet.Widths]:
    """Return the best widths of half the MACs, and the plain ones to compare with: every layer by the same factor."""
    space, calibration = supernet.space, calibration_of(data)
    limits = psenet.Budget(macs="50%").resolve(space)
    plain = uniform_widths(space, limits)
    found = psenet.search(
        space,
        limits,
        psenet.SupernetScore(supernet, calibration, data.validation, score_fn=psnr),
        prior=psenet.Prior.fit(history, space),
        predictor=psenet.Predictor.fit(history, space),
        first=[plain],
        num_evaluations=arguments.evaluations,
        seed=arguments.seed,
    )
    return {"pruned": found.best.widths, "uniform": plain}


def finish(supernet: psenet.Supernet, widths: psenet.Widths, data: Data, *, epochs: int) -> tuple[nn.Module, Any]:
    """Return a subnet as a plain module, fine-tuned, and its figures on test data."""
    net = supernet.extract(widths)
    recalibrate(net, calibration_of(data))  # a subnet's statistics are not those of the supernet
    before = score_of(net, data.test)
    train_alone(net, data.train, epochs=epochs, learning_rate=1e-3)
    return net, figures_of(supernet.space, widths, net, data) | {"score_before_finetune": before}


def main(argv: Sequence[str] | None = None) -> shown.Shown:
    """Train, prune, fine-tune and compare."""
    arguments = shown.parse(shown.parser(__doc__, name="own_loop", epochs=30, data=None), argv, tiny_epochs=15)
    start = time.time()
    data = read_data(num_train=256 if arguments.tiny else 2000, seed=arguments.seed)
    model = Denoiser(width=16 if arguments.tiny else 32)
    train_alone(model, data.train, epochs=arguments.epochs, learning_rate=3e-3)
    space = psenet.trace(model, data.train[:1], divisor=4)
    # Subnets keep the first channels of a layer, so the most important ones come first.
    model = psenet.order_channels(model, space)
    supernet = psenet.Supernet(model, space)
    history = train_together(supernet, data.train, epochs=arguments.epochs, learning_rate=3e-3, seed=arguments.seed)
    settings = search(supernet, history, data, arguments)
    nets = {name: finish(supernet, widths, data, epochs=arguments.finetune_epochs) for name, widths in settings.items()}
    noise = score_of(nn.Identity(), data.test)
    record = {
        **{"model": "denoiser", "data": f"digits with noise, {noise:.2f} dB as they come", "noisy_score": noise},
        **{"budget": {"macs": "50%"}, "score_name": "PSNR", "score_unit": "dB"},
        "score_on": f"test data, {sum(len(x) for x, _ in data.test)} samples",
        "baseline": figures_of(space, space.full(), model, data),
        **{name: figures for name, (_, figures) in nets.items()},
        "seconds": {"total": round(time.time() - start, 2)},
    }
    return shown.Shown(model=nets["pruned"][0], record=shown.keep("own_loop", record, arguments, argv))


def calibration_of(data: Data) -> list[Batch]:
    """Return a few training batches: batch norm's statistics of a subnet are made on them."""
    return [(noisy(clean), clean) for clean in data.train[: 4 * BATCH].split(BATCH)]


def score_of(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the score as psenet has it taken: in eval mode, without gradients."""
    module.eval()
    with torch.no_grad():
        return psnr(module, batches)


def figures_of(space: psenet.WidthSpace, widths: psenet.Widths, net: nn.Module, data: Data) -> dict[str, Any]:
    """Return what a net costs and how good it is."""
    return {"macs": space.macs(widths), "params": space.params(widths), "score": score_of(net, data.test)}


if __name__ == "__main__":
    main()
