"""Convolutions whose weight gradient is unsafe for channels-last inputs get contiguous ones."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import psenet
from psenet.memory_format import guard_convolutions, guarded_convolutions
from psenet.training import TrainConfig, train_model


class _Shortcut(nn.Module):
    """A stem, and a residual block whose shortcut is a strided 1x1 convolution of few channels."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, 32, 3, 2, 1)
        self.shortcut = nn.Conv2d(channels, 32, 1, 2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.conv(x) + self.shortcut(x)).mean((2, 3)))


class _Watch(TorchDispatchMode):
    """Notes, for the weight gradients of 1x1 convolutions, whether the input is contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.contiguous: list[bool] = []
        self.others: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            x, weight = args[1], args[2]
            (self.contiguous if weight.shape[-1] == 1 else self.others).append(x.is_contiguous())
        return func(*args, **(kwargs or {}))


def _data(num: int = 4) -> torch.Tensor:
    return torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_parallel_pass_reads_narrow_shortcuts_contiguous_and_all_else_channels_last():
    model, x = _Shortcut(), _data(6)
    space = psenet.trace(model, x[:1], divisor=2)
    supernet = psenet.Supernet(model, space).train()
    rng = np.random.default_rng(0)
    with _Watch() as watch:
        supernet(x, [space.sample(rng) for _ in range(3)]).sum().backward()
    assert watch.contiguous == [True] and watch.others == [False, False]


def test_training_a_plain_model_reads_narrow_shortcuts_contiguous():
    model = _Shortcut()
    loader = DataLoader(TensorDataset(_data(8), torch.arange(8) % 4), batch_size=4)
    with _Watch() as watch:
        train_model(model, loader, config=TrainConfig(epochs=1), show_progress=False)
    assert watch.contiguous == [True, True] and not any(watch.others)
    assert not model.shortcut._forward_pre_hooks, "nothing stays on the user's model"


@pytest.mark.parametrize("channels", [8, 16])
def test_only_inputs_below_the_widest_register_are_guarded(channels: int):
    model = _Shortcut(channels)
    assert len(guard_convolutions(model)) == (channels < 16)
    x = _data().to(memory_format=torch.channels_last)
    with _Watch() as watch:
        model(x).sum().backward()
    assert watch.contiguous == [channels < 16]


def test_a_guard_changes_no_result():
    model, x = _Shortcut().double(), _data().double().to(memory_format=torch.channels_last)
    guarded = copy.deepcopy(model)
    with guarded_convolutions(guarded):
        outputs = guarded(x)
    expected = model(x)
    assert torch.allclose(outputs, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(outputs.sum(), list(guarded.parameters())),
        torch.autograd.grad(expected.sum(), list(model.parameters())),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
