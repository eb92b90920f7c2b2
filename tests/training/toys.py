"""What the training tests share: a small network, images with random augmentation, and exact comparison."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import psenet
from psenet.space import WidthSpace
from psenet.training import TrainConfig

NUM_CLASSES = 4


class NoisyImages(Dataset):
    """Labelled images, to which every access adds noise from torch's global generator, as augmentation does."""

    def __init__(self, size: int, *, dtype: torch.dtype = torch.float32, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        return image + self.noise * torch.randn(image.shape, dtype=image.dtype), self.labels[index]


def make_loader(dataset: Dataset, *, batch_size: int = 8, shuffle: bool = True, seed: int = 1) -> DataLoader:
    """Return a loader with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator)


def make_net(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(24, NUM_CLASSES)),
        )
        return net.to(dtype)


def make_space(model: nn.Module) -> WidthSpace:
    """Return groups of 4, 8, 12, 16 and of 8, 12 ... 24 channels: each stratum is a ceiling of its own."""
    return psenet.trace(model, torch.zeros(2, 3, 6, 6, dtype=next(model.parameters()).dtype), divisor=4)


def make_supernet(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> psenet.Supernet:
    model = make_net(dropout=dropout, dtype=dtype, seed=seed)
    return psenet.Supernet(model, make_space(model))


def train_quietly(model: nn.Module, loader: DataLoader, config: TrainConfig, **options: Any) -> None:
    psenet.train_model(model, loader, config=config, show_progress=False, **options)


class CountingLoss:
    """Cross entropy that counts its calls and changes the losses of some."""

    def __init__(self, changes: dict[int, Callable[[torch.Tensor], torch.Tensor]] | None = None) -> None:
        self.changes = changes or {}
        self.num_calls = 0
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        change = self.changes.get(self.num_calls)
        self.num_calls += 1
        self.dtypes.add(outputs.dtype)
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return losses if change is None else change(losses)


def raising(error: BaseException) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(losses: torch.Tensor) -> torch.Tensor:
        raise error

    return change


def copy_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(ours: Any, expected: Any, where: str = "") -> None:
    """Compare nested containers exactly, tensors bit by bit."""
    assert type(ours) is type(expected), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected), where
    elif isinstance(ours, Mapping):
        assert list(ours) == list(expected), where
        for key in ours:
            assert_same(ours[key], expected[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(expected), where
        for number, (left, right) in enumerate(zip(ours, expected, strict=True)):
            assert_same(left, right, f"{where}[{number}]")
    else:
        assert ours == expected, where
