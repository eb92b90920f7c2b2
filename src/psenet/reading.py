"""`trace`: read a model, group its channels, prove every group."""

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from psenet.errors import InputError, first_line
from psenet.evaluate import eval_mode
from psenet.inputs import Inputs, map_tensors, num_samples, tensors_in
from psenet.proof import broken_groups
from psenet.slicing import narrow_module, state_of
from psenet.space import WidthSpace
from psenet.tracing.capture import capture, what_runs
from psenet.tracing.facts import Reading
from psenet.tracing.grouping import Choices, build_space
from psenet.tracing.opaque import opaque_modules
from psenet.tracing.reader import Reader
from psenet.tracing.rules import RULES
from psenet.tracing.samples import norms_in_order


def trace(
    model: nn.Module,
    example_input: Inputs,
    *,
    divisor: int = 8,
    min_ratio: float = 0.25,
    keep_ratios: Sequence[float] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    opaque: Sequence[str] = (),
) -> WidthSpace:
    """Find the channel groups of a model.

    Args:
        model: Any traceable CNN. It is not changed; it is read in eval mode.
        example_input: A batch of at least one sample, shape (B, ...), or a tuple of the model's arguments: tensors with
            the samples on axis 0, or dicts, lists and tuples of them.
        divisor: Widths are multiples of this many channels, and the full size. Channels that only live and die in
            blocks make multiples of the least number of blocks that has so many channels.
        min_ratio: The smallest width as a share of a group's size, above 0 and at most 1.
        keep_ratios: Fix the choices to these shares of each group's size instead; `divisor` and `min_ratio` then have
            no effect.
        include: Only groups with a layer whose path matches one of these patterns (`"layer1.*"`) vary. None: all.
        exclude: Groups with a layer whose path matches one of these patterns never vary. None: none.
        opaque: Modules whose path matches one of these patterns are not read at all (control flow that depends on the
            data, say); what they take and give keeps its full width.

    Returns:
        The width space. Every group in it was proved: shrinking it gives what masking it gives.

    Raises:
        TypeError: Not a module, or the example is not a tensor.
        InputError: A setting is out of range, the model refuses the example, cannot be traced, or has nothing to vary.

    Example:
        >>> import psenet, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3))
        >>> space = psenet.trace(model, torch.randn(1, 3, 8, 8))
        >>> [(group.name, group.choices) for group in space.groups]
        [('0', (8, 16, 24, 32))]
    """
    _check_settings(divisor, min_ratio, keep_ratios)
    reading = read(model, example_input, opaque=opaque)

    def choices(size: int, unit: int) -> tuple[int, ...]:
        if keep_ratios is not None:
            return tuple(sorted({*(max(unit, round(ratio * size / unit) * unit) for ratio in keep_ratios), size}))
        step = divisor if divisor % unit == 0 else unit * -(-divisor // unit)
        return tuple(width for width in range(step, size, step) if width / size >= min_ratio) + (size,)

    def left_out(space: WidthSpace) -> dict[str, str]:
        return _left_out(space, include, exclude)

    space, broken = _proved(model, example_input, reading, choices, left_out)
    if broken and reading.fractions:
        tied = replace(reading, ties=[*reading.ties, *reading.fractions])
        with_ties, _ = _proved(model, example_input, tied, choices, left_out)
        space = min(space, with_ties, key=lambda found: found.macs(found.smallest()))
    if not space.groups:
        _check_finite(model)
        reasons = "; ".join(f"{frozen.layer}: {frozen.reason}" for frozen in space.frozen[:8])
        raise InputError(f"this model has no width that could vary. What froze it: {reasons or 'it has no layers'}")
    return space


def read(model: nn.Module, example_input: Inputs, *, opaque: Sequence[str] = ()) -> Reading:
    """Export the model's graph and walk it with the rules.

    A model that runs other code in training than in evaluation (auxiliary heads, stochastic depth) is read in both
    modes: channels must be able to vary in both, and costs are those of evaluation.

    Raises:
        TypeError: Not a module, or the example has no tensor.
        InputError: The model refuses the example or cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"trace needs a torch.nn.Module; got {type(model).__name__}")
    if not tensors_in(example_input):
        raise TypeError(f"example_input must be a tensor of shape (B, ...); got {type(example_input).__name__}")
    shape = tuple(tensors_in(example_input)[0].shape)
    if len(shape) < 2 or shape[0] < 1:
        raise InputError(f"example_input must be a batch of samples, shape (B, ...); got {shape}")
    num_samples(example_input)
    _check_can_be_copied(model)
    paths = _paths_of(model, opaque)
    if paths:
        model = copy.deepcopy(model)
    same_tensor, same_module = _ties(model)
    reading = Reading()
    in_order = functools.cache(lambda: norms_in_order(model, example_input))

    def walk(inputs: Inputs, *, counts: bool) -> set[str]:
        with opaque_modules(model, paths, inputs) as ran:
            program = capture(model, inputs)
            reader = Reader(
                program, RULES, reading, same_tensor=same_tensor, same_module=same_module, in_order=in_order
            )
            reader.read(counts=counts)
            reading.constant_outputs[model.training] = reader.constant_outputs()
        return ran

    with eval_mode(model):
        evaluated = what_runs(model, example_input)
        ran = walk(example_input, counts=True)
        model.train()
        pair = map_tensors(lambda tensor: torch.cat([tensor, tensor]), example_input)  # batch norms want two samples
        with suppress(InputError):  # one that wants more than the example in training (targets) is read as it evaluates
            reading.trains_differently = what_runs(model, pair) != evaluated
        if reading.trains_differently:
            ran |= walk(pair, counts=False)
    if len(ran) < len(paths):
        idle = ", ".join(sorted(set(paths) - ran))
        raise InputError(f"opaque: {idle} is not run by the model's forward")
    for alias in same_tensor.keys() & state_of(model).keys():
        if same_tensor[alias] in reading.axes:
            reading.axes[alias] = reading.axes[same_tensor[alias]]
            reading.shapes[alias] = reading.shapes[same_tensor[alias]]
    reading.params = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return reading


def _check_finite(model: nn.Module) -> None:
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise InputError(
            f"the model's weights must be finite; these hold NaN or infinity: {', '.join(broken[:8])}"
            + f" and {len(broken) - 8} more" * (len(broken) > 8)
        )


def _proved(
    model: nn.Module,
    example_input: Inputs,
    reading: Reading,
    choices: Choices,
    left_out: Callable[[WidthSpace], dict[str, str]],
) -> tuple[WidthSpace, dict[str, str]]:
    """Return the space of a reading without the groups that cannot be shrunk, and why they cannot, by name."""
    never_varied: dict[str, str] = {}
    built: dict[frozenset[tuple[str, str]], WidthSpace] = {}

    def build(frozen_groups: dict[str, str]) -> WidthSpace:
        frozen = {**never_varied, **frozen_groups}
        key = frozenset(frozen.items())
        if key not in built:  # asked for again and again where nothing is broken
            built[key] = build_space(reading, choices, frozen_groups=frozen, batch_size=num_samples(example_input))
        return built[key]

    never_varied |= left_out(build({}))
    with eval_mode(model):
        broken = broken_groups(
            model, map_tensors(torch.detach, example_input), build, also_in_training=reading.trains_differently
        )
    return build(broken), broken


def _check_can_be_copied(model: nn.Module) -> None:
    try:
        narrow_module(model, {}, device="meta")
    except Exception as error:  # an attribute's own copying may raise anything
        raise InputError(
            f"the model cannot be copied ({first_line(error)}), and psenet works on copies: keep what copy.deepcopy "
            "refuses (locks, open files, tensors computed with gradients) out of its attributes"
        ) from error


def _paths_of(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the outermost modules that match."""
    names = [path for path, _ in model.named_modules() if path]
    idle = [pattern for pattern in patterns if not _matches(names, [pattern])]
    if idle:
        raise InputError(f"opaque: no module matches {idle}; modules are named like {names[:3]}")
    found = [name for name in names if _matches([name], patterns)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _ties(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Return the first name of every tensor and of every module that has several, by each further name."""
    tensors: dict[int, str] = {}
    modules: dict[int, str] = {}
    same_tensor, same_module = {}, {}
    for path, module in model.named_modules(remove_duplicate=False):
        if modules.setdefault(id(module), path) != path:
            same_module[path] = modules[id(module)]
        for local, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            name = f"{path}.{local}" if path else local
            if tensors.setdefault(id(tensor), name) != name:
                same_tensor[name] = tensors[id(tensor)]
    return same_tensor, same_module


def _left_out(space: WidthSpace, include: Sequence[str] | None, exclude: Sequence[str] | None) -> dict[str, str]:
    """Return the groups that the user's patterns leave out, name to reason."""
    reasons = {}
    for group in space.groups:
        if include is not None and not _matches(group.layers, include):
            reasons[group.name] = "not included"
        if exclude is not None and _matches(group.layers, exclude):
            reasons[group.name] = "excluded"
    every_layer = [layer for group in space.groups for layer in group.layers]
    for option, patterns in (("include", include), ("exclude", exclude)):
        idle = [pattern for pattern in patterns or () if not _matches(every_layer, [pattern])]
        if idle:
            raise InputError(f"{option}: no elastic layer matches {idle}; layers are named like {every_layer[:3]}")
    return reasons


def _matches(layers: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for layer in layers for pattern in patterns)


def _check_settings(divisor: int, min_ratio: float, keep_ratios: Sequence[float] | None) -> None:
    problems = []
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        problems.append(f"divisor must be a positive integer; got {divisor!r}")
    if not 0 < min_ratio <= 1:
        problems.append(f"min_ratio must be above 0 and at most 1; got {min_ratio!r}")
    if keep_ratios is not None and (not keep_ratios or not all(0 < ratio <= 1 for ratio in keep_ratios)):
        problems.append(f"keep_ratios must be numbers above 0 and at most 1; got {keep_ratios!r}")
    if problems:
        raise InputError("; ".join(problems))
