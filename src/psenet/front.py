"""The Pareto front: the best score at every cost between two budgets, from one search.

Legend: N evaluations, R resources.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from psenet.budget import Budget, Limits, cost_of, resolve_limits
from psenet.errors import InputError
from psenet.evolution import search_each
from psenet.found import Evaluation, SearchProgress, SearchResult, best_of
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.space import WidthSpace
from psenet.widths import Widths


@dataclass(frozen=True)
class FrontResult:
    """What a search over a range of budgets found."""

    front: tuple[Evaluation, ...]
    """The evaluations that no other one beats in score and cost, ascending in cost; estimates left out."""
    evaluated: tuple[Evaluation, ...]
    """Every evaluation with a finite score, in order."""
    budgets: tuple[Limits, ...]
    """The budgets that took turns, ascending."""
    results: tuple[SearchResult, ...]
    """What was found inside each of them."""
    space: WidthSpace = field(repr=False)

    def best_within(self, budget: Budget | Limits) -> Evaluation:
        """Return the evaluation with the highest score inside a budget, the earliest of equals; estimates left out.

        Raises:
            InputError: No evaluation is inside the budget.
        """
        limits = resolve_limits(budget, self.space)
        inside = [evaluation for evaluation in self.evaluated if limits.holds(self.space, evaluation.widths)]
        best = best_of(inside)
        if best is None:
            raise InputError(
                f"nothing that was evaluated is inside the budget of {limits.describe(self.space)}; the search went "
                f"from {self.budgets[0].describe(self.space)}: give a larger budget, or search from a lower one"
            )
        return best


def search_front(
    space: WidthSpace,
    low: Budget | Limits,
    high: Budget | Limits,
    score_fn: Callable[[Widths], float],
    *,
    num_budgets: int = 8,
    prior: Prior | None = None,
    predictor: Predictor | None = None,
    first: Sequence[Widths] = (),
    num_evaluations: int = 200,
    seed: int = 0,
    storage: str | os.PathLike[str] | None = None,
    study_name: str | None = None,
    population_size: int = 16,
    progress: Callable[[SearchProgress], None] | None = None,
    learn: bool = True,
    early_stopping: bool = True,
    workers: int = 1,
) -> FrontResult:
    """Find the best widths at every cost between two budgets.

    Args:
        space: The width space.
        low: The smallest budget.
        high: The largest, on the same resources and in none of them below `low`.
        score_fn: See `psenet.search`, as for all that is not explained here.
        num_budgets: The search goes over so many budgets from `low` to `high`; see `budgets_between`.
        prior: One for all budgets.
        predictor: One for all budgets.
        first: Settings inside `high` to evaluate before all others.
        num_evaluations: How many evaluations to have in the end over all budgets together.
        seed: Seed of the proposals.
        storage: Where the study is kept.
        study_name: Name of the study in the storage.
        population_size: Parents are chosen among so many best candidates inside the budget whose turn it is.
        progress: Called after every candidate.
        learn: Whether the prior learns from the candidates.
        early_stopping: Score a candidate only until it is hopeless beside what costs no more.
        workers: Score in so many processes.

    Returns:
        The front and all evaluations.

    Raises:
        InputError: As `psenet.search`; or the two budgets do not make a range.
        RuntimeError: As `psenet.search`, for any of the budgets.
    """
    budgets = budgets_between(space, low, high, num_budgets)
    results = search_each(
        space,
        budgets,
        score_fn,
        prior=prior,
        predictor=predictor,
        first=first,
        num_evaluations=num_evaluations,
        seed=seed,
        storage=storage,
        study_name=study_name,
        population_size=population_size,
        progress=progress,
        learn=learn,
        early_stopping=early_stopping,
        keep_front=True,
        workers=workers,
    )
    # Every budget lies inside the last one.
    evaluated = results[-1].evaluated
    whole = [evaluation for evaluation in evaluated if not evaluation.is_estimate]
    widths_NG = space.to_array([evaluation.widths for evaluation in whole])
    costs_NR = np.stack([cost_of(space, resource, widths_NG) for resource, _ in budgets[-1].each()], axis=1)
    front = pareto_front(whole, costs_NR)
    return FrontResult(tuple(front), evaluated, tuple(budgets), tuple(results), space)


def budgets_between(space: WidthSpace, low: Budget | Limits, high: Budget | Limits, num_budgets: int) -> list[Limits]:
    """Return budgets from `low` to `high`, ascending, every one larger than the one before by the same factor.

    Args:
        space: The width space.
        low: The smallest budget.
        high: The largest, on the same resources and in none of them below `low`.
        num_budgets: At least 2.

    Returns:
        So many limits; fewer where whole numbers leave no room for as many.

    Raises:
        InputError: The budgets limit different resources, `low` is above `high`, or there are too few budgets.
    """
    ends = [resolve_limits(budget, space) for budget in (low, high)]
    (low_names, lows), (high_names, highs) = (
        ([resource.name for resource, _ in limits.each()], [limit for _, limit in limits.each()]) for limits in ends
    )
    problems = [f"num_budgets must be at least 2; got {num_budgets}"] * (num_budgets < 2)
    if low_names != high_names or not low_names:
        problems.append(
            f"both budgets must limit the same resources; low has {low_names or 'none'}, high {high_names or 'none'}"
        )
    else:
        problems += [
            f"low must not be above high; got {name} {less} and {more}"
            for name, less, more in zip(low_names, lows, highs, strict=True)
            if less > more
        ]
    if problems:
        raise InputError("the budgets do not make a range: " + "; ".join(problems))
    amounts = zip(*(_spaced(less, more, num_budgets) for less, more in zip(lows, highs, strict=True)), strict=True)
    found = (dataclasses.replace(ends[1], **dict(zip(low_names, row, strict=True))) for row in amounts)
    return list(dict.fromkeys(found))


def pareto_front(evaluations: Sequence[Evaluation], costs: np.ndarray | Sequence[float]) -> list[Evaluation]:
    """Return the evaluations that no other one beats, ascending in cost.

    One beats another if its score is as high and none of its costs higher, and it is better in one of them. Of
    evaluations that are equal in all, the earliest is returned.

    Args:
        evaluations: N evaluations.
        costs: What they cost: shape (N,), or (N, R) for several resources.

    Raises:
        InputError: There is not one row of costs for each evaluation.
    """
    costs_NR = np.asarray(costs, dtype=np.float64)
    if costs_NR.shape[:1] != (len(evaluations),) or costs_NR.ndim > 2:
        raise InputError(f"expected costs of {len(evaluations)} evaluations, one row each; got shape {costs_NR.shape}")
    costs_NR = costs_NR[:, None] if costs_NR.ndim == 1 else costs_NR
    scores_N = np.array([evaluation.score for evaluation in evaluations])
    # In this order an evaluation is beaten, or equalled, only by one before it, and so by one that is in the front.
    keys = (-scores_N, *costs_NR.T[::-1])
    front: list[int] = []
    for number in np.lexsort(keys).tolist():
        beaten_F = (scores_N[front] >= scores_N[number]) & (costs_NR[front] <= costs_NR[number]).all(axis=1)
        if not beaten_F.any():
            front.append(number)
    return [evaluations[number] for number in front]


def _spaced(low: float, high: float, num: int) -> list[float]:
    """Return numbers from low to high at equal ratios, whole numbers between whole numbers."""
    amounts = [low * (high / low) ** (step / (num - 1)) for step in range(1, num - 1)]
    if isinstance(low, int) and isinstance(high, int):
        amounts = [math.floor(amount) for amount in amounts]
    return [low, *amounts, high]
