"""Trainings that tests run in one process and in two: `torchrun ... shared_steps.py FOLDER NAME...`.

Each process leaves what every training gave in FOLDER/NAME.RANK.result.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from toys import NUM_CLASSES, CountingLoss, NoisyImages, copy_of, make_loader, make_net, make_space, raising

import psenet
from psenet import ranks
from psenet.errors import ElsewhereError, InputError
from psenet.training import EpochRecord, TrainConfig, TrainingDivergedError

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "no norm": lambda channels: nn.Identity(),
    "group norm": lambda channels: nn.GroupNorm(4, channels),
    "batch norm": nn.BatchNorm2d,
}
STRATEGIES = ("parallel", "sandwich", "bilateral", "single-path")
ONE_STEP = TrainConfig(epochs=1, learning_rate=1.0, weight_decay=0.0, momentum=0.0, warmup_ratio=0.0)
"""After which weights have changed by minus their gradients."""
NUM_SUBNETS = 4


def norm_net(norm: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = NORMS[norm]
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), make(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3), make(24), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, NUM_CLASSES)),
        )


def gradients(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what one step of `ONE_STEP` must have been made of."""
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def loader(num_images: int = 32, *, batch_size: int = 16, shuffle: bool = False) -> DataLoader:
    return make_loader(NoisyImages(num_images, noise=0.0), batch_size=batch_size, shuffle=shuffle)


def supernet_step(norm: str, strategy: str) -> dict[str, torch.Tensor]:
    """Return the gradients of one step."""
    supernet = psenet.Supernet(model := norm_net(norm), make_space(model))
    before = copy_of(supernet.model.state_dict())
    psenet.train_supernet(
        supernet, loader(16), num_subnets=NUM_SUBNETS, strategy=strategy, config=ONE_STEP, show_progress=False
    )
    return gradients(supernet.model, before)


def plain_step(norm: str) -> dict[str, Any]:
    """Return the gradients of one step, and the buffers after it."""
    model = norm_net(norm)
    before = copy_of(model.state_dict())
    psenet.train_model(model, loader(16), config=ONE_STEP, show_progress=False)
    return {"gradients": gradients(model, before), "buffers": copy_of(dict(model.named_buffers()))}


def supernet_training(norm: str, strategy: str) -> dict[str, Any]:
    """Return weights, history and the epochs told of after a whole training, in shuffled order."""
    supernet = psenet.Supernet(model := norm_net(norm), make_space(model))
    records: list[EpochRecord] = []
    history = psenet.train_supernet(
        supernet,
        loader(48, shuffle=True),
        num_subnets=NUM_SUBNETS,
        strategy=strategy,
        config=TrainConfig(epochs=4, learning_rate=0.05),
        record=records.append,
        show_progress=False,
    )
    told = [(record.epoch, record.step, record.loss) for record in records]
    return {"weights": copy_of(supernet.state_dict()), "history": history.state_dict(), "told": told}


def plain_training(norm: str) -> dict[str, torch.Tensor]:
    model = norm_net(norm)
    config = TrainConfig(epochs=4, learning_rate=0.05)
    psenet.train_model(model, loader(48, shuffle=True), config=config, show_progress=False)
    return copy_of(model.state_dict())


def without_generator() -> dict[str, Any]:
    """Return the images of the first epoch of two trainings by a loader that has no generator, in the order seen."""
    left: dict[str, Any] = {}
    data = DataLoader(NoisyImages(32, noise=0.0), batch_size=16, shuffle=True)
    for name in ("first", "again"):
        torch.manual_seed(5)
        seen: list[torch.Tensor] = []
        model = norm_net("no norm")

        def look(part: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor, seen: Any = seen) -> None:
            if output.requires_grad:
                seen.append(inputs[0].clone())

        model[0].register_forward_hook(look)
        psenet.train_model(model, data, config=ONE_STEP, show_progress=False)
        left[name] = torch.cat(seen)
    return left


class _WithSpare(nn.Module):
    """Has a layer that no output depends on, and one that every second step leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = norm_net("group norm")
        self.spare = nn.Linear(3, 3)
        self.sometimes = nn.Linear(NUM_CLASSES, NUM_CLASSES)
        self.num_steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_steps += 1
        return self.sometimes(self.net(x)) if self.num_steps % 2 else self.net(x)


def unreached_parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = _WithSpare()
    config = TrainConfig(epochs=2, learning_rate=0.05, weight_decay=0.1)
    psenet.train_model(model, loader(48), config=config, show_progress=False)
    return copy_of(model.state_dict())


class _Seen(Dataset):
    """Images of pure noise, drawn as augmentation is; what a loss sees of them is kept."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3, 6, 6), index % NUM_CLASSES


def random_numbers(num_workers: int) -> dict[str, Any]:
    """Return the images and the dropout masks that this process's share of the first batch got."""
    torch.manual_seed(5)
    seen: dict[str, Any] = {}
    model = make_net(dropout=0.5)

    def look(part: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen["images" if part is model[0] else "dropped"] = inputs[0].clone() if part is model[0] else output == 0

    model[0].register_forward_hook(look)
    model[8].register_forward_hook(look)
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(_Seen(), batch_size=16, shuffle=True, generator=generator, num_workers=num_workers)
    psenet.train_model(model, data, config=TrainConfig(epochs=1), show_progress=False, max_steps=1)
    return seen


def diverged() -> str:
    """Return the words of the error after a value that is not finite in the second half of a batch."""
    dataset = NoisyImages(16, noise=0.0)
    dataset.images[15] = math.inf
    try:
        psenet.train_model(norm_net("group norm"), make_loader(dataset, batch_size=16, shuffle=False), config=ONE_STEP)
    except TrainingDivergedError as error:
        return str(error)
    return "nothing"


def refused_batch() -> str:
    try:
        psenet.train_model(norm_net("no norm"), loader(15, batch_size=5), config=ONE_STEP)
    except InputError as error:
        return str(error)
    return "nothing"


def told_by_main() -> list[str]:
    """Return what becomes of values and errors of the main process."""
    said = [ranks.from_main(lambda: f"made by {ranks.rank()} of {ranks.num_ranks()}")]
    try:
        ranks.in_main(lambda: raising(InputError("no such thing"))(torch.zeros(1)))
    except (InputError, ElsewhereError) as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


KEPT = TrainConfig(epochs=3, checkpoint_steps=2, learning_rate=0.05)


def kept_training(path: Path, *, stop: int = -1, seed: int = 3) -> dict[str, Any]:
    """Return what a training with checkpoints, dropout and augmentation leaves; be stuck at the step `stop`."""
    set_seed(seed)
    model = make_net(dropout=0.3, seed=seed)
    supernet = psenet.Supernet(model, make_space(model))
    loss_fn = CountingLoss({stop: lambda losses: _wait_to_be_killed(path)})
    generator = torch.Generator().manual_seed(seed)
    data = DataLoader(NoisyImages(48), batch_size=16, shuffle=True, generator=generator, drop_last=True)
    history = psenet.train_supernet(
        supernet,
        data,
        num_subnets=NUM_SUBNETS,
        config=KEPT,
        loss_fn=loss_fn,
        checkpoint=path,
        show_progress=False,
    )
    return {
        "weights": copy_of(supernet.state_dict()),
        "history": history.state_dict(),
        "next": torch.rand(5),
        "num_steps": loss_fn.num_calls,
    }


def _wait_to_be_killed(path: Path) -> torch.Tensor:
    path.with_suffix(f".{ranks.rank()}.stuck").touch()
    time.sleep(600)
    raise TimeoutError("nobody has killed this process")


def failing(path: Path) -> None:
    """Train, and fail in one process only, while the other waits for it."""
    changes = {4: raising(OSError("the disk of process 1 is gone"))} if ranks.rank() else {}
    psenet.train_model(make_net(), loader(48), config=KEPT, loss_fn=CountingLoss(changes), checkpoint=path)


TRAININGS: dict[str, Callable[[], Any]] = {
    **{
        f"{strategy} step with {norm}": lambda norm=norm, strategy=strategy: supernet_step(norm, strategy)
        for norm in NORMS
        for strategy in STRATEGIES
    },
    **{f"plain step with {norm}": lambda norm=norm: plain_step(norm) for norm in NORMS},
    **{
        f"{strategy} training": lambda strategy=strategy: supernet_training("group norm", strategy)
        for strategy in (*STRATEGIES, "steered")
    },
    "parallel training with batch norm": lambda: supernet_training("batch norm", "parallel"),
    "plain training": lambda: plain_training("group norm"),
    "unreached parameters": unreached_parameters,
    "random numbers": lambda: random_numbers(0),
    "random numbers of loading processes": lambda: random_numbers(2),
    "without generator": without_generator,
    "diverged": diverged,
    "refused batch": refused_batch,
    "told by main": told_by_main,
}


def main(folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    from psenet.training.loop import make_accelerator

    make_accelerator()
    for name in names or TRAININGS:
        if name in TRAININGS:
            left = TRAININGS[name]()
        elif name == "failing":
            failing(folder / "failing.pt")
            continue
        else:
            name, _, stop = name.partition("@")
            left = kept_training(folder / f"{name}.pt", stop=int(stop or -1), seed=3 if name == "whole" or stop else 99)
        torch.save(left, folder / f"{name}.{ranks.rank()}.result")
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
