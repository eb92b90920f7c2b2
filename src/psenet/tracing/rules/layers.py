"""Layers with weights: convolutions and linear layers make channels."""

import numpy as np

from psenet.tracing.call import Call
from psenet.tracing.facts import NO_CHANNEL, Value
from psenet.tracing.layout import narrows_within_groups
from psenet.tracing.rules.registry import rule


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
    rank, groups = len(weight_shape) - 2, call["groups"]
    if rank == 1 and weight_shape[:2] == (1, 1) and value.ids.shape[-1] > 1:
        return _across_channels(call, value)
    in_ids = value.axis_ids(1)
    if in_ids is None or len(value.shape) != len(weight_shape):
        call.freeze(value.ids, "channels are not on axis 1 of a batch")
        in_ids = np.full(weight_shape[1] * groups, NO_CHANNEL, np.int64)
    scale, rest = int(np.prod(call.shape[2:]) * np.prod(weight_shape[2:])), [None] * rank
    if groups == 1:
        out_ids = call.fresh(weight_shape[0])
        call.follow(call["weight"], [out_ids, in_ids, *rest])
        call.count_macs(scale, in_ids, out_ids, out_ids)
        _read(call, value, in_ids, out_ids, 1)
        zero = False
    elif narrows_within_groups(groups, weight_shape[1]):
        in_ids, out_ids = _alike(call, in_ids, groups), _alike(call, call.fresh(weight_shape[0]), groups)
        call.follow(call["weight"], [out_ids, in_ids[: weight_shape[1]], *rest])
        call.count_macs(scale, in_ids[: weight_shape[1]], out_ids, out_ids)
        _read(call, value, in_ids, out_ids, 1)
        zero = False
    else:
        out_ids = _grouped(call, in_ids, groups, weight_shape[1], weight_shape[0] // groups)
        call.follow(call["weight"], [out_ids, None, *rest])
        call.count_macs(scale * weight_shape[1], None, out_ids, out_ids)
        if call.computed_from(call["weight"]):
            call.runs_alone(in_ids, out_ids, 1)
        # A dropped conv-group reads only dropped channels: zero in, zero out, unless a bias adds something.
        zero = value.zero and call["bias"] is None
    call.follow(call["bias"], [out_ids])
    return call.along(1, out_ids, zero=zero)


@rule("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(call: Call) -> Value:
    value, weight_shape = call.value(call["input"]), call.value(call["weight"]).shape
    rank, groups = len(weight_shape) - 2, call["groups"]
    in_ids = value.axis_ids(1)
    if in_ids is None or len(value.shape) != len(weight_shape):
        call.freeze(value.ids, "channels are not on axis 1 of a batch")
        in_ids = np.full(weight_shape[0], NO_CHANNEL, np.int64)
    # Every input pixel meets every weight once.
    scale, rest = int(np.prod(value.shape[2:]) * np.prod(weight_shape[2:])), [None] * rank
    if groups == 1:
        out_ids = call.fresh(weight_shape[1])
        call.follow(call["weight"], [in_ids, out_ids, *rest])
        call.count_macs(scale, in_ids, out_ids, out_ids)
        _read(call, value, in_ids, out_ids, 1)
        zero = False
    else:
        out_ids = _grouped(call, in_ids, groups, weight_shape[0] // groups, weight_shape[1])
        call.follow(call["weight"], [in_ids, None, *rest])
        call.count_macs(scale * weight_shape[1], None, in_ids, out_ids)
        zero = value.zero and call["bias"] is None
    call.follow(call["bias"], [out_ids])
    return call.along(1, out_ids, zero=zero)


@rule("aten.linear.default")
def linear(call: Call) -> Value:
    value, (num_out, num_in) = call.value(call["input"]), call.value(call["weight"]).shape
    in_ids = value.axis_ids(-1)
    if in_ids is None:
        call.freeze(value.ids, "channels are not on the last axis")
        in_ids = np.full(num_in, NO_CHANNEL, np.int64)
    out_ids = call.fresh(num_out)
    call.follow(call["weight"], [out_ids, in_ids])
    call.follow(call["bias"], [out_ids])
    call.count_macs(int(np.prod(call.shape[1:-1])), in_ids, out_ids, out_ids)
    _read(call, value, in_ids, out_ids, -1)
    return call.along(-1, out_ids, zero=False)


def _read(call: Call, value: Value, in_ids: np.ndarray, out_ids: np.ndarray, axis: int) -> None:
    """A layer mixes its input channels. One that computes its weights from a parameter does that for what is kept."""  # noqa: D401
    if call.computed_from(call["weight"]):
        call.runs_alone(in_ids, out_ids, axis)
    else:
        call.reads_across(value, in_ids, axis)


def _alike(call: Call, ids: np.ndarray, groups: int) -> np.ndarray:
    """Tie each channel to the one at its place in the other groups; return the ids with those of the first for all."""
    ids_GC = ids.reshape(groups, -1)
    call.tie(ids_GC[:1], ids_GC)
    return np.tile(ids_GC[0], groups)


def _grouped(call: Call, in_ids: np.ndarray, groups: int, in_per_group: int, out_per_group: int) -> np.ndarray:
    """Return the output ids of a grouped convolution: each conv-group lives and dies as a whole."""
    in_GI = in_ids.reshape(groups, in_per_group)
    if in_per_group > 1:
        call.tie(in_GI[:, :1], in_GI)
    out_ids = np.repeat(in_GI[:, 0], out_per_group)
    call.constant(groups, in_GI[:, 0])
    return out_ids


def _across_channels(call: Call, value: Value) -> Value:
    """A one-channel convolution that slides along the channels (ECA): neighbours beyond the last one count as zero,
    whether they are dropped or padding."""  # noqa: D205, D209
    ids = value.axis_ids(-1)
    pads = call["padding"] if isinstance(call["padding"], list | tuple) else [call["padding"]]
    if ids is None or pads[0] * 2 + 1 != call.value(call["weight"]).shape[-1] or call["stride"] not in ([1], (1,)):
        call.freeze_inputs("slides along the channels")
        return call.untracked()
    call.reads_across(value, ids, -1)
    call.keep_order(ids)
    call.count_macs(call.value(call["weight"]).shape[-1], None, ids, ids)
    return call.along(-1, ids, zero=False)
