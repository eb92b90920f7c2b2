"""A search with a budget on latency: its winner keeps the budget when measured."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

import psenet
from psenet import Budget, LatencyModel, Widths, WidthSpace
from psenet.budget import Limits
from psenet.finalists import Measured, search_measured
from psenet.found import SearchResult


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    """A space whose predicted latency is a tenth of a microsecond a parameter."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1))
    space = psenet.trace(net, torch.zeros(1, 3, 8, 8), divisor=2)
    rng = np.random.default_rng(0)
    settings = list({space.sample(rng): None for _ in range(60)})
    return space.with_latency(LatencyModel.fit(space, settings, 1e-4 * space.params(space.to_array(settings))))


def _run(space: WidthSpace, real: Callable[[float], float], goal: str = "50%") -> tuple[Measured, Limits, list[Limits]]:
    """Search for many parameters, where nets take `real(predicted)` milliseconds."""
    searched: list[Limits] = []

    def search_within(limits: Limits) -> SearchResult:
        searched.append(limits)
        return psenet.search(space, limits, lambda widths: float(space.params(widths)), num_evaluations=20)

    def measure_ms(widths: Sequence[Widths]) -> list[float]:
        return [real(float(space.latency_ms(setting))) for setting in widths]

    limits = Budget(latency_ms=goal).resolve(space)
    return search_measured(space, limits, search_within, measure_ms), limits, searched


def test_a_true_prediction_needs_one_round(space: WidthSpace):
    measured, limits, searched = _run(space, lambda predicted: predicted)
    assert searched == [limits] and measured.num_rounds == 1
    assert measured.keeps_budget and measured.measured_ms == measured.predicted_ms
    assert measured.best == measured.found.best


@pytest.mark.parametrize("factor", [1.1, 1.5])
def test_where_predictions_promise_too_much_the_search_goes_on_inside_a_tighter_budget(
    space: WidthSpace, factor: float
):
    measured, limits, searched = _run(space, lambda predicted: factor * predicted)
    assert limits.latency_ms is not None and searched[1].latency_ms is not None
    assert searched[1].latency_ms == pytest.approx(limits.latency_ms / factor, rel=1e-6)
    assert measured.num_rounds == 2 and measured.keeps_budget
    assert measured.measured_ms <= 1.02 * limits.latency_ms
    assert limits.holds(space, measured.best.widths)


def test_the_best_of_the_finalists_that_keep_the_budget_wins(space: WidthSpace):
    slow: list[float] = []

    def real(predicted: float) -> float:
        slow.append(predicted)
        return 2 * predicted if len(slow) == 1 else predicted  # the best candidate is slower than predicted

    measured, _, searched = _run(space, real)
    ranked = sorted(measured.found.evaluated, key=lambda one: -one.score)
    assert len(searched) == 1 and measured.best == ranked[1]


def test_a_budget_that_no_net_keeps_when_measured_ends_with_the_fastest_and_says_so(space: WidthSpace):
    measured, limits, searched = _run(space, lambda predicted: predicted + 100)
    assert not measured.keeps_budget and limits.latency_ms is not None
    assert measured.measured_ms > limits.latency_ms
    assert 1 <= len(searched) <= 3


def test_other_limits_are_kept_while_the_latency_is_tightened(space: WidthSpace):
    limits = Budget(latency_ms="60%", macs="50%").resolve(space)
    searched: list[Limits] = []

    def search_within(within: Limits) -> SearchResult:
        searched.append(within)
        return psenet.search(space, within, lambda widths: float(space.params(widths)), num_evaluations=8)

    measured = search_measured(
        space, limits, search_within, lambda widths: [1.6 * float(space.latency_ms(one)) for one in widths]
    )
    assert all(within.macs == limits.macs for within in searched)
    assert limits.holds(space, measured.best.widths)
