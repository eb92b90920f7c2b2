"""Proof by running: a group is offered only if shrinking it gives what masking it gives.

Two independent ways to drop channels must agree: the plain narrow module (slices, no masks) and the parallel pass at
full width (masks, no slices), several subnets at once. A wrong rule, a hard-coded size in the user's code or a
reduction that depends on the channel count makes them differ, or makes the narrow module fail.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from psenet.parallel.skeleton import ParallelSkeleton
from psenet.slicing import load_slices, narrow_attributes, narrow_module, slice_state, sliced_shapes, state_of
from psenet.space import WidthSpace
from psenet.widths import Widths

TOLERANCE = 1e-3


def broken_groups(
    model: nn.Module, example: torch.Tensor, build: Callable[[dict[str, str]], WidthSpace]
) -> dict[str, str]:
    """Find the groups that cannot be shrunk.

    All groups are first shrunk together; only if that fails, half of them, and so on down to single groups, each beside
    those already proved: a few broken groups among many cost a few runs.

    Args:
        model: The full-width module.
        example: Its example input.
        build: Makes the space with some groups frozen, name to reason.

    Returns:
        The groups to freeze, name to reason.
    """
    lively = _enlivened(model)
    rng = np.random.default_rng(0)
    names = [group.name for group in build({}).groups]
    reasons = dict.fromkeys(names, "not proved yet")

    def prove(some: Sequence[str]) -> None:
        rest = {name: reason for name, reason in reasons.items() if name not in some}
        space = build(rest)
        failure = _failure(lively, space, example, [space.smallest(), space.sample(rng)])
        if failure is None:
            for name in some:
                del reasons[name]
        elif len(some) == 1:
            reasons[some[0]] = failure
        else:
            prove(some[: len(some) // 2])
            prove(some[len(some) // 2 :])

    if names:
        prove(names)
    return reasons


def _failure(model: nn.Module, space: WidthSpace, example: torch.Tensor, subnets: Sequence[Widths]) -> str | None:
    """Return why some of the subnets do not work, or None if narrow and masked agree."""
    if not space.groups:
        return None
    n = len(subnets)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([example] * (2 * n))[: 2 * n]
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
        x = x + noise * (x.std() + 1)
    masked = _outputs(ParallelSkeleton(model, space, space.full(), num_subnets=n), model, x, subnets)
    if isinstance(masked, str):
        return f"the model does not run several samples at once: {masked}"
    for number, widths in enumerate(subnets):
        state = state_of(model)
        attributes = narrow_attributes(model, space, widths)
        narrow = narrow_module(model, sliced_shapes(state, space, widths), attributes=attributes)
        load_slices(narrow, slice_state(state, space, widths))
        try:
            with torch.no_grad():
                alone = _tensors(narrow.eval()(x[number::n].clone()))
        except Exception as error:  # the user's forward may raise anything
            return f"the model's own code fails when it is narrower: {_first_line(error)}"
        for out, expected in zip(alone, masked, strict=True):
            expected = expected[number::n]
            if out.shape != expected.shape:
                return f"its output changes shape, {tuple(expected.shape)} to {tuple(out.shape)}, when it is narrower"
            if not out.is_floating_point():  # made by comparing numbers that may differ by rounding
                continue
            scale = expected.abs().max().clamp_min(1e-12)
            if not ((out - expected).abs().max() <= TOLERANCE * scale):  # also when NaN
                return "the narrower model computes something else than the masked one"
    return None


def _outputs(
    skeleton: ParallelSkeleton, model: nn.Module, x: torch.Tensor, subnets: Sequence[Widths]
) -> list[torch.Tensor] | str:
    skeleton.module.eval()
    try:
        with torch.no_grad():
            return _tensors(skeleton(state_of(model), x.clone(), subnets))  # the forward may change it
    except Exception as error:  # the user's forward may raise anything
        return _first_line(error)


def _enlivened(model: nn.Module) -> nn.Module:
    """Return a copy in which every channel matters: constant tensors (zero-initialised norms, ...) vary."""
    lively = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in state_of(lively).items():
            if tensor.is_floating_point() and tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
                random = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.copy_(random * 0.2 if name.endswith(("bias", "running_mean")) else random + 0.5)
    return lively


def _tensors(output: object) -> list[torch.Tensor]:
    leaves = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
