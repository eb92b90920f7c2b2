"""Normalisation: statistics over the kept channels only."""

import numpy as np

from psenet.tracing.call import Call
from psenet.tracing.facts import NO_CHANNEL, Value
from psenet.tracing.rules.registry import rule


@rule("aten.batch_norm.default")
def batch_norm(call: Call) -> Value:
    value = call.value(call["input"])
    if not call.depends_on_input:  # standardises weights
        return call.untracked()
    ids = value.axis_ids(1)
    if ids is None:
        call.freeze(value.ids, "channels are not on axis 1")
        ids = np.full(value.shape[1], NO_CHANNEL, np.int64)
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.follow(call[name], [ids])
    call.constant(len(ids), ids)
    # Also where nothing varies: statistics are per subnet.
    call.needs_mask(ids, 1, "norm")
    return call.along(1, ids, zero=True)


@rule("aten.instance_norm.default")
def instance_norm(call: Call) -> Value:
    value = call.value(call["input"])
    ids = call.channels(value)
    if ids is None:
        return call.untracked()
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.follow(call[name], [ids])
    call.constant(len(ids), ids)
    # Running statistics move a dropped channel away from zero as a bias does.
    return call.along(1, ids, zero=value.zero and call["bias"] is None and call["use_input_stats"])


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def layer_norm(call: Call) -> Value:
    value, shape = call.value(call["input"]), call["normalized_shape"]
    axis = _channel_axis(value)
    if axis is None or axis < len(value.shape) - len(shape):
        # No channel is among the normalised axes: every channel has statistics of its own.
        for name in ("weight", "bias"):
            call.follow(call.arguments.get(name), [None] * len(shape))
        return call.output(value.ids, zero=False)
    ids = value.axis_ids(axis)
    assert ids is not None
    axes = [ids if axis == len(value.shape) - len(shape) + number else None for number in range(len(shape))]
    for name in ("weight", "bias"):
        call.follow(call.arguments.get(name), axes)
    call.constant(shape[axis - len(value.shape)], ids)
    call.needs_mask(ids, axis - len(value.shape), "op")
    return call.along(axis, ids, zero=True)


@rule("aten.group_norm.default")
def group_norm(call: Call) -> Value:
    value, num_groups = call.value(call["input"]), call["num_groups"]
    ids = call.channels(value)
    if ids is None:
        return call.untracked()
    for name in ("weight", "bias"):
        call.follow(call[name], [ids])
    if num_groups == 1:
        call.needs_mask(ids, 1, "op")
        return call.along(1, ids, zero=True)
    # A norm-group lives and dies as a whole, so that the statistics of the others stay what they were.
    ids_GC = ids.reshape(num_groups, -1)
    call.tie(ids_GC[:, :1], ids_GC)
    call.constant(num_groups, ids_GC[:, 0])
    return call.along(1, ids, zero=value.zero and call["bias"] is None)


def _channel_axis(value: Value) -> int | None:
    """Return the one axis that carries channels; None without one."""
    axes = [axis for axis, size in enumerate(value.ids.shape) if size > 1]
    return axes[0] if len(axes) == 1 else None
