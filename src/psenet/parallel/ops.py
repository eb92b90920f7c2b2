"""Ops over channels inside a module, made to see the kept channels only.

Layer norms, means over channels and batch norms that a module calls as functions are replaced while that module of our
own copy runs; every other op runs as it is.

Legend: n subnets, B batch, C channels at the ceiling. Samples stand in blocks, one for each subnet.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from psenet.parallel import norms
from psenet.parallel.masks import MASK, Blocks, Current


def mask_ops(layer: nn.Module, current: Current, axis: int, ops: Sequence[str], masked: Collection[int]) -> None:
    """Make ops over channels that a module calls see the kept channels only.

    Args:
        layer: A module of our own copy; it gets a buffer `MASK` for the masks of a step.
        current: Says which samples belong to which subnet.
        axis: The channel axis of what the ops read.
        ops: All the ops that the module calls itself and that may run over channels, in order.
        masked: Which of them do.
    """
    layer.register_buffer(MASK, torch.empty(0, dtype=torch.bool, device="meta"), persistent=False)
    run = layer.forward
    running: list[_MaskedOps] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        running.append(_MaskedOps(_Kept(layer.get_buffer(MASK), current.blocks, axis), ops, masked))
        try:
            with running[-1]:
                result = run(*args, **kwargs)
            running[-1].finish()
            return result
        finally:
            running.pop()

    def count(_part: nn.Module, *_: Any, by: int) -> None:
        if running:
            running[-1].depth += by

    layer.forward = forward
    for part in [*layer.modules()][1:]:  # what the modules inside call is their own affair
        part.register_forward_pre_hook(functools.partial(count, by=1))
        part.register_forward_hook(functools.partial(count, by=-1), always_call=True)


class _MaskedOps(TorchFunctionMode):
    """Replaces some of the ops that a module calls itself, told by their order."""

    def __init__(self, kept: "_Kept", ops: Sequence[str], masked: Collection[int]) -> None:
        super().__init__()
        self.depth = 0
        self._kept = kept
        self._ops = ops
        self._masked = masked
        self._calls = 0

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.depth or name not in _MASKED:
            return func(*args, **given)
        number, self._calls = self._calls, self._calls + 1
        if self._ops[number : number + 1] != (_AS_TRACED.get(name, name),):
            raise RuntimeError(f"calls {name} where {self._ops[number : number + 1]} was expected")
        if number not in self._masked:
            return func(*args, **given)
        x = args[0] if args else given["input"]
        others = {key: value for key, value in given.items() if key != "input"}
        return _MASKED[name](x, self._kept, *args[1:], **others)

    def finish(self) -> None:
        """Make sure that every op was met."""
        if self._calls != len(self._ops):
            raise RuntimeError(f"calls {self._calls} ops over channels where {len(self._ops)} were expected")


class _Kept:
    """Which channels count, for the samples of each subnet."""

    def __init__(self, mask_nC: torch.Tensor, blocks: Blocks, axis: int) -> None:
        self.mask_nC = mask_nC
        self.blocks = blocks
        self._axis = axis

    def over(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks.mask_over(self.mask_nC, x, self._axis)


def _kept_mean(x: torch.Tensor, mask: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Return the mean of (B, ...) over axes, the kept channels alone, axes kept."""
    size = math.prod(x.shape[axis] for axis in axes)
    count = mask.sum(tuple(axes), keepdim=True) * (size / math.prod(mask.shape[axis] for axis in axes))
    return (x * mask).sum(tuple(axes), keepdim=True) / count


def _last(x: torch.Tensor, num: int) -> list[int]:
    return list(range(x.ndim - num, x.ndim))


def _layer_norm(
    x: torch.Tensor,
    kept: _Kept,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    mask, axes = kept.over(x), _last(x, len(normalized_shape))
    centred = (x - _kept_mean(x, mask, axes)) * mask
    return _scale(centred, mask, _kept_mean(centred.square(), mask, axes), eps, weight, bias)


def _rms_norm(
    x: torch.Tensor,
    kept: _Kept,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    mask, axes = kept.over(x), _last(x, len(normalized_shape))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _scale(x * mask, mask, _kept_mean(x.square(), mask, axes), eps, weight, None)


def _group_norm(
    x: torch.Tensor,
    kept: _Kept,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    assert num_groups == 1, "several groups live and die as wholes and need no mask"
    mask, axes = kept.over(x), list(range(1, x.ndim))
    centred = (x - _kept_mean(x, mask, axes)) * mask
    weight, bias = (None if tensor is None else tensor.reshape(-1, *[1] * (x.ndim - 2)) for tensor in (weight, bias))
    return _scale(centred, mask, _kept_mean(centred.square(), mask, axes), eps, weight, bias)


def _scale(
    centred: torch.Tensor,
    mask: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Finish a norm; what is dropped stays zero."""
    out = centred * torch.rsqrt(variance + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias * mask


def _mean(x: torch.Tensor, kept: _Kept, dim: Any = None, keepdim: bool = False, **given: Any) -> torch.Tensor:
    x, axes = x.to(given.get("dtype") or x.dtype), _axes(x, given.get("axis", dim))
    return _reduced(_kept_mean(x, kept.over(x), axes), x, axes, keepdim)


def _sum(x: torch.Tensor, kept: _Kept, dim: Any = None, keepdim: bool = False, **given: Any) -> torch.Tensor:
    x, axes = x.to(given.get("dtype") or x.dtype), _axes(x, given.get("axis", dim))
    return _reduced((x * kept.over(x)).sum(axes, keepdim=True), x, axes, keepdim)


def _reduced(result: torch.Tensor, x: torch.Tensor, axes: list[int], keepdim: bool) -> torch.Tensor:
    result = result.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])
    return result if keepdim else result.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


def _axes(x: torch.Tensor, dim: Any) -> list[int]:
    if dim is None:
        return list(range(x.ndim))
    return [axis % x.ndim for axis in ([dim] if isinstance(dim, int) else dim)]


def _batch_norm(
    x: torch.Tensor,
    kept: _Kept,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    statistics = None if training else (running_mean, running_var)
    return norms.batch_norm(x, kept.mask_nC, kept.blocks, weight=weight, bias=bias, statistics=statistics, eps=eps)


def _variance(
    x: torch.Tensor,
    kept: _Kept,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Any = None,
) -> torch.Tensor:
    mask, axes = kept.over(x), _axes(x, dim if axis is None else axis)
    centred = (x - _kept_mean(x, mask, axes)) * mask
    size = math.prod(x.shape[axis] for axis in axes) / math.prod(mask.shape[axis] for axis in axes)
    freedom = mask.sum(axes, keepdim=True) * size - (int(unbiased) if correction is None else correction)
    return _reduced(centred.square().sum(axes, keepdim=True) / freedom, x, axes, keepdim)


def _deviation(x: torch.Tensor, kept: _Kept, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _variance(x, kept, *args, **kwargs).sqrt()


def _filled(function: Callable, value: float) -> Callable[..., torch.Tensor]:
    """Return the function of a tensor in which dropped channels have a value that does not count."""

    def masked(x: torch.Tensor, kept: _Kept, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(x.masked_fill(kept.over(x) == 0, value), *args, **kwargs)

    return masked


_MASKED: dict[str, Callable[..., torch.Tensor]] = {
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "mean": _mean,
    "sum": _sum,
    "var": _variance,
    "std": _deviation,
    "amax": _filled(torch.amax, -math.inf),
    "amin": _filled(torch.amin, math.inf),
    "max": _filled(torch.max, -math.inf),
    "min": _filled(torch.min, math.inf),
    "norm": _filled(torch.norm, 0.0),
    "normalize": _filled(nn.functional.normalize, 0.0),
    "linalg_norm": _filled(torch.linalg.norm, 0.0),
    "linalg_vector_norm": _filled(torch.linalg.vector_norm, 0.0),
}

_AS_TRACED = {name: "linalg_vector_norm" for name in ("norm", "normalize", "linalg_norm")}
"""What functions become in an exported graph, where the name is another."""
