"""Reading the nodes of an exported graph."""

from typing import Any

import torch
from torch import fx


def aliased(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory the node's result shares: views, in-place ops, dropout in eval mode."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.args[0] if node.op == "call_function" and isinstance(node.args[0], fx.Node) else None
    schema = node.target._schema
    if str(node.target).startswith("aten.dropout") and isinstance(node.args[0], fx.Node):
        return node.args[0]
    if schema.returns and schema.returns[0].alias_info is not None and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def is_expanded(argument: Any, axis: int) -> bool:
    """Tell whether a tensor is a repetition of one slice along an axis."""
    if not isinstance(argument, fx.Node) or not str(argument.target).startswith("aten.expand"):
        return False
    base, rank = shape_of(argument.args[0]), len(shape_of(argument))  # pyright: ignore[reportArgumentType]
    axis -= rank - len(base)
    return axis < 0 or base[axis] == 1


def results_of(node: fx.Node) -> list[torch.Tensor]:
    """Return the (fake) tensors that an op returns."""
    results = node.meta.get("val")
    results = results if isinstance(results, tuple | list) else [results]
    return [tensor for tensor in results if isinstance(tensor, torch.Tensor)]


def storages_of(node: fx.Node) -> list[int]:
    """Return a key for the memory of each tensor that an op returns; export's fake tensors share it as real ones do."""
    return [tensor.untyped_storage()._cdata for tensor in results_of(node)]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the (first) tensor that an op returns."""
    tensor = node.meta.get("val")
    if isinstance(tensor, (tuple, list)):
        tensor = tensor[0]
    return tuple(int(size) for size in tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def itemsize_of(node: fx.Node) -> int:
    """Return the bytes per element of the (first) tensor that an op returns."""
    results = results_of(node)
    return results[0].element_size() if results else 0
