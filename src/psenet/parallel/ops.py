"""Ops over channels inside a module, made to see the kept channels only.

Layer norms, means over channels and batch norms that a module calls as functions are replaced while that module of our
own copy runs; every other op runs as it is.

Legend: n subnets, B batch, C channels at the ceiling, M = B / n samples a subnet.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from psenet.parallel.masks import mask_over

MASK = "psenet_op_mask"
"""Name of the buffer that holds the mask, shape (n, C)."""


def mask_ops(layer: nn.Module, axis: int, ops: Sequence[str], masked: Collection[int]) -> None:
    """Make ops over channels that a module calls see the kept channels only.

    Args:
        layer: A module of our own copy; it gets a buffer for the mask of the n subnets. Sample j belongs to subnet
            j mod n.
        axis: The channel axis of what the ops read.
        ops: All the ops that the module calls itself and that may run over channels, in order.
        masked: Which of them do.
    """
    layer.register_buffer(MASK, torch.empty(0, dtype=torch.bool, device="meta"), persistent=False)
    run = layer.forward
    running: list[_MaskedOps] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        running.append(_MaskedOps(layer.get_buffer(MASK), axis, ops, masked))
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

    def __init__(self, mask_nC: torch.Tensor, axis: int, ops: Sequence[str], masked: Collection[int]) -> None:
        super().__init__()
        self.depth = 0
        self._mask_nC = mask_nC
        self._axis = axis
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
        return _MASKED[name](
            x, mask_over(self._mask_nC, x, self._axis), *args[1:], **{k: v for k, v in given.items() if k != "input"}
        )

    def finish(self) -> None:
        """Make sure that every op was met."""
        if self._calls != len(self._ops):
            raise RuntimeError(f"calls {self._calls} ops over channels where {len(self._ops)} were expected")


def _by_subnet(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    n = mask.shape[1]
    return x.reshape(x.shape[0] // n, n, *x.shape[1:])


def _kept_mean(x: torch.Tensor, mask: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Return the mean of (M, n, ...) over axes, the kept channels alone, axes kept."""
    size = math.prod(x.shape[axis] for axis in axes)
    count = mask.sum(tuple(axes), keepdim=True) * (size / math.prod(mask.shape[axis] for axis in axes))
    return (x * mask).sum(tuple(axes), keepdim=True) / count


def _last(x: torch.Tensor, num: int) -> list[int]:
    return list(range(x.ndim - num, x.ndim))


def _layer_norm(
    x: torch.Tensor,
    mask: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    split = _by_subnet(x, mask)
    axes = _last(split, len(normalized_shape))
    centred = (split - _kept_mean(split, mask, axes)) * mask
    return _scale(centred, mask, _kept_mean(centred.square(), mask, axes), eps, weight, bias).reshape(x.shape)


def _rms_norm(
    x: torch.Tensor,
    mask: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    split = _by_subnet(x, mask)
    axes = _last(split, len(normalized_shape))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _scale(split * mask, mask, _kept_mean(split.square(), mask, axes), eps, weight, None).reshape(x.shape)


def _group_norm(
    x: torch.Tensor,
    mask: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    assert num_groups == 1, "several groups live and die as wholes and need no mask"
    split = _by_subnet(x, mask)
    axes = list(range(2, split.ndim))
    centred = (split - _kept_mean(split, mask, axes)) * mask
    weight, bias = (None if tensor is None else tensor.reshape(-1, *[1] * (x.ndim - 2)) for tensor in (weight, bias))
    return _scale(centred, mask, _kept_mean(centred.square(), mask, axes), eps, weight, bias).reshape(x.shape)


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


def _mean(x: torch.Tensor, mask: torch.Tensor, dim: Any = None, keepdim: bool = False, **given: Any) -> torch.Tensor:
    x, axes = x.to(given.get("dtype") or x.dtype), _axes(x, given.get("axis", dim))
    means = _kept_mean(_by_subnet(x, mask), mask.to(x.dtype), [axis + 1 for axis in axes])
    return _reduced(means, x, axes, keepdim)


def _sum(x: torch.Tensor, mask: torch.Tensor, dim: Any = None, keepdim: bool = False, **given: Any) -> torch.Tensor:
    x, axes = x.to(given.get("dtype") or x.dtype), _axes(x, given.get("axis", dim))
    kept = _by_subnet(x, mask) * mask.to(x.dtype)
    return _reduced(kept.sum([axis + 1 for axis in axes], keepdim=True), x, axes, keepdim)


def _reduced(result: torch.Tensor, x: torch.Tensor, axes: list[int], keepdim: bool) -> torch.Tensor:
    result = result.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])
    return result if keepdim else result.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


def _axes(x: torch.Tensor, dim: Any) -> list[int]:
    if dim is None:
        return list(range(x.ndim))
    return [axis % x.ndim for axis in ([dim] if isinstance(dim, int) else dim)]


def _batch_norm(
    x: torch.Tensor,
    mask: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    n, num_channels = mask.shape[1], x.shape[1]
    mean, variance = (None if tensor is None else tensor.detach().repeat(n) for tensor in (running_mean, running_var))
    split = x.reshape(x.shape[0] // n, n * num_channels, *x.shape[2:])
    out = nn.functional.batch_norm(split, mean, variance, None, None, training, momentum, eps)
    out = out.reshape(x.shape[0] // n, n, *x.shape[1:]) * mask
    for tensor, combine in ((weight, torch.mul), (bias, torch.add)):
        if tensor is not None:
            out = combine(out, tensor.reshape(-1, *[1] * (x.ndim - 2)) * mask)
    return out.reshape(x.shape)


def _variance(
    x: torch.Tensor,
    mask: torch.Tensor,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Any = None,
) -> torch.Tensor:
    axes = _axes(x, dim if axis is None else axis)
    split, inner = _by_subnet(x, mask), [axis + 1 for axis in axes]
    centred = (split - _kept_mean(split, mask, inner)) * mask
    size = math.prod(split.shape[axis] for axis in inner) / math.prod(mask.shape[axis] for axis in inner)
    freedom = mask.sum(inner, keepdim=True) * size - (int(unbiased) if correction is None else correction)
    return _reduced(centred.square().sum(inner, keepdim=True) / freedom, x, axes, keepdim)


def _deviation(x: torch.Tensor, mask: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _variance(x, mask, *args, **kwargs).sqrt()


def _filled(function: Callable, value: float) -> Callable[..., torch.Tensor]:
    """Return the function of a tensor in which dropped channels have a value that does not count."""

    def masked(x: torch.Tensor, mask: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(_by_subnet(x, mask).masked_fill(mask == 0, value).reshape(x.shape), *args, **kwargs)

    return masked


_MASKED: dict[str, Callable[..., torch.Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
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
