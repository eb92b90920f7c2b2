"""Everything that must hold of a random network: what is asked of one seed, and what was found."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import psenet
from one_by_one import assert_costs, assert_equal_one_by_one
from psenet.errors import InputError
from psenet.inputs import tensors_in
from psenet.space import WidthSpace
from random_nets import RandomNet


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one seed.

    Attributes:
        refused: Why `trace` refused the net; empty if it did not.
        groups: The groups that it offers.
        frozen: Why layers are frozen, one reason a layer; those that every net must have, which make its outputs or
            have one channel, are left out.
        elastic_share: The share of the MACs of which at least one side can vary.
        deviation: The largest relative error of outputs and gradients.
    """

    refused: str = ""
    groups: int = 0
    frozen: tuple[str, ...] = ()
    elastic_share: float = 0.0
    deviation: float = 0.0


def check(seed: int) -> Finding:
    """Trace the random net of a seed and make sure that it keeps every guarantee.

    Raises:
        AssertionError: It does not; the message has the seed and the net.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = RandomNet(seed)
        try:
            return _checked(net, seed)
        except Exception as error:  # whatever it is, the seed must be named
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{net}") from error


def _checked(net: RandomNet, seed: int) -> Finding:
    divisor = random.Random(seed).choice([1, 2, 4])
    try:
        space = psenet.trace(net, net.batch(2), divisor=divisor)
    except InputError as error:
        return Finding(refused=str(error))
    assert all(frozen.layer and frozen.reason for frozen in space.frozen)
    supernet = psenet.Supernet(net, space)
    rng = np.random.default_rng(seed)
    widest = [space.sample(rng), space.full(), space.smallest()]
    lowest = [space.smallest(), space.sample(rng, space.uniform(0.5))]
    deviations = [
        assert_equal_one_by_one(supernet, net.batch(13), widest, training=True),
        assert_equal_one_by_one(supernet, net.batch(8), lowest, training=False),
        _from_the_right(supernet, net.batch(4), space.sample(rng)),
        _in_another_order(net, space, net.batch(4)),
    ]
    assert_costs(supernet, net.batch(2))
    return Finding(
        groups=len(space.groups),
        frozen=tuple(frozen.reason for frozen in space.frozen if not _needs_freezing(frozen.reason)),
        elastic_share=space.elastic_share(),
        deviation=max(deviations),
    )


def _needs_freezing(reason: str) -> bool:
    return reason in ("the model's output", "one channel cannot be fewer")


def _from_the_right(supernet: psenet.Supernet, x: torch.Tensor, widths: psenet.Widths) -> float:
    """Compare a pass on the last channels of every group with the plain module of them."""
    supernet.eval()
    with torch.no_grad():
        return _close(
            supernet(x, widths, from_right=True), supernet.subnet(widths, from_right=True)(x), "from the right"
        )


def _in_another_order(net: nn.Module, space: WidthSpace, x: torch.Tensor) -> float:
    """Sort the channels of every group by importance, which must not change the function."""
    with torch.no_grad():
        return _close(psenet.order_channels(net, space).eval()(x), net.eval()(x), "ordered by importance")


def _close(ours: object, expected: object, what: str) -> float:
    errors = [
        float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))
        for one, other in zip(tensors_in(ours), tensors_in(expected), strict=True)
    ]
    assert all(error <= 1e-9 for error in errors), f"{what}: relative errors {errors}"
    return max(errors)
