"""Train on noise for thousands of steps, and look for any number that is not finite.

    python benchmarks/soak_numerics.py                   10,000 steps each, five minutes on one core
    python benchmarks/soak_numerics.py --steps 500 --seed 7

Images and labels are random and new in every step, so there is nothing to learn and the loss never settles near zero;
settings are the default ones. A small net with batch norms (one group of 3 channels, one of 2) is trained plainly and
as a supernet. In the end losses, history, weights and running statistics must all be finite.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import psenet
from evidence import write_result
from psenet.training import TrainConfig, train_model, train_supernet
from psenet.training.curves import EpochRecord

_BATCH, _SIDE, _CLASSES = 16, 8, 4
_EPOCHS = 10


class Noise(Dataset[tuple[torch.Tensor, int]]):
    """Random images with random labels, new ones at every reading."""

    def __init__(self, num: int) -> None:
        self._num = num

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3, _SIDE, _SIDE), int(torch.randint(_CLASSES, ()))


def make_net() -> nn.Module:
    """Return a net with batch norms and narrow groups."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((3, 1), (8, 2), (2, 1), (16, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, _CLASSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"steps": arguments.steps, "batch_size": _BATCH}
    for name, train in (("plain", train_plain), ("supernet", train_many)):
        torch.manual_seed(arguments.seed)
        begin = time.perf_counter()
        figures[name] = train(DataLoader(Noise(arguments.steps // _EPOCHS * _BATCH), _BATCH), arguments.seed)
        figures[name]["seconds"] = round(time.perf_counter() - begin, 1)
    print(json.dumps(figures, indent=2))
    print(f"figures: {write_result('soak_numerics', figures, seed=arguments.seed)}")
    if figures["plain"]["not_finite"] or figures["supernet"]["not_finite"]:
        sys.exit(1)


def train_plain(loader: DataLoader, seed: int) -> dict[str, Any]:
    """Train the net itself."""
    model, (record, curve) = make_net(), recorder()
    train_model(model, loader, config=TrainConfig(epochs=_EPOCHS), record=record, show_progress=False)
    return seen(curve, model)


def train_many(loader: DataLoader, seed: int) -> dict[str, Any]:
    """Train four subnets a step."""
    model, (record, curve) = make_net(), recorder()
    space = psenet.trace(model, torch.randn(2, 3, _SIDE, _SIDE), divisor=1)
    supernet = psenet.Supernet(model, space)
    config = TrainConfig(epochs=_EPOCHS)
    history = train_supernet(
        supernet, loader, num_subnets=4, config=config, seed=seed, record=record, show_progress=False
    )
    figures = seen(curve, supernet)
    bad = int((~torch.from_numpy(history.losses).isfinite()).sum())
    figures["not_finite"] += bad
    return {**figures, "visits": len(history), "highest_loss": round(float(history.losses.max()), 4)}


def recorder() -> tuple[Callable[[EpochRecord], None], list[float]]:
    """Return what is told of epochs, and the list of their mean losses that it fills."""
    curve: list[float] = []
    return lambda epoch: curve.append(epoch.loss), curve


def seen(curve: list[float], module: nn.Module) -> dict[str, Any]:
    """Return the mean losses of the epochs, the largest weight or statistic, and how much is not finite."""
    tensors = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    not_finite = sum(not math.isfinite(loss) for loss in curve)
    not_finite += sum(int((~tensor.isfinite()).sum()) for tensor in tensors)
    return {
        "epoch_losses": [round(loss, 4) for loss in curve],
        "largest_value": round(max(float(tensor.abs().max()) for tensor in tensors), 4),
        "not_finite": not_finite,
    }


if __name__ == "__main__":
    main()
