"""`trace`: read a model, group its channels, prove every group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.func import functional_call

from psenet.errors import InputError
from psenet.proof import broken_groups
from psenet.slicing import state_of
from psenet.space import WidthSpace
from psenet.tracing.facts import Reading
from psenet.tracing.grouping import build_space
from psenet.tracing.reader import Reader
from psenet.tracing.rules import RULES


def trace(
    model: nn.Module,
    example_input: torch.Tensor,
    *,
    divisor: int = 8,
    min_ratio: float = 0.25,
    keep_ratios: Sequence[float] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> WidthSpace:
    """Find the channel groups of a model.

    Args:
        model: Any traceable CNN. It is not changed; it is read in eval mode.
        example_input: A batch of at least one sample, shape (B, ...).
        divisor: Widths are multiples of this many channels, and the full size. Channels that only live and die in
            blocks make multiples of the least number of blocks that has so many channels.
        min_ratio: The smallest width as a share of a group's size, above 0 and at most 1.
        keep_ratios: Fix the choices to these shares of each group's size instead; `divisor` and `min_ratio` then have
            no effect.
        include: Only groups with a layer whose path matches one of these patterns (`"layer1.*"`) vary. None: all.
        exclude: Groups with a layer whose path matches one of these patterns never vary. None: none.

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
    reading = read(model, example_input)

    def choices(size: int, unit: int) -> tuple[int, ...]:
        if keep_ratios is not None:
            return tuple(sorted({*(max(unit, round(ratio * size / unit) * unit) for ratio in keep_ratios), size}))
        step = divisor if divisor % unit == 0 else unit * -(-divisor // unit)
        return tuple(width for width in range(step, size, step) if width / size >= min_ratio) + (size,)

    def build(frozen_groups: dict[str, str]) -> WidthSpace:
        return build_space(
            reading, choices, frozen_groups={**left_out, **frozen_groups}, batch_size=example_input.shape[0]
        )

    left_out: dict[str, str] = {}
    left_out = _left_out(build({}), include, exclude)
    with _evaluating(model):
        broken = broken_groups(model, example_input.detach(), build)
    space = build(broken)
    if not space.groups:
        reasons = "; ".join(f"{frozen.layer}: {frozen.reason}" for frozen in space.frozen[:8])
        raise InputError(f"this model has no width that could vary. What froze it: {reasons or 'it has no layers'}")
    return space


def read(model: nn.Module, example_input: torch.Tensor) -> Reading:
    """Export the model's graph and walk it with the rules.

    Raises:
        TypeError: Not a module, or the example is not a tensor.
        InputError: The model refuses the example or cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"trace needs a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(example_input, torch.Tensor):
        raise TypeError(f"example_input must be a tensor of shape (B, ...); got {type(example_input).__name__}")
    if example_input.ndim < 2 or example_input.shape[0] < 1:
        raise InputError(f"example_input must be a batch of samples, shape (B, ...); got {tuple(example_input.shape)}")
    with _evaluating(model):
        try:
            with torch.no_grad():
                # On copies: the user's forward may count in its buffers or change its input in place.
                buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
                functional_call(model, buffers, (example_input.clone(),))
        except Exception as error:  # the user's forward may raise anything
            shape = tuple(example_input.shape)
            raise InputError(f"the model refuses an input of shape {shape}: {type(error).__name__}: {error}") from error
        try:
            program = torch.export.export(model, (example_input,), strict=False)
        except Exception as error:  # torch.export raises many private types
            raise InputError(f"the model cannot be traced by torch.export: {type(error).__name__}: {error}") from error
    same_tensor, same_module = _ties(model)
    reading = Reader(program, RULES, same_tensor=same_tensor, same_module=same_module).read()
    for alias in same_tensor.keys() & state_of(model).keys():
        if same_tensor[alias] in reading.axes:
            reading.axes[alias] = reading.axes[same_tensor[alias]]
            reading.shapes[alias] = reading.shapes[same_tensor[alias]]
    reading.params = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return reading


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
