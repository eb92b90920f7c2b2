"""A model's inputs: one tensor, or a tuple of positional arguments with tensors somewhere inside.

Every tensor in it has the samples on axis 0.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from psenet.errors import InputError

Inputs = Any
"""A tensor of shape (B, ...), or a tuple or list of positional arguments: tensors, and dicts or tuples of them."""


def as_arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Return the positional arguments that the inputs are."""
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def tensors_in(structure: Any) -> list[torch.Tensor]:
    """Return every tensor of inputs or outputs, in a fixed order."""
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], structure: Any) -> Any:
    """Return the same structure with the function applied to every tensor."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, structure)


def map_samples(function: Callable[[torch.Tensor], torch.Tensor], structure: Any, without: Collection[int]) -> Any:
    """Return the same outputs with the function applied to every tensor but those of the given numbers, in order."""
    numbers = iter(range(len(tensors_in(structure))))
    return map_tensors(lambda tensor: tensor if next(numbers) in without else function(tensor), structure)


def num_samples(inputs: Inputs) -> int:
    """Return the batch size.

    Raises:
        InputError: There is no tensor, or the tensors have different sizes on axis 0.
    """
    sizes = sorted({tensor.shape[0] if tensor.ndim else 0 for tensor in tensors_in(inputs)})
    if len(sizes) != 1 or sizes == [0]:
        shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
        raise InputError(f"all inputs must be tensors of one batch, shape (B, ...); got shapes {shapes}")
    return sizes[0]
