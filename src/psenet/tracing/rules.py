"""What each ATen op does to channels: one small rule per op.

A rule takes a `Call` and returns the `Value` of the op's output. To add one, decorate a function with the names of the
ops it covers; in-place variants (`relu_`) share the rule of the plain op.
"""

from collections.abc import Callable

import numpy as np
import torch

from psenet.tracing.reader import NO_CHANNEL, Call, Rule, Value

RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the rule of some ops.

    Raises:
        ValueError: An op has a rule already.
    """

    def register(function: Rule) -> Rule:
        for op in ops:
            if op in RULES:
                raise ValueError(f"{op} has a rule already: {RULES[op].__name__}")  # pyright: ignore[reportAttributeAccessIssue]
            RULES[op] = function
        return function

    return register


# Layers with weights -------------------------------------------------------------------------------------------------


@rule(
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.conv3d.padding",
)
def convolution(call: Call) -> Value:
    value, weight_shape = call.value(call["input"]), call.value(call["weight"]).shape
    spatial, groups = weight_shape[2:], call["groups"]
    in_ids = value.axis_ids(1)
    if in_ids is None or len(value.shape) != len(weight_shape):
        call.freeze_inputs("channels are not on axis 1 of a batch")
        in_ids = np.full(weight_shape[1] * groups, NO_CHANNEL, np.int64)
    scale = int(np.prod(call.shape[2:]) * np.prod(spatial))
    rest = [None] * len(spatial)
    if groups == 1:
        out_ids = call.fresh(weight_shape[0])
        call.follow(call["weight"], [out_ids, in_ids, *rest])
        call.count_macs(scale, in_ids, out_ids, out_ids)
        call.reads_across(value, in_ids, 1)
        zero = False
    else:
        out_ids = _grouped(call, in_ids, groups, weight_shape)
        call.follow(call["weight"], [out_ids, None, *rest])
        call.count_macs(scale * weight_shape[1], None, out_ids, out_ids)
        # A dropped conv-group reads only dropped channels: zero in, zero out, unless a bias adds something.
        zero = value.zero and call["bias"] is None
    call.follow(call["bias"], [out_ids])
    return call.along(1, out_ids, zero=zero)


def _grouped(call: Call, in_ids: np.ndarray, groups: int, weight_shape: tuple[int, ...]) -> np.ndarray:
    """Return the output ids of a grouped convolution: each conv-group lives and dies as a whole."""
    in_per_group, out_per_group = weight_shape[1], weight_shape[0] // groups
    in_GI = in_ids.reshape(groups, in_per_group)
    if in_per_group > 1:
        call.tie(in_GI[:, :1], in_GI)
    return np.repeat(in_GI[:, 0], out_per_group)


@rule("aten.linear.default")
def linear(call: Call) -> Value:
    value, (num_out, num_in) = call.value(call["input"]), call.value(call["weight"]).shape
    in_ids = value.axis_ids(-1)
    if in_ids is None:
        call.freeze_inputs("channels are not on the last axis")
        in_ids = np.full(num_in, NO_CHANNEL, np.int64)
    out_ids = call.fresh(num_out)
    call.follow(call["weight"], [out_ids, in_ids])
    call.follow(call["bias"], [out_ids])
    call.count_macs(int(np.prod(call.shape[1:-1])), in_ids, out_ids, out_ids)
    call.reads_across(value, in_ids, -1)
    return call.along(-1, out_ids, zero=False)


@rule("aten.batch_norm.default")
def batch_norm(call: Call) -> Value:
    value = call.value(call["input"])
    ids = value.axis_ids(1)
    if ids is None:
        call.freeze_inputs("channels are not on axis 1")
        ids = np.full(value.shape[1], NO_CHANNEL, np.int64)
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.follow(call[name], [ids])
    call.normalises(ids, 1)
    return call.along(1, ids, zero=True)


# Elementwise ---------------------------------------------------------------------------------------------------------


@rule(
    *(
        f"aten.{name}.default"
        for name in (
            "abs alias celu clone contiguous detach dropout elu exp feature_dropout gelu hardsigmoid hardswish "
            "hardtanh leaky_relu lift_fresh_copy log_sigmoid mish neg relu relu6 selu sigmoid silu softplus sqrt "
            "square tanh"
        ).split()
    ),
    "aten.pow.Tensor_Scalar",
    "aten.add.Scalar",
    "aten.sub.Scalar",
    "aten.mul.Scalar",
    "aten.div.Scalar",
    "aten.clamp.default",
    "aten.clamp_min.default",
    "aten.to.dtype",
    "aten._to_copy.default",
)
def elementwise(call: Call) -> Value:
    value = call.value(call.node.args[0])
    # Ask the op itself what it makes of zero.
    at_zero = call.node.target(torch.zeros(1), *call.node.args[1:], **call.node.kwargs)  # pyright: ignore[reportCallIssue]
    if not at_zero.isfinite().all():  # no mask could make such a channel zero again
        call.freeze_inputs("is not finite at zero")
        return call.untracked()
    return call.output(value.ids, zero=value.zero and bool((at_zero == 0).all()))


@rule("aten.add.Tensor", "aten.sub.Tensor", "aten.maximum.default", "aten.minimum.default")
def add(call: Call) -> Value:
    a, b = call.value(call.node.args[0]), call.value(call.node.args[1])
    return call.output(_meet(call, a, b), zero=_zero_at(a) and _zero_at(b))


@rule("aten.mul.Tensor")
def multiply(call: Call) -> Value:
    a, b = call.value(call["self"]), call.value(call["other"])
    return call.output(_meet(call, a, b), zero=(a.zero and a.tracked()) or (b.zero and b.tracked()))


@rule("aten.div.Tensor")
def divide(call: Call) -> Value:
    a, b = call.value(call["self"]), call.value(call["other"])
    if b.tracked():  # a dropped divisor is zero, and 0 / 0 is not
        call.freeze_inputs("divides by channels")
        return call.untracked()
    return call.output(_meet(call, a, b), zero=a.zero)


def _zero_at(value: Value) -> bool:
    """Tell whether a term adds nothing to dropped channels: it is zero there."""
    return value.zero and value.tracked()


def _meet(call: Call, a: Value, b: Value) -> np.ndarray:
    """Return the ids of two tensors broadcast together, tying those that meet."""
    rank = len(call.shape)
    a_ids, b_ids = (value.ids.reshape([1] * (rank - value.ids.ndim) + list(value.ids.shape)) for value in (a, b))
    for ids, other, shape in ((a_ids, b_ids, b.shape), (b_ids, a_ids, a.shape)):
        sizes = [1] * (rank - len(shape)) + list(shape)
        for axis in range(rank):
            if ids.shape[axis] > 1 and other.shape[axis] == 1 and sizes[axis] > 1:
                call.freeze(ids, "meets a tensor of fixed size on its channel axis")
                return np.full([1] * rank, NO_CHANNEL, np.int64)
    if (a_ids == NO_CHANNEL).all():
        return b_ids
    if (b_ids == NO_CHANNEL).all():
        return a_ids
    call.tie(a_ids, b_ids)
    a_ids, b_ids = np.broadcast_arrays(a_ids, b_ids)
    return np.where(a_ids != NO_CHANNEL, a_ids, b_ids)


# Space, not channels -------------------------------------------------------------------------------------------------


@rule(
    *(f"aten.{kind}_pool{rank}d.default" for kind in ("avg", "max", "adaptive_avg") for rank in (1, 2, 3)),
    "aten.upsample_nearest2d.vec",
    "aten.upsample_bilinear2d.vec",
)
def pool(call: Call) -> Value:
    value = call.value(call.node.args[0])
    ids = value.axis_ids(1)
    if ids is None or len(call.shape) != len(value.shape):
        call.freeze_inputs("channels are not on axis 1")
        return call.untracked()
    return call.along(1, ids, zero=value.zero)


@rule("aten.mean.dim", "aten.sum.dim_IntList")
def reduce(call: Call) -> Value:
    value = call.value(call["self"])
    rank = len(value.shape)
    axes = {axis % rank for axis in (range(rank) if not call["dim"] else call["dim"])}
    if any(value.ids.shape[axis] > 1 for axis in axes):
        call.freeze_inputs("reduces over channels")
        return call.untracked()
    ids = value.ids if call["keepdim"] else np.squeeze(value.ids, tuple(axes))
    return call.output(ids, zero=value.zero)


# Re-arrangement ------------------------------------------------------------------------------------------------------


@rule(
    "aten.flatten.using_ints",
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
)
def reshape(call: Call) -> Value:
    value, shape = call.value(call.node.args[0]), call.shape
    if not value.tracked():
        return call.untracked()
    if not shape or not value.shape or shape[0] != value.shape[0] or value.ids.shape[0] != 1:
        call.freeze_inputs("moves the batch axis")
        return call.untracked()
    ids = np.broadcast_to(value.ids[:1], (1, *value.shape[1:])).reshape(1, *shape[1:])
    for axis in range(1, ids.ndim):
        first = ids.take([0], axis)
        if (ids == first).all():
            ids = first
    return call.output(ids, zero=value.zero)


@rule("aten.permute.default", "aten.transpose.int")
def permute(call: Call) -> Value:
    value = call.value(call["self"])
    if "dims" in call.arguments:
        return call.output(value.ids.transpose(call["dims"]), zero=value.zero)
    return call.output(value.ids.swapaxes(call["dim0"], call["dim1"]), zero=value.zero)


@rule("aten.cat.default")
def concatenate(call: Call) -> Value:
    values = [call.value(tensor) for tensor in call["tensors"]]
    axis = call["dim"] % len(call.shape)
    zero = all(value.zero or not value.tracked() for value in values)
    along = [value.axis_ids(axis) for value in values]
    pieces = [ids for ids in along if ids is not None]
    if len(pieces) == len(values):
        return call.along(axis, np.concatenate(pieces), zero=zero)
    if all(value.ids.shape[axis] == 1 for value in values):  # another axis carries the channels: they meet
        ids = values[0].ids
        for value in values[1:]:
            call.tie(ids, value.ids)
        return call.output(ids, zero=zero)
    call.freeze_inputs("concatenates across channels")
    return call.untracked()
