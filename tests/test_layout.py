from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from psenet.tracing.layout import (
    Layout,
    Run,
    frozen_layout,
    is_elastic,
    kept_channels,
    linear_form,
    segments,
    unit_index,
)


@dataclass(frozen=True)
class _Case:
    """A layout, the units each group keeps, and the layout spelt out: one (group, unit) per channel, -1 if frozen."""

    layout: Layout
    units: tuple[int, ...]
    channels: list[tuple[int, int]]

    @property
    def kept(self) -> list[int]:
        """Positions that stay, found channel by channel."""
        return [
            position for position, (group, unit) in enumerate(self.channels) if group < 0 or unit < self.units[group]
        ]


@st.composite
def _cases(draw: st.DrawFn) -> _Case:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    units = tuple(draw(st.integers(0, size)) for size in sizes)
    runs, channels = [], []
    for group in draw(st.lists(st.integers(-1, len(sizes) - 1), max_size=6)):
        repeat = draw(st.integers(1, 3))
        if group < 0:
            runs.append(Run(None, 1, repeat))
            channels += [(-1, 0)] * repeat
        else:
            runs.append(Run(group, repeat, repeat * sizes[group]))
            channels += [(group, unit) for unit in range(sizes[group]) for _ in range(repeat)]
    return _Case(tuple(runs), units, channels)


def test_a_concatenation_of_a_repeated_a_frozen_and_a_plain_run_by_hand():
    layout = (Run(0, 2, 8), Run(None, 1, 3), Run(1, 1, 5))
    assert segments(layout, (3, 2)) == [(0, 6), (8, 5)]
    assert segments(layout, (4, 2)) == [(0, 13)]
    assert segments(layout, (4, 5)) == [(0, 16)]
    assert kept_channels(layout, (3, 2)) == 11
    groups, units = unit_index(layout, (3, 2))
    assert groups.tolist() == [0, 0, 0, 0, 0, 0, -1, -1, -1, 1, 1]
    assert units.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 1]
    assert linear_form(layout).row(3).tolist() == [2, 1, 0, 3]


def test_a_frozen_layout_is_one_run_that_always_stays():
    layout = frozen_layout(7)
    assert not is_elastic(layout)
    assert kept_channels(layout, ()) == 7 and segments(layout, ()) == [(0, 7)]


def test_an_empty_layout_keeps_nothing():
    assert segments((), ()) == [] and kept_channels((), ()) == 0 and not is_elastic(())
    groups, units = unit_index((), ())
    assert groups.shape == units.shape == (0,) and groups.dtype == units.dtype == np.int64


@given(_cases())
def test_segments_are_the_positions_that_stay_in_as_few_pieces_as_possible(case: _Case):
    pieces = segments(case.layout, case.units)
    assert [position for start, length in pieces for position in range(start, start + length)] == case.kept
    assert all(length > 0 for _, length in pieces)
    assert all(start + length < after for (start, length), (after, _) in zip(pieces, pieces[1:], strict=False))


@given(_cases())
def test_the_number_kept_is_what_a_count_finds_and_what_the_formula_says(case: _Case):
    assert kept_channels(case.layout, case.units) == len(case.kept)
    form = linear_form(case.layout)
    assert form.constant + sum(factor * case.units[group] for group, factor in form.coefficients) == len(case.kept)
    assert form.row(len(case.units)) @ [*case.units, 1] == len(case.kept)


@given(_cases())
def test_the_unit_index_names_every_channel_that_stays(case: _Case):
    groups, units = unit_index(case.layout, case.units)
    assert groups.dtype == units.dtype == np.int64
    named = list(zip(groups.tolist(), units.tolist(), strict=True))
    assert named == [case.channels[position] for position in case.kept]


@given(_cases())
def test_an_axis_is_elastic_where_any_channel_belongs_to_a_group(case: _Case):
    assert is_elastic(case.layout) == any(group >= 0 for group, _ in case.channels)
