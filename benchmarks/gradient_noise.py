"""How much of a step's gradient noise is the choice of subnets: what training several of them at once can gain.

    python benchmarks/gradient_noise.py --data FOLDER            three minutes on one core

The gradient of a step estimates that of the mean loss over all subnets and images. Its variance has two parts. That of
the images falls with the batch size. That of the subnets does not if the whole batch goes through one subnet
(single-path), and falls with n if n of them share the batch (parallel). Before supernet training and after it, with
the net and data of benchmarks/ranking.py, gradients of subnets x batches are taken, and the two parts estimated by a
two-way analysis of variance, summed over all parameters.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import psenet
from evidence import write_result
from ranking import BATCH_SIZE, CONFIG, LEARNING_RATE, Net, Race

NUM_SUBNETS, NUM_BATCHES = 24, 8
NUM_AT_ONCE = 8
SHOWN_BATCH_SIZES = (32, 128, 512, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as an image folder")
    parser.add_argument("--epochs", type=int, default=4, help="of supernet training")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    race = Race(arguments.data, None, arguments.epochs, from_scratch=False, threads=arguments.threads)
    model = Net(race.widths)
    model.load_state_dict(race.start(0))
    supernet = psenet.Supernet(model, race.space).train()
    figures: dict[str, Any] = {"batch_size": BATCH_SIZE, "subnets": NUM_SUBNETS, "batches": NUM_BATCHES}
    figures["before_training"] = shares(race, supernet)
    psenet.train_supernet(
        supernet,
        race.loader(0),
        config=replace(CONFIG, epochs=arguments.epochs, learning_rate=LEARNING_RATE),
        show_progress=False,
    )
    figures["after_training"] = shares(race, supernet.train())
    print(json.dumps(figures, indent=2))
    print(f"figures: {write_result('gradient_noise', figures, seed=0)}")


def shares(race: Race, supernet: psenet.Supernet) -> dict[str, Any]:
    """Return the two parts of the variance of a single-path step, and what several subnets leave of it."""
    rng = np.random.default_rng(0)
    batches = [batch for batch, _ in zip(race.loader(1), range(NUM_BATCHES), strict=False)]
    gradients_SBP = torch.stack(
        [torch.stack([_gradient(supernet, widths, *batch) for batch in batches]) for widths in _draw(race, rng)]
    )
    by_subnet, by_batch = variances(gradients_SBP)
    left = {}
    for batch_size in SHOWN_BATCH_SIZES:
        of_images = by_batch * BATCH_SIZE / batch_size
        left[str(batch_size)] = round((of_images + by_subnet / NUM_AT_ONCE) / (of_images + by_subnet), 3)
    return {
        "share_of_subnets": round(by_subnet / (by_subnet + by_batch), 3),
        f"variance_left_with_{NUM_AT_ONCE}_subnets_by_batch_size": left,
    }


def variances(gradients_SBP: torch.Tensor) -> tuple[float, float]:
    """Return the variance over subnets and that over batches (with the interaction), summed over parameters.

    The mean over B batches of a subnet's gradient still has a B-th of the variance over batches, which is taken off.
    """
    num_batches = gradients_SBP.shape[1]
    by_batch = float(gradients_SBP.var(dim=1).mean(dim=0).sum())
    of_means = float(gradients_SBP.mean(dim=1).var(dim=0).sum())
    return max(of_means - by_batch / num_batches, 0.0), by_batch


def _draw(race: Race, rng: np.random.Generator) -> list[psenet.Widths]:
    return [race.space.sample(rng) for _ in range(NUM_SUBNETS)]


def _gradient(
    supernet: psenet.Supernet, widths: psenet.Widths, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of one subnet's mean loss over all parameters of the supernet, zero where it has none."""
    loss = F.cross_entropy(supernet(images, widths), labels)
    gradients = torch.autograd.grad(loss, list(supernet.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


if __name__ == "__main__":
    main()
