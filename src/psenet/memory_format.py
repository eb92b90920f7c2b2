"""Lay images out channels-last, where the model can read them so, and safe where a kernel is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from psenet.inputs import Inputs
from psenet.slicing import run_on_copied_buffers

_UNSAFE_BELOW = 16
"""Channels of the widest vector register (AVX-512); a narrower input is unsafe, see `guard_convolutions`."""


class ImageLayout:
    """Lays images out channels-last, if the model can read them so: a step is then 1.3 to 1.7 times as fast on a CPU.

    The weights stay as they are. A model that views a feature map as a vector refuses; it is tried out once.

    Args:
        model: What will read the images.
        channels_last: False to leave images as they come; None for channels-last where possible.
    """

    def __init__(self, model: nn.Module, *, channels_last: bool | None = None) -> None:
        self._model = model
        self._is_possible = channels_last

    def __call__(self, x: Inputs) -> Inputs:
        """Return the inputs, a single batch of images (B, C, H, W) channels-last if that is possible."""
        if self._is_possible is False or not isinstance(x, torch.Tensor) or x.ndim != 4:
            return x
        channels_last = x.contiguous(memory_format=torch.channels_last)
        if self._is_possible is None and self._model.training and len(x) < 2:  # batch norms want two samples
            return x
        if self._is_possible is None:
            self._is_possible = self._runs(channels_last[:2].clone(memory_format=torch.preserve_format))
        return channels_last if self._is_possible else x

    def _runs(self, x: torch.Tensor) -> bool:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                run_on_copied_buffers(self._model, (x,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False
        return True


def guard_convolutions(model: nn.Module) -> list[RemovableHandle]:
    """Make strided 1x1 convolutions of few channels read contiguous inputs where gradients are computed on a CPU.

    On x86 the weight gradient of such a convolution writes beyond its workspace if its input is channels-last
    (https://github.com/uxlfoundation/oneDNN/issues/6035; seen with torch 2.14 on AVX2): wrong gradients, or a crash
    much later. Shortcuts of narrow residual nets are of this kind. What is computed stays the same.

    Returns:
        Handles; `remove()` takes a guard away.
    """
    return [layer.register_forward_pre_hook(_read_contiguous) for layer in model.modules() if _is_unsafe(layer)]


@contextmanager
def guarded_convolutions(model: nn.Module) -> Iterator[None]:
    """Guard a model's convolutions for a while (see `guard_convolutions`)."""
    handles = guard_convolutions(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_unsafe(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and set(layer.kernel_size) == {1}
        and max(layer.stride) > 1
        and layer.in_channels < _UNSAFE_BELOW
    )


def _read_contiguous(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or args[0].device.type != "cpu" or not torch.is_grad_enabled():
        return None
    return (args[0].contiguous(), *args[1:])
