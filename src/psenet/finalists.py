"""A search whose winner keeps a budget on latency when it is measured, not only when it is predicted.

The model of the latency errs by some percent, and a search finds where it errs in its favour. So the best candidates
are measured beside the full model. If none keeps the budget, the search goes on with the budget tightened by as much as
the model promised too much there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from psenet.budget import Limits, resolve_limits
from psenet.errors import InputError
from psenet.found import Evaluation, SearchResult
from psenet.inputs import Inputs
from psenet.latency import measure_latency
from psenet.runners import Runner
from psenet.space import WidthSpace
from psenet.supernet import Supernet
from psenet.widths import Widths

_NUM_FINALISTS = 4
_TOLERANCE = 0.02
"""Of a measured latency: by so much two measurements of one net differ on a quiet machine."""
_MOST_ROUNDS = 3
_LEAST_STEP = 0.01
"""A budget is tightened by no less than this share."""

SearchWithin = Callable[[Limits], SearchResult]
"""Searches inside limits; what was evaluated before is not evaluated again."""
MeasureMs = Callable[[Sequence[Widths]], Sequence[float]]
"""Measures nets in milliseconds, on the scale of the space's latency model."""


@dataclass(frozen=True)
class Measured:
    """The winner of a search, measured."""

    found: SearchResult
    """The last round of the search."""
    best: Evaluation
    """The best finalist that keeps the budget, or the fastest one if none does."""
    limits: Limits
    """What the last round searched within: the budget, or a tighter one on predicted latency."""
    measured_ms: float
    predicted_ms: float
    keeps_budget: bool
    num_rounds: int


def search_measured(space: WidthSpace, limits: Limits, search_within: SearchWithin, measure_ms: MeasureMs) -> Measured:
    """Search, measure the finalists, and search on within tighter limits while none of them keeps the budget.

    Args:
        space: The width space, with a latency model.
        limits: The budget; it limits the latency.
        search_within: Does the search.
        measure_ms: Measures the finalists.

    Returns:
        The winner; where no round gave one that keeps the budget, the fastest finalist of the last.
    """
    goal_ms = limits.latency_ms
    assert goal_ms is not None, "a budget on latency"
    within = limits
    for number in range(1, _MOST_ROUNDS + 1):
        found = search_within(within)
        # What was stopped early is left out: hopeless beside the best, it would have to be scored first.
        whole = (one for one in found.evaluated if not one.is_estimate)
        finalists = sorted(whole, key=lambda one: -one.score)[:_NUM_FINALISTS]
        measured_F = np.asarray(measure_ms([one.widths for one in finalists]), dtype=np.float64)
        predicted_F = space.latency_ms([one.widths for one in finalists])
        keeps_F = measured_F <= goal_ms * (1 + _TOLERANCE)
        kept = int(keeps_F.argmax() if keeps_F.any() else measured_F.argmin())
        tighter = _tightened(space, within, goal_ms, float(np.median(measured_F / predicted_F)))
        if keeps_F.any() or tighter is None or number == _MOST_ROUNDS:
            return Measured(
                found=found,
                best=finalists[kept],
                limits=within,
                measured_ms=float(measured_F[kept]),
                predicted_ms=float(predicted_F[kept]),
                keeps_budget=bool(keeps_F.any()),
                num_rounds=number,
            )
        within = tighter
    raise AssertionError("the last round returns")


def measure_beside_full(
    space: WidthSpace, supernet: Supernet, widths: Sequence[Widths], example: Inputs, *, runner: Runner
) -> list[float]:
    """Return the latency of subnets in milliseconds, on the scale of the space's latency model.

    Each takes turns with the full model, and counts as a share of it: a machine that is slower now than when the
    latency model was made would otherwise make every net break its budget.

    Args:
        space: The width space, with a latency model.
        supernet: Its supernet.
        widths: What to measure.
        example: One sample.
        runner: What runs them.
    """
    settings = {"full": space.full(), **{str(number): setting for number, setting in enumerate(widths)}}
    modules = {name: supernet.extract(setting).to(runner.place) for name, setting in settings.items()}
    latency = measure_latency(modules, example, runner=runner)
    full_ms = space.latency_ms(space.full())
    # Lower quartiles, as in the latency model: other programs only ever add time.
    return [full_ms * latency[str(number)].q1_ms / latency["full"].q1_ms for number in range(len(widths))]


def _tightened(space: WidthSpace, within: Limits, goal_ms: float, bias: float) -> Limits | None:
    """Return limits on predicted latency such that a net at them is measured at the goal; None if no net keeps them."""
    assert within.latency_ms is not None
    tighter = replace(within, latency_ms=min(goal_ms / bias, within.latency_ms * (1 - _LEAST_STEP)))
    try:
        return resolve_limits(tighter, space)
    except InputError:
        return None
