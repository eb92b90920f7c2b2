"""Noisy images of three colours, a small net for them, and `psenet.prune` of that net in about a second.

Here too is what the runs' figures are compared with: counts and accuracies that share no code with psenet.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import psenet
from psenet import Budget, PruneConfig, PruneResult, TrainConfig, Widths
from psenet.artifact import save_weights
from psenet.export import ExportChoice, ExportReport

SHAPE = (3, 8, 8)
EXAMPLE = torch.zeros(1, *SHAPE)
SHORT = TrainConfig(epochs=2, learning_rate=0.05)
NUM_TRAIN, BATCH_SIZE = 96, 32
NUM_STEPS = 2 * NUM_TRAIN // BATCH_SIZE
"""Of one training."""
GROUPS = ("0", "3", "6")
"""The channel groups of the net: its convolutions."""


class Colours(Dataset):
    """Images whose strongest channel is their class; training images get other noise at every reading."""

    def __init__(self, count: int, *, seed: int, augment: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        self.images_NCHW = torch.randn(count, *SHAPE, generator=generator)
        self.images_NCHW += 0.4 * torch.eye(3)[self.labels][:, :, None, None]
        self.augment = augment
        self.spoil_from: int | None = None
        """So many images are given as they are, all later ones as NaN."""
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_read += 1
        image_CHW = self.images_NCHW[index]
        if self.augment:
            image_CHW = image_CHW + 0.3 * torch.randn(SHAPE)
        if self.spoil_from is not None and self.num_read > self.spoil_from:
            image_CHW = image_CHW * torch.nan
        return image_CHW, self.labels[index]


def train_images(*, batch_size: int = BATCH_SIZE, seeded: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(5) if seeded else None
    return DataLoader(Colours(NUM_TRAIN, seed=0, augment=True), batch_size, shuffle=True, generator=generator)


def validation_images() -> DataLoader:
    return DataLoader(Colours(60, seed=1), BATCH_SIZE)


def unseen_images() -> DataLoader:
    return DataLoader(Colours(90, seed=2), BATCH_SIZE)


def make_net(first: int = 16, second: int = 24, third: int = 16) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(
            *(nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()),
            *(nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(second), nn.ReLU()),
            *(nn.Conv2d(second, third, 3, padding=1, bias=False), nn.BatchNorm2d(third), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 3)),
        )


def short_config(**changes: Any) -> PruneConfig:
    settings: dict[str, Any] = {"baseline": SHORT, "supernet": SHORT, "finetune": SHORT}
    return PruneConfig(
        **{**settings, "num_subnets": 4, "num_evaluations": 6, "num_front_evaluations": 0, "divisor": 4, **changes}
    )


def prune_net(out: Path | None, **changes: Any) -> PruneResult:
    """Run with model, data and loaders made anew, as a program that is started again has them."""
    given: dict[str, Any] = {
        "model": make_net(),
        "train_loader": train_images(),
        "val_loader": validation_images(),
        "test_loader": unseen_images(),
        "budget": Budget(macs="50%"),
        "config": short_config(),
        **changes,
    }
    model, train_loader, val_loader = (given.pop(name) for name in ("model", "train_loader", "val_loader"))
    return psenet.prune(model, EXAMPLE, train_loader, val_loader, out=out, **given)


def export_weights_only(
    module: nn.Module,
    example: torch.Tensor,
    folder: Path,
    *,
    widths: Widths,
    details: Mapping[str, object],
    choice: ExportChoice,
) -> ExportReport:
    """Stand in for `export_model`, whose programs take seconds."""
    paths = save_weights(module, folder, widths=widths, details=details)
    return ExportReport(
        paths={path.name: path for path in paths},
        bytes={path.name: path.stat().st_size for path in paths},
        onnx_max_relative_difference=None,
        onnx_opset=None,
        batch_is_dynamic=False,
    )


def one_thread() -> Iterator[None]:
    """Keep torch on one thread for a while: nets this small get slower with more, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What to compare with -------------------------------------------------------------------------------------------------


def count_macs(module: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(EXAMPLE)
    return counter.get_total_flops() // 2


def count_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def top1(module: nn.Module, loader: DataLoader) -> float:
    """Return the accuracy in percent, one image at a time."""
    images: Any = loader.dataset
    module.eval()
    with torch.no_grad():
        items = (images[index] for index in range(len(images)))
        right = [int(module(image_CHW.unsqueeze(0)).argmax()) == int(label) for image_CHW, label in items]
    return 100 * sum(right) / len(right)


def widths_of(net: nn.Module) -> tuple[int, ...]:
    return tuple(net.get_parameter(f"{group}.weight").shape[0] for group in GROUPS)


def load_by_hand(weights: Path) -> nn.Module:
    """Build the net that has the shapes of these weights."""
    state = load_file(weights)
    net = make_net(*(state[f"{group}.weight"].shape[0] for group in GROUPS))
    net.load_state_dict(state)
    return net.eval()


def read_record(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def repeatable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a record must be the same when a run is repeated: all but times and the programs' sizes."""
    kept = {name: value for name, value in record.items() if name not in ("seconds", "finished_at", "export")}
    for net in ("baseline", "pruned", "uniform", "searched"):
        kept[net] = {name: value for name, value in record[net].items() if not name.startswith("latency")}
    return kept


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Compare the figures, every weight and the history of two runs, exactly."""
    assert repeatable(read_record(ours)) == repeatable(read_record(theirs))
    files, other_files = (
        sorted(path.relative_to(run) for path in run.rglob("*.safetensors")) for run in (ours, theirs)
    )
    assert files == other_files
    for file in files:
        state, other = load_file(ours / file), load_file(theirs / file)
        assert state.keys() == other.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other[name]), f"{name} of {file}"
    with np.load(ours / "stages/history.npz") as history, np.load(theirs / "stages/history.npz") as other_history:
        assert history.files == other_history.files
        for name in history.files:
            assert np.array_equal(history[name], other_history[name]), f"{name} of the history"
