"""Re-arrangement: reshape, transpose, concatenate, cut, pad, shuffle.

Sizes in the user's code may be computed from shapes or written down as numbers; the graph does not tell. So every size
that counts channels is reported (`Call.constant`): a narrow module's attribute of that value follows it, and the proof
tells whether the code works.
"""

from dataclasses import replace

import numpy as np

from psenet.tracing.call import Call
from psenet.tracing.facts import NO_CHANNEL, Value
from psenet.tracing.rules.registry import rule


@rule(
    "aten.flatten.using_ints",
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
    "aten.unflatten.int",
    "aten.reshape_as.default",
    "aten.view_as.default",
)
def reshape(call: Call) -> Value:
    value, shape = call.value(call.node.args[0]), call.shape
    if not value.tracked():
        return call.untracked()
    if not call.depends_on_input:
        ids = _compact(np.broadcast_to(value.ids, value.shape).reshape(shape))
        for axis in np.flatnonzero(np.array(ids.shape) > 1).tolist():
            call.constant(shape[axis], ids.reshape(-1))
        return call.output(ids, zero=value.zero)
    if not shape or not value.shape or shape[0] != value.shape[0] or value.ids.shape[0] != 1:
        call.freeze_inputs("moves the batch axis")
        return call.untracked()
    before = [axis for axis, size in enumerate(value.ids.shape) if size > 1]
    ids = _compact(np.broadcast_to(value.ids[:1], (1, *value.shape[1:])).reshape(1, *shape[1:]))
    after = [axis for axis, size in enumerate(ids.shape) if size > 1]
    if len(after) > len(before):  # channels fall into equal parts: the longest axis varies, the others are fixed
        longest = max(after, key=lambda axis: (ids.shape[axis], axis))
        first = ids
        for axis in after:
            if axis != longest:
                first = first.take([0], axis)
        call.tie(first, ids)
        call.constant(ids.shape[longest], first.reshape(-1))
        ids = first
    return call.output(ids, zero=value.zero)


@rule("aten.permute.default", "aten.transpose.int")
def permute(call: Call) -> Value:
    value = call.value(call["self"])
    if "dims" in call.arguments:
        return call.output(value.ids.transpose(call["dims"]), zero=value.zero)
    return call.output(value.ids.swapaxes(call["dim0"], call["dim1"]), zero=value.zero)


@rule("aten.movedim.int", "aten.movedim.intlist", "aten.moveaxis.int", "aten.moveaxis.intlist")
def move_axes(call: Call) -> Value:
    value = call.value(call["self"])
    ids = value.ids.reshape([1] * (len(value.shape) - value.ids.ndim) + list(value.ids.shape))
    return call.output(np.moveaxis(ids, call["source"], call["destination"]), zero=value.zero)


@rule("aten.expand.default", "aten.expand_as.default")
def expand(call: Call) -> Value:
    value = call.value(call["self"])
    more = len(call.shape) - len(value.shape)
    ids = value.ids.reshape([1] * more + list(value.ids.shape))
    before = [1] * more + list(value.shape)
    expanded = tuple(axis for axis, size in enumerate(call.shape) if before[axis] == 1 and size > 1)
    return replace(call.output(ids, zero=value.zero), expanded=expanded)


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
        return call.output(_meeting(call, values), zero=zero)
    call.freeze_inputs("concatenates across channels")
    return call.untracked()


@rule("aten.stack.default")
def stack(call: Call) -> Value:
    values = [call.value(tensor) for tensor in call["tensors"]]
    ids = np.expand_dims(_meeting(call, values), call["dim"] % len(call.shape))
    return call.output(ids, zero=all(value.zero or not value.tracked() for value in values))


def _meeting(call: Call, values: list[Value]) -> np.ndarray:
    ids = next((value.ids for value in values if value.tracked()), values[0].ids)
    for value in values:
        call.tie(ids, value.ids)
    return ids


@rule("aten.slice.Tensor", "aten.narrow.default", "aten.select.int")
def cut(call: Call) -> Value:
    value = call.value(call["self"])
    axis = call["dim"] % len(value.shape)
    if call.op == "aten.select.int":
        ids = _part(call, value, axis, call["index"], call["index"] % value.shape[axis] + 1, 1)
        return call.output(np.squeeze(ids, axis), zero=value.zero)
    start = call["start"] or 0
    if call.op == "aten.narrow.default":
        return call.output(_part(call, value, axis, start, start + call["length"], 1), zero=value.zero)
    first, stop, step = slice(call["start"], call["end"], call["step"]).indices(value.shape[axis])
    return call.output(_part(call, value, axis, first, stop, step), zero=value.zero)


@rule("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int")
def split(call: Call) -> tuple[Value, ...]:
    value, results = call.value(call["self"]), call.results()
    axis = call["dim"] % len(value.shape)
    if call.op == "aten.unbind.int":
        pieces = [_part(call, value, axis, number, number + 1, 1) for number in range(len(results))]
        return tuple(
            Value(np.squeeze(ids, axis), shape, value.zero, itemsize)
            for ids, (shape, itemsize) in zip(pieces, results, strict=True)
        )
    sizes = [shape[axis] for shape, _ in results]
    ends = np.cumsum(sizes).tolist()
    pieces = [
        _part(call, value, axis, end - size, end, 1, constants=(size,)) for end, size in zip(ends, sizes, strict=True)
    ]
    if value.ids.shape[axis] > 1:
        call.constants(sizes, pieces)
    if value.ids.shape[axis] > 1 and len(set(sizes)) == 1:  # equal parts stay equal
        for piece in pieces[1:]:
            call.tie(pieces[0], piece)
    return tuple(
        Value(ids, shape, value.zero, itemsize) for ids, (shape, itemsize) in zip(pieces, results, strict=True)
    )


def _part(
    call: Call, value: Value, axis: int, first: int, stop: int, step: int, constants: tuple[int, ...] | None = None
) -> np.ndarray:
    """Return the ids of a part of an axis."""
    if axis == 0 and call.depends_on_input and (first, stop, step) != (0, value.shape[0], 1):
        call.freeze_inputs("cuts the batch axis")
        return np.full([1] * len(value.shape), NO_CHANNEL, np.int64)
    if value.ids.shape[axis] == 1:
        return value.ids
    along = value.axis_ids(axis)
    if along is not None:
        call.constant(len(along), along)  # the numbers may be fractions of it
        if step == 1:
            call.fraction(along, (first, stop))
        for number in (first, stop) if constants is None else constants:
            call.constant(number, along[first:stop] if constants is not None else along[:number])
    index: list[slice] = [slice(None)] * value.ids.ndim
    index[axis] = slice(first, stop, step)
    return value.ids[tuple(index)]


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(call: Call) -> Value:
    value, pads = call.value(call["self"]), call["pad"]
    ids, zero = value.ids, value.zero
    if call.arguments.get("mode", "constant") == "constant" and call["value"]:
        zero = False
    for number in range(len(pads) // 2):
        axis, before, after = len(value.shape) - 1 - number, pads[2 * number], pads[2 * number + 1]
        if ids.shape[axis] == 1 or before == after == 0:
            continue
        if min(before, after) < 0 or call.arguments.get("mode", "constant") != "constant":
            call.freeze_inputs("pads channels")
            return call.untracked()
        around = [(0, 0)] * ids.ndim
        around[axis] = (before, after)
        ids = np.pad(ids, around, constant_values=NO_CHANNEL)
    return call.output(ids, zero=zero)


@rule("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default")
def pixel_shuffle(call: Call) -> Value:
    value = call.value(call["self"])
    ids = call.channels(value)
    if ids is None:
        return call.untracked()
    if "unshuffle" in call.op:
        return call.along(1, np.repeat(ids, call["downscale_factor"] ** 2), zero=value.zero)
    ids_CR = ids.reshape(-1, call["upscale_factor"] ** 2)
    call.tie(ids_CR[:, :1], ids_CR)
    return call.along(1, ids_CR[:, 0], zero=value.zero)


@rule("aten.channel_shuffle.default")
def channel_shuffle(call: Call) -> Value:
    value, groups = call.value(call["self"]), call["groups"]
    ids = call.channels(value)
    if ids is None:
        return call.untracked()
    ids_GC = ids.reshape(groups, -1)
    call.tie(ids_GC[:1], ids_GC)
    return call.along(1, ids_GC.T.reshape(-1), zero=value.zero)


def _compact(ids: np.ndarray) -> np.ndarray:
    """Return ids of size 1 along every axis on which they do not change."""
    for axis in range(ids.ndim):
        first = ids.take([0], axis)
        if (ids == first).all():
            ids = first
    return ids
