"""Sixty random networks; `benchmarks/soak_fuzz.py` asks the same of a thousand and more."""

import pytest

from fuzzing import check
from random_nets import RandomNet

NUM_NETS, NUM_PARTS = 60, 6


def test_a_seed_always_makes_the_same_net():
    one, again, other = (RandomNet(seed) for seed in (3, 3, 4))
    assert str(one) == str(again) != str(other)
    assert all(a.equal(b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_random_nets_keep_every_guarantee(part: int):
    findings = [check(seed) for seed in range(part, NUM_NETS, NUM_PARTS)]
    assert sum(bool(finding.refused) for finding in findings) <= 2
    groups, frozen = sum(finding.groups for finding in findings), sum(len(finding.frozen) for finding in findings)
    assert groups > 2 * frozen
