"""Elementwise ops: channels pass on, and those that meet are tied."""

import numpy as np
import torch

from psenet.tracing.call import Call
from psenet.tracing.facts import NO_CHANNEL, Value
from psenet.tracing.rules.registry import rule


@rule(
    *(
        f"aten.{name}.default"
        for name in (
            "abs alias celu clone contiguous detach dropout elu erf exp feature_dropout floor gelu hardsigmoid "
            "hardswish hardtanh leaky_relu lift_fresh_copy log_sigmoid mish neg reciprocal relu relu6 round rsqrt selu "
            "sigmoid sign silu softplus sqrt square tanh"
        ).split()
    ),
    "aten.pow.Tensor_Scalar",
    "aten.add.Scalar",
    "aten.sub.Scalar",
    "aten.mul.Scalar",
    "aten.div.Scalar",
    "aten.rsub.Scalar",
    "aten.clamp.default",
    "aten.clamp_min.default",
    "aten.clamp_max.default",
    "aten.to.dtype",
    "aten.to.dtype_layout",
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


@rule("aten._assert_tensor_metadata.default")
def assertion(call: Call) -> Value:
    """Stands before every conversion of the type and says nothing about channels."""
    return call.untracked()


@rule(
    *(f"aten.new_{kind}.default" for kind in ("empty", "zeros", "ones", "full")),
    *(f"aten.{kind}.default" for kind in ("zeros", "ones", "full", "rand", "randn", "arange")),
    *("aten.empty.memory_format", "aten.scalar_tensor.default"),
)
def make(call: Call) -> Value:
    """A new tensor: its size is written in the user's code."""  # noqa: D401
    return call.untracked()


@rule(
    *(f"aten.{kind}.default" for kind in ("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like")),
    *("aten.full_like.default", "aten.bernoulli.default", "aten.bernoulli.p", "aten.bernoulli_.float"),
    *("aten.uniform_.default", "aten.normal_.default"),
)
def fill(call: Call) -> Value:
    """Numbers that have nothing to do with what was there."""
    value = call.value(call.node.args[0])
    return call.output(value.ids, zero=False)


@rule("aten.add.Tensor", "aten.sub.Tensor", "aten.maximum.default", "aten.minimum.default")
def add(call: Call) -> Value:
    a, b = call.value(call.node.args[0]), call.value(call.node.args[1])
    return call.output(meet(call, a, b), zero=_zero_at(a) and _zero_at(b))


@rule("aten.mul.Tensor")
def multiply(call: Call) -> Value:
    a, b = call.value(call["self"]), call.value(call["other"])
    return call.output(meet(call, a, b), zero=_zero_at(a) or _zero_at(b))


@rule("aten.addcmul.default")
def add_product(call: Call) -> Value:
    start, a, b = (call.value(call[name]) for name in ("self", "tensor1", "tensor2"))
    product = call.output(meet(call, a, b), zero=_zero_at(a) or _zero_at(b))
    return call.output(meet(call, start, product), zero=_zero_at(start) and product.zero)


@rule("aten.div.Tensor")
def divide(call: Call) -> Value:
    a, b = call.value(call["self"]), call.value(call["other"])
    if b.tracked():  # a dropped divisor is zero, and 0 / 0 is not
        call.freeze_inputs("divides by channels")
        return call.untracked()
    return call.output(meet(call, a, b), zero=a.zero)


@rule("aten.prelu.default")
def prelu(call: Call) -> Value:
    value = call.value(call["self"])
    if call.value(call["weight"]).shape == (1,):
        return call.output(value.ids, zero=value.zero)
    ids = call.channels(value)
    if ids is None:
        return call.untracked()
    call.follow(call["weight"], [ids])
    return call.along(1, ids, zero=value.zero)


@rule("aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default")
def softmax(call: Call) -> Value:
    value = call.value(call["self"])
    if value.ids.ndim and value.ids.shape[call["dim"] % len(value.shape)] > 1:
        call.freeze_inputs("normalises over channels")
        return call.untracked()
    return call.output(value.ids, zero=False)


def _zero_at(value: Value) -> bool:
    """Tell whether a term is zero on its dropped channels."""
    return value.zero and value.tracked()


def meet(call: Call, a: Value, b: Value) -> np.ndarray:
    """Return the ids of two tensors broadcast together, tying those that meet."""
    a, b = call.claim(a, b), call.claim(b, a)
    rank = len(call.shape)
    a_ids, b_ids = (value.ids.reshape([1] * (rank - value.ids.ndim) + list(value.ids.shape)) for value in (a, b))
    for ids, other, value in ((a_ids, b_ids, b), (b_ids, a_ids, a)):
        more = rank - len(value.shape)
        sizes = [1] * more + list(value.shape)
        for axis in range(rank):
            if ids.shape[axis] > 1 and other.shape[axis] == 1 and sizes[axis] > 1:
                if axis - more in value.expanded:  # the same for every channel, however many there are
                    call.constant(sizes[axis], ids.reshape(-1))
                    continue
                call.freeze(ids, "meets a tensor of fixed size on its channel axis")
                call.freeze(other, "meets a tensor of fixed size on its channel axis")
                return np.full([1] * rank, NO_CHANNEL, np.int64)
    # Fixed channels that meet others pairwise freeze them: the narrower tensor would not fit.
    if not any(min(sizes) > 1 for sizes in zip(a_ids.shape, b_ids.shape, strict=True)):
        if (a_ids == NO_CHANNEL).all():
            return b_ids
        if (b_ids == NO_CHANNEL).all():
            return a_ids
    call.tie(a_ids, b_ids)
    a_ids, b_ids = np.broadcast_arrays(a_ids, b_ids)
    return np.where(a_ids != NO_CHANNEL, a_ids, b_ids)
