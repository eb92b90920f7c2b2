"""Ops on space, not on channels: pooling, resizing, means."""

from dataclasses import replace

import numpy as np

from psenet.tracing.call import Call
from psenet.tracing.facts import Value
from psenet.tracing.rules.registry import rule


@rule(
    *(f"aten.{kind}_pool{rank}d.default" for kind in ("avg", "max", "adaptive_avg") for rank in (1, 2, 3)),
    "aten.upsample_nearest2d.vec",
    "aten.upsample_bilinear2d.vec",
    "aten.upsample_bicubic2d.vec",
    "aten.upsample_nearest1d.vec",
    "aten.upsample_linear1d.vec",
    "aten.upsample_nearest3d.vec",
    "aten.upsample_trilinear3d.vec",
    "aten._upsample_bilinear2d_aa.vec",
    "aten.reflection_pad2d.default",
    "aten.replication_pad2d.default",
)
def pool(call: Call) -> Value:
    value = call.value(call.node.args[0])
    ids = value.axis_ids(1)
    if ids is None or len(call.shape) != len(value.shape):
        call.freeze_inputs("channels are not on axis 1")
        return call.untracked()
    return call.along(1, ids, zero=value.zero)


@rule("aten.adaptive_max_pool2d.default", "aten.max_pool2d_with_indices.default")
def pool_with_indices(call: Call) -> tuple[Value, ...]:
    value = pool(call)
    assert isinstance(value, Value)
    (_, (_, itemsize)) = call.results()
    return value, replace(value, itemsize=itemsize)


_REDUCTIONS = (
    *("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default"),
    *("aten.var.dim", "aten.var.correction", "aten.std.dim", "aten.std.correction", "aten.linalg_vector_norm.default"),
)


@rule(*_REDUCTIONS)
def reduce(call: Call) -> Value:
    return _reduced(call)


@rule("aten.max.dim", "aten.min.dim")
def extreme(call: Call) -> tuple[Value, ...]:
    value = _reduced(call)
    (_, (_, itemsize)) = call.results()
    if not value.tracked() and any(user.args[1] == 1 and user.users for user in call.node.users):
        call.freeze_inputs("says which channel is the largest")  # and counts the channels for that
    return value, replace(value, itemsize=itemsize)


def _reduced(call: Call) -> Value:
    value, given = call.value(call["self"]), call["dim"]
    given = [given] if isinstance(given, int) else given
    rank = len(value.shape)
    axes = {axis % rank for axis in (range(rank) if given in (None, []) else given)}
    varying = [axis for axis in axes if value.ids.shape[axis] > 1]
    along = value.axis_ids(varying[0]) if varying else None
    if along is not None:  # of the kept channels alone
        call.needs_mask(along, varying[0] - rank, "op")
        return call.untracked()
    if varying:
        call.freeze_inputs("reduces over channels")
        return call.untracked()
    ids = value.ids if call["keepdim"] else np.squeeze(value.ids, tuple(axes))
    return call.output(ids, zero=value.zero)


@rule("aten.flip.default", "aten.roll.default")
def move(call: Call) -> Value:
    value = call.value(call["self"])
    rank = len(value.shape)
    if not call["dims"] or any(axis % rank == 0 or value.ids.shape[axis % rank] > 1 for axis in call["dims"]):
        call.freeze_inputs("moves channels")
        return call.untracked()
    return call.output(value.ids, zero=value.zero)
