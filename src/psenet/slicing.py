"""The one meaning of "narrower": slices of the full weights, and the same module tree with narrower shapes.

Extraction copies the slices into a narrow module; evaluation runs a narrow module on views; a training step runs one on
differentiable views. Nothing else in psenet narrows anything.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from psenet.space import WidthSpace
from psenet.tracing.layout import narrows_within_groups, segments
from psenet.widths import Widths

State = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Attributes = dict[str, dict[str, int | list[int]]]
"""By module path, the new values of its attributes; a list also stands for a tuple."""
Resizer = Callable[[nn.Module, Shapes], None]

_RESIZERS: dict[type[nn.Module], Resizer] = {}


def resizer(*layer_types: type[nn.Module]) -> Callable[[Resizer], Resizer]:
    """Register how the attributes of a layer type follow the new shapes of its own parameters.

    The function gets the layer (its tensors already narrow, its attributes still those of the full layer) and the new
    shapes by local name (`"weight"`). It runs for subclasses too, base classes first.

    Raises:
        ValueError: The layer type has a resizer already.
    """

    def register(function: Resizer) -> Resizer:
        for layer_type in layer_types:
            if layer_type in _RESIZERS:
                raise ValueError(f"{layer_type.__name__} has a resizer already")
            _RESIZERS[layer_type] = function
        return function

    return register


@resizer(nn.modules.conv._ConvNd)
def _resize_convolution(layer: nn.Module, shapes: Shapes) -> None:
    assert isinstance(layer, nn.modules.conv._ConvNd)
    out_channels, in_per_group = shapes["weight"][:2]
    if layer.transposed:
        in_channels, out_per_group = shapes["weight"][:2]
        layer.groups = layer.groups * in_channels // layer.in_channels if layer.groups > 1 else 1
        layer.in_channels, layer.out_channels = in_channels, out_per_group * layer.groups
        return
    if layer.groups > 1 and not narrows_within_groups(layer.groups, layer.in_channels // layer.groups):
        layer.groups = layer.groups * out_channels // layer.out_channels
    layer.out_channels, layer.in_channels = out_channels, in_per_group * layer.groups


@resizer(nn.Linear)
def _resize_linear(layer: nn.Module, shapes: Shapes) -> None:
    assert isinstance(layer, nn.Linear)
    layer.out_features, layer.in_features = shapes["weight"]


@resizer(nn.modules.batchnorm._NormBase)
def _resize_norm(layer: nn.Module, shapes: Shapes) -> None:
    assert isinstance(layer, nn.modules.batchnorm._NormBase)
    for name in ("weight", "running_mean"):
        if name in shapes:
            layer.num_features = shapes[name][0]


@resizer(nn.LayerNorm, nn.RMSNorm)
def _resize_layer_norm(layer: nn.Module, shapes: Shapes) -> None:
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    layer.normalized_shape = shapes["weight"]


@resizer(nn.GroupNorm)
def _resize_group_norm(layer: nn.Module, shapes: Shapes) -> None:
    assert isinstance(layer, nn.GroupNorm)
    (num_channels,) = shapes["weight"]
    if layer.num_groups > 1:  # groups live and die as a whole
        layer.num_groups = layer.num_groups * num_channels // layer.num_channels
    layer.num_channels = num_channels


@resizer(nn.PReLU)
def _resize_prelu(layer: nn.Module, shapes: Shapes) -> None:
    assert isinstance(layer, nn.PReLU)
    (layer.num_parameters,) = shapes["weight"]


def state_of(model: nn.Module) -> State:
    """Return every parameter and buffer of a module by name, themselves and not copies.

    Tied tensors come under each name; those of one module that stands in several places under its first path.
    """
    state: State = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for tensors in (module._parameters, module._buffers):
            state.update((prefix + name, tensor) for name, tensor in tensors.items() if tensor is not None)
    return state


def run_on_copied_buffers(model: nn.Module, arguments: Sequence[Any]) -> Any:
    """Return the model's outputs; what its forward writes into buffers (statistics, counters) is lost."""
    buffers = {name: tensor.clone() for name, tensor in state_of(model).items() if not isinstance(tensor, nn.Parameter)}
    # Each name comes with its copy; tying them would leave a copy in a module that stands in two places.
    return functional_call(model, buffers, tuple(arguments), tie_weights=False)


class SlicePlan:
    """What to take from every tensor of a model for one subnet; worked out once, applied at every step.

    Args:
        space: The width space of the model.
        widths: The subnet.
        names: The tensors that will be asked for; None for all.
        from_right: Keep the last channels of every group instead of the first.
    """

    def __init__(
        self,
        space: WidthSpace,
        widths: Widths,
        names: Collection[str] | None = None,
        *,
        from_right: bool = False,
    ) -> None:
        units = space.units(widths)
        self._cuts: dict[str, _Cuts] = {}
        for name, layouts in space.wiring.layouts.items():
            if names is not None and name not in names:
                continue
            pieces = [segments(layout, units, from_right=from_right) for layout in layouts]
            lengths = [sum(run.length for run in layout) for layout in layouts]
            cuts = [
                (axis, runs)
                for axis, (runs, length) in enumerate(zip(pieces, lengths, strict=True))
                if runs != [(0, length)]
            ]
            if cuts:
                self._cuts[name] = cuts

    def __call__(self, state: Mapping[str, torch.Tensor]) -> State:
        """Take from full-width tensors by name (see `state_of`) what the subnet keeps.

        Returns:
            The same names with narrower tensors: views wherever the kept channels stand in one piece, else
            concatenations of views; differentiable either way.
        """
        return {name: self._take(name, tensor) for name, tensor in state.items()}

    def _take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        cuts = self._cuts.get(name)
        if not cuts:
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            return _Take.apply(tensor, cuts)  # pyright: ignore[reportReturnType]
        return _take(tensor, cuts)


def slice_state(state: Mapping[str, torch.Tensor], space: WidthSpace, widths: Widths) -> State:
    """Apply a `SlicePlan` once."""
    return SlicePlan(space, widths)(state)


_Cuts = list[tuple[int, list[tuple[int, int]]]]
"""By axis, the pieces (start, length) that are kept."""


class _Take(torch.autograd.Function):
    """Slices of all axes at once: the gradient is filled with zeros once, not once for every axis."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, cuts: _Cuts) -> torch.Tensor:
        ctx.shape, ctx.cuts = tensor.shape, cuts
        return _take(tensor, cuts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grad_outputs
        full = grad.new_zeros(ctx.shape)
        _put(full, grad, ctx.cuts)
        return full, None


def _take(tensor: torch.Tensor, cuts: _Cuts) -> torch.Tensor:
    for axis, runs in cuts:
        views = [tensor.narrow(axis, start, length) for start, length in runs]
        tensor = views[0] if len(views) == 1 else torch.cat(views, axis)
    return tensor


def _put(full: torch.Tensor, part: torch.Tensor, cuts: _Cuts) -> None:
    if not cuts:
        full.copy_(part)
        return
    (axis, runs), *rest = cuts
    for start, length, piece in zip(*zip(*runs, strict=True), part.split([n for _, n in runs], axis), strict=True):
        _put(full.narrow(axis, start, length), piece, rest)


def sliced_shapes(state: Mapping[str, torch.Tensor], space: WidthSpace, widths: Widths) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `slice_state` without slicing."""
    units = space.units(widths)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, layouts in space.wiring.layouts.items():
        shapes[name] = tuple(sum(length for _, length in segments(layout, units)) for layout in layouts)
    return shapes


def narrow_attributes(model: nn.Module, space: WidthSpace, widths: Widths) -> Attributes:
    """Return the attributes of the user's own modules that count channels, at their new values.

    Args:
        model: The full-width module.
        space: Its width space, whose trace saw the numbers in use.
        widths: The subnet.

    Returns:
        By module path and attribute name: an int or a list of ints, where anything changes. Layers that
        have a resizer (convolutions, norms, ...) are not among them.
    """
    units = space.units(widths)
    new_values: dict[str, dict[int, int]] = {}
    for plan in space.wiring.constants:
        new_values.setdefault(plan.module, {})[plan.value] = plan.form.count(units)
    new_lists: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for plan in space.wiring.constant_lists:
        new_lists.setdefault(plan.module, {})[plan.values] = [form.count(units) for form in plan.forms]
    found: Attributes = {}
    for path in dict.fromkeys([*new_values, *new_lists]):
        new, lists = new_values.get(path, {}), new_lists.get(path, {})
        module = model.get_submodule(path)
        has_tensors = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if has_tensors and any(layer_type in _RESIZERS for layer_type in type(module).__mro__):
            continue
        for name, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool) and new.get(value, value) != value:
                found.setdefault(path, {})[name] = new[value]
            elif isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
                sizes: list[int] = list(value)  # pyright: ignore[reportAssignmentType]
                changed = lists.get(tuple(sizes)) or [new.get(item, item) for item in sizes]
                if changed != list(value):
                    found.setdefault(path, {})[name] = changed
    return found


def narrow_module(
    model: nn.Module,
    shapes: Shapes,
    *,
    attributes: Attributes | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Return the same module tree with narrower tensors, not initialised.

    Args:
        model: The full-width module; it is not changed.
        shapes: New shape of each parameter and buffer by name; names left out keep their shape.
        attributes: New values of the modules' own attributes, from `narrow_attributes`; None for none.
        device: Where the new tensors are; `"meta"` for a skeleton without storage, None for where the old ones are.

    Returns:
        A deep copy whose parameters and buffers have the new shapes and whose layers say so (`out_channels`, `groups`,
        `num_features` ...). Tied parameters stay tied.
    """
    memo: dict[int, object] = {}
    for name, tensor in state_of(model).items():
        # deepcopy takes what stands in the memo instead of copying the weights.
        shape = shapes.get(name, tuple(tensor.shape))
        empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device if device is None else device)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo.setdefault(id(tensor), empty)
    narrow = copy.deepcopy(model, memo)
    old_shapes = {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
    for path, layer in narrow.named_modules():
        prefix = f"{path}." if path else ""
        names = {name: name for name, _ in layer.named_parameters(recurse=False)}
        names |= {name: name for name, _ in layer.named_buffers(recurse=False)} | _parametrized(layer)
        local = {name: tuple(shapes.get(prefix + of, old_shapes[prefix + of])) for name, of in names.items()}
        if any(local[name] != old_shapes[prefix + of] for name, of in names.items()):
            for layer_type in reversed(type(layer).__mro__):
                if layer_type in _RESIZERS:
                    _RESIZERS[layer_type](layer, local)
    for path, values in (attributes or {}).items():
        module = narrow.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, tuple(value) if isinstance(getattr(module, name), tuple) else value)  # pyright: ignore[reportArgumentType]
    return narrow


def _parametrized(layer: nn.Module) -> dict[str, str]:
    """Return, for every tensor that `torch.nn.utils.parametrize` computes, the parameter that has its shape."""
    from torch.nn.utils import parametrize

    if not parametrize.is_parametrized(layer):
        return {}
    found = {}
    for name, chain in layer.parametrizations.items():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        shape = getattr(layer, name).shape
        for original, tensor in chain.named_parameters(recurse=False):
            if tensor.shape == shape:
                found[name] = f"parametrizations.{name}.{original}"
    return found


def load_slices(narrow: nn.Module, slices: Mapping[str, torch.Tensor]) -> None:
    """Copy slices into a narrow module of the same shapes."""
    with torch.no_grad():
        for name, tensor in state_of(narrow).items():
            tensor.copy_(slices[name])
