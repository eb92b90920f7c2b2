"""Layouts: what stands on the channel axis of a tensor. Pure data, no torch.

An axis is a sequence of *runs*. A run belongs to one channel group, or to none (frozen), and holds each unit of the
group `repeat` times in a row: flattening a (C, H, W) tensor gives repeat H*W, a depthwise multiplier of 2 gives 2,
a convolution whose conv-groups live and die as a whole gives the channels of one conv-group. A concatenation is a
layout of several runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psenet.cost import LinearForm


@dataclass(frozen=True)
class Run:
    """Consecutive channels of one axis."""

    group: int | None
    """Index of the channel group, or None for channels that always stay."""
    repeat: int
    """Channels per unit of the group; 1 for frozen runs."""
    length: int
    """Channels at full width."""

    def kept(self, units: Sequence[int]) -> int:
        """Return how many channels stay when group g keeps its first `units[g]` units."""
        return self.length if self.group is None else self.repeat * units[self.group]


Layout = tuple[Run, ...]


def frozen_layout(length: int) -> Layout:
    """Return the layout of an axis that never changes."""
    return (Run(None, 1, length),)


def is_elastic(layout: Layout) -> bool:
    """Tell whether any channel of the axis belongs to a group."""
    return any(run.group is not None for run in layout)


def kept_channels(layout: Layout, units: Sequence[int]) -> int:
    """Return the length of the axis at the given units per group."""
    return sum(run.kept(units) for run in layout)


def segments(layout: Layout, units: Sequence[int], *, from_right: bool = False) -> list[tuple[int, int]]:
    """Return what stays of the axis as (start, length) pairs at full-width positions, neighbours merged.

    Args:
        layout: The axis.
        units: How many units each group keeps.
        from_right: Keep the last units of every group instead of the first.
    """
    pieces: list[tuple[int, int]] = []
    start = 0
    for run in layout:
        kept = run.kept(units)
        first = start + run.length - kept if from_right else start
        if kept and pieces and sum(pieces[-1]) == first:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + kept)
        elif kept:
            pieces.append((first, kept))
        start += run.length
    return pieces


def unit_index(layout: Layout, units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Name the group and the unit of every channel that stays, for building masks.

    Returns:
        Two int64 arrays of shape (kept channels,): the group index (-1 where frozen) and the unit's number in it.
    """
    groups, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for run in layout:
        kept = run.kept(units)
        groups.append(np.full(kept, -1 if run.group is None else run.group, np.int64))
        numbers.append(np.arange(kept, dtype=np.int64) // run.repeat if run.group is not None else groups[-1] * 0)
    return np.concatenate(groups), np.concatenate(numbers)


def linear_form(layout: Layout) -> LinearForm:
    """Return the length of the axis as a formula of the units per group."""
    constant = sum(run.length for run in layout if run.group is None)
    return LinearForm(constant, tuple((run.group, run.repeat) for run in layout if run.group is not None))


def narrows_within_groups(groups: int, in_per_group: int) -> bool:
    """Tell how a grouped convolution gets narrower: all conv-groups alike, or by whole conv-groups.

    Whole ones would be too coarse where there are two or three; a depthwise convolution has no other way.
    """
    return 1 < groups <= 3 and in_per_group > 1
