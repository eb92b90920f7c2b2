"""Order the channels of every group by importance, so that a prefix keeps what matters.

Legend: U units of one channel group, C channels of one axis.
"""

import copy

import numpy as np
import torch
from torch import nn

from psenet.errors import InputError
from psenet.slicing import state_of
from psenet.space import WidthSpace
from psenet.tracing.layout import Layout, unit_index


def channel_importance(model: nn.Module, space: WidthSpace) -> dict[str, np.ndarray]:
    """Score the units of every channel group by the magnitude of their weights.

    On every axis of every parameter on which a group stands, the score of a unit is the L2 norm of all weights that
    belong to it: filters that make the unit, the parts of later filters that read it, and the scale of its norms.
    Biases and running statistics do not count. Each axis' scores are divided by their mean over the group, so that
    layers of different scale count the same, then averaged over the axes. This is the filter norm of Li et al.,
    "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), section 3.1, taken over all coupled layers as in
    Fang et al., "DepGraph: Towards Any Structural Pruning" (arXiv 2301.12900), section 3.3.

    Args:
        model: The full-width model.
        space: Its width space, from `psenet.trace`.

    Returns:
        By group name, the scores of its units, float64 of shape (U,); 1 is the mean over the group.

    Raises:
        InputError: The model is not the one that the space was traced from.
    """
    _check_shapes(model, space)
    scores: list[list[np.ndarray]] = [[] for _ in space.groups]
    # Under all names: the layouts know a tied parameter by one of them.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim == 1 and name.rpartition(".")[2] == "bias":
            continue
        squares = parameter.detach().double().square().cpu()
        for axis, layout in enumerate(space.wiring.layouts.get(name, ())):
            others = [other for other in range(squares.ndim) if other != axis]
            square_C = squares.sum(others).numpy() if others else squares.numpy()
            for group, norm_U in _norms_by_group(square_C, layout, space).items():
                mean = norm_U.mean()
                scores[group].append(norm_U / mean if mean > 0 else norm_U)
    return {
        group.name: np.mean([np.zeros(group.size // group.unit)] if not rows else rows, axis=0)
        for group, rows in zip(space.groups, scores, strict=True)
    }


def order_channels(model: nn.Module, space: WidthSpace) -> nn.Module:
    """Return a copy of the model that computes the same function with each group's most important units first.

    Args:
        model: The full-width model; it is not changed.
        space: Its width space, from `psenet.trace`; it fits the copy as well.

    Returns:
        A deep copy with permuted parameters and buffers. Units of equal importance keep their order, and so do the
        channels of groups in which neighbours matter (a convolution that slides along the channels).

    Raises:
        InputError: The model is not the one that the space was traced from.

    Example:
        >>> import psenet, torch
        >>> from torch import nn
        >>> from psenet.importance import order_channels
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
        >>> x = torch.randn(1, 3, 8, 8)
        >>> ordered = order_channels(model, psenet.trace(model, x))
        >>> torch.allclose(ordered(x), model(x), atol=1e-5)
        True
    """
    importance = channel_importance(model, space)
    orders = [
        np.arange(group.size // group.unit)
        if number in space.wiring.ordered
        else np.argsort(-importance[group.name], kind="stable")
        for number, group in enumerate(space.groups)
    ]
    ordered = copy.deepcopy(model)
    ordered.zero_grad()  # gradients of the old order
    permuted: set[int] = set()
    for name, tensor in state_of(ordered).items():
        if name not in space.wiring.layouts or id(tensor) in permuted:
            continue
        permuted.add(id(tensor))
        with torch.no_grad():
            for axis, layout in enumerate(space.wiring.layouts[name]):
                index_C = torch.from_numpy(_permutation(layout, orders)).to(tensor.device)
                tensor.copy_(tensor.index_select(axis, index_C))
    return ordered


def _norms_by_group(square_C: np.ndarray, layout: Layout, space: WidthSpace) -> dict[int, np.ndarray]:
    """Return the L2 norm of every unit, shape (U,), for every group on the axis."""
    group_C, unit_C = unit_index(layout, _all_units(space))
    return {
        group: np.sqrt(
            np.bincount(
                unit_C[group_C == group],
                weights=square_C[group_C == group],
                minlength=space.groups[group].size // space.groups[group].unit,
            )
        )
        for group in dict.fromkeys(group_C[group_C >= 0].tolist())
    }


def _permutation(layout: Layout, orders: list[np.ndarray]) -> np.ndarray:
    """Return the old position of the channel at every new position of an axis, int64 of shape (C,)."""
    pieces, start = [np.zeros(0, np.int64)], 0
    for run in layout:
        if run.group is None:
            pieces.append(np.arange(start, start + run.length))
        else:
            pieces.append((start + orders[run.group][:, None] * run.repeat + np.arange(run.repeat)).reshape(-1))
        start += run.length
    return np.concatenate(pieces)


def _all_units(space: WidthSpace) -> list[int]:
    return [group.size // group.unit for group in space.groups]


def _check_shapes(model: nn.Module, space: WidthSpace) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
    problems = []
    for name, layouts in space.wiring.layouts.items():
        expected = tuple(sum(run.length for run in layout) for layout in layouts)
        if name not in shapes:
            problems.append(f"{name} is missing")
        elif shapes[name] != expected:
            problems.append(f"{name} has shape {shapes[name]} instead of {expected}")
    if problems:
        raise InputError("the space was traced from another model: " + "; ".join(problems[:5]))
