"""The settings of a run: every number is checked where it is given."""

import math
from typing import Any

import pytest

from psenet import InputError, PruneConfig


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("seed", -1, "an integer of at least 0 and at most 4294967295"),
        ("seed", 2**32, "an integer of at least 0 and at most 4294967295"),
        ("seed", 1.5, "an integer of at least 0 and at most 4294967295"),
        ("seed", True, "an integer of at least 0 and at most 4294967295"),
        ("num_evaluations", 0, "an integer of at least 1"),
        ("num_front_evaluations", -1, "an integer of at least 0"),
        ("num_subnets", 0, "an integer of at least 1"),
        ("divisor", 0, "an integer of at least 1"),
        ("min_ratio", 0.0, "above 0 and at most 1"),
        ("min_ratio", 1.1, "above 0 and at most 1"),
        ("min_ratio", math.nan, "above 0 and at most 1"),
        ("min_ratio", "half", "above 0 and at most 1"),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: Any, what: str):
    with pytest.raises(InputError) as raised:
        PruneConfig(**{name: value})
    assert str(raised.value) == f"{name} must be {what}; got {value!r}"


def test_all_numbers_out_of_range_are_named_together():
    with pytest.raises(InputError, match="seed must be .*; got -1; num_evaluations must be .*; got 0"):
        PruneConfig(num_evaluations=0, seed=-1)
