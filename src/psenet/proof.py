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

from psenet.errors import first_line
from psenet.inputs import Inputs, as_arguments, map_samples, map_tensors, tensors_in
from psenet.parallel.skeleton import ParallelSkeleton
from psenet.slicing import load_slices, narrow_attributes, narrow_module, slice_state, sliced_shapes, state_of
from psenet.space import WidthSpace
from psenet.widths import Widths

TOLERANCE = 1e-3


def broken_groups(
    model: nn.Module,
    example: Inputs,
    build: Callable[[dict[str, str]], WidthSpace],
    *,
    also_in_training: bool = False,
) -> dict[str, str]:
    """Find the groups that cannot be shrunk.

    All groups are first shrunk together; only if that fails, half of them, and so on down to single groups, each beside
    those already proved: a few broken groups among many cost a few runs.

    Args:
        model: The full-width module.
        example: Its example input.
        build: Makes the space with some groups frozen, name to reason.
        also_in_training: The model runs other modules in training: narrow ones must then run in that mode, too.

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
        subnets = [space.smallest(), space.sample(rng), _staggered(space), _alternating(space)]
        failure = _failure(lively, space, example, subnets)
        if failure is None and also_in_training:
            failure = _failure_in_training(lively, space, example, subnets)
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


def _staggered(space: WidthSpace) -> Widths:
    """Return widths that differ between groups of one kind, so that a number that stands for several is found out."""
    seen: dict[tuple[int, ...], int] = {}
    widths = {}
    for group in space.groups:
        number = seen[group.choices] = seen.get(group.choices, -1) + 1
        widths[group.name] = group.choices[number % len(group.choices)]
    return Widths(widths)


def _alternating(space: WidthSpace) -> Widths:
    """Return every second group at its full width, the others at their smallest.

    In code a size may be a fraction of neighbouring groups together, which is right where all keep the same share.
    """
    return Widths({group.name: group.choices[-(number % 2)] for number, group in enumerate(space.groups)})


def _failure(model: nn.Module, space: WidthSpace, example: Inputs, subnets: Sequence[Widths]) -> str | None:
    """Return why some of the subnets do not work, or None if narrow and masked agree."""
    if not space.groups:
        return None
    n = len(subnets)
    x = _varied(example, n)
    masked = _outputs(ParallelSkeleton(model, space, space.full()), model, x, subnets)
    if isinstance(masked, str):
        return f"the model does not run several samples at once: {masked}"
    for number, widths in enumerate(subnets):
        narrow = _narrowed(model, space, widths)
        try:
            with torch.no_grad():
                own = map_tensors(lambda tensor, number=number: tensor[number::n].clone(), x)
                alone = tensors_in(narrow.eval()(*as_arguments(own)))
        except Exception as error:  # the user's forward may raise anything
            return f"the model's own code fails when it is narrower: {first_line(error)}"
        problem = _difference(alone, _part(masked, number, space, n, training=False))
        if problem is not None:
            return problem
    return None


def _varied(example: Inputs, n: int) -> Inputs:
    """Return different samples like the example's, two for each of n subnets."""
    generator = torch.Generator().manual_seed(0)

    def vary(tensor: torch.Tensor) -> torch.Tensor:
        x = torch.cat([tensor] * (2 * n))[: 2 * n]
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
            x = x + noise * (x.std() + 1)
        return x

    return map_tensors(vary, example)


def _part(
    outputs: Sequence[torch.Tensor], number: int, space: WidthSpace, n: int, *, training: bool
) -> list[torch.Tensor]:
    """Return one subnet's part of the outputs for all; what does not depend on the samples is everybody's."""
    without = space.wiring.outputs_without_samples(training=training)
    return map_samples(lambda out: out[number::n], list(outputs), without)


def _difference(narrow: Sequence[torch.Tensor], masked: Sequence[torch.Tensor]) -> str | None:
    """Return how the outputs differ, or None."""
    for out, expected in zip(narrow, masked, strict=True):
        if out.shape != expected.shape:
            return f"its output changes shape, {tuple(expected.shape)} to {tuple(out.shape)}, when it is narrower"
        if not out.is_floating_point():  # made by comparing numbers that may differ by rounding
            continue
        scale = expected.abs().max().clamp_min(1e-12)
        if not ((out - expected).abs().max() <= TOLERANCE * scale):  # also when NaN
            return "the narrower model computes something else than the masked one"
    return None


def _failure_in_training(model: nn.Module, space: WidthSpace, example: Inputs, subnets: Sequence[Widths]) -> str | None:
    """Return why narrow or masked models fail or differ in training mode, or None.

    What a model gives there may be random; then it only has to run.
    """
    n = len(subnets)
    x = _varied(example, n)
    skeleton = ParallelSkeleton(model, space, space.full())
    skeleton.module.train()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            before = _random_states()
            together = tensors_in(skeleton(state_of(model), map_tensors(torch.clone, x), subnets))
            draws = any(not torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True))
            for number, widths in enumerate(subnets):
                own = map_tensors(lambda tensor, number=number: tensor[number::n], x)
                alone, again = (
                    tensors_in(_narrowed(model, space, widths).train()(*as_arguments(map_tensors(torch.clone, own))))
                    for _ in range(2)
                )
                # Two runs alone do not tell: what is rarely dropped may be dropped in the other pass only.
                if not draws and all(torch.equal(one, other) for one, other in zip(alone, again, strict=True)):
                    problem = _difference(alone, _part(together, number, space, n, training=True))
                    if problem is not None:
                        return f"in training {problem}"
    except Exception as error:  # the user's forward may raise anything
        return f"the model's own code fails in training when it is narrower: {first_line(error)}"
    return None


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _narrowed(model: nn.Module, space: WidthSpace, widths: Widths) -> nn.Module:
    state = state_of(model)
    attributes = narrow_attributes(model, space, widths)
    narrow = narrow_module(model, sliced_shapes(state, space, widths), attributes=attributes)
    load_slices(narrow, slice_state(state, space, widths))
    return narrow


def _outputs(
    skeleton: ParallelSkeleton, model: nn.Module, x: Inputs, subnets: Sequence[Widths]
) -> list[torch.Tensor] | str:
    skeleton.module.eval()
    try:
        with torch.no_grad():
            copies = map_tensors(torch.clone, x)  # the forward may change them
            return tensors_in(skeleton(state_of(model), copies, subnets))
    except Exception as error:  # the user's forward may raise anything
        return first_line(error)


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
