"""Where modules and batches are, and moving them for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module to a device, and back to where it was afterwards."""
    home = device_of(module)
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def device_of(module: object) -> torch.device | None:
    """Return where a module's parameters are; None without any."""
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return None if first is None else first.device


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Return a batch (tensors inside dicts, tuples and lists) on a device; None leaves it where it is."""
    if isinstance(batch, torch.Tensor):
        return batch if device is None else batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
