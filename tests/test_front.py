"""Searches of several budgets at once, and Pareto fronts."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from psenet.budget import Budget, Limits, uniform_widths
from psenet.errors import InputError
from psenet.evolution import SearchProgress, search, search_each
from psenet.found import Evaluation, SearchResult
from psenet.front import budgets_between, pareto_front, search_front
from psenet.predictor import Predictor
from psenet.widths import Widths
from synthetic import Additive, make_space

BUDGETS = [Budget(macs="30%"), Budget(macs="45%"), Budget(macs="70%")]


def evaluations(results: list[SearchResult]) -> list[list[tuple[Widths, float]]]:
    return [[(evaluation.widths, evaluation.score) for evaluation in found.evaluated] for found in results]


def test_every_budget_comes_to_the_best_that_brute_force_finds():
    space = make_space()
    for seed in range(2):
        score = Additive(space, seed)
        found = search_each(space, BUDGETS, score, num_evaluations=150, seed=seed)
        limits = [budget.resolve(space) for budget in BUDGETS]
        assert len(score.seen) == len(set(score.seen)) <= 150
        for result, limit in zip(found, limits, strict=True):
            assert result.best.score == pytest.approx(score.best_inside(limit.macs or 0))


def test_a_candidate_counts_for_every_budget_that_it_keeps_and_for_no_other():
    space = make_space(6)
    budgets = [Budget(macs="40%"), Budget(params="40%"), Budget(macs="60%", params="60%")]
    score = Additive(space)
    found = search_each(space, budgets, score, num_evaluations=60)
    for result, budget in zip(found, budgets, strict=True):
        limits = budget.resolve(space)
        inside = [widths for widths in score.seen if limits.holds(space, widths)]
        assert [evaluation.widths for evaluation in result.evaluated] == inside
        assert result.best.score == max(score.of(widths) for widths in inside)
    assert len(score.seen) == 60


def test_one_budget_of_one_is_the_search_of_that_budget():
    space = make_space(6)
    alone = search(space, BUDGETS[0], Additive(space), num_evaluations=30, seed=2)
    assert search_each(space, BUDGETS[:1], Additive(space), num_evaluations=30, seed=2) == [alone]


def shares_of(macs: list[int], limits: list[int]) -> list[int]:
    """Count what lies between one limit and the next."""
    return [sum(low < cost <= high for cost in macs) for low, high in itertools.pairwise(limits)]


def test_every_budget_gets_its_fair_share_of_proposals():
    space = make_space(10, tuple(range(8, 65, 8)))
    score = Additive(space)
    search_each(space, BUDGETS, score, num_evaluations=60)
    limits = [0, *(budget.resolve(space).macs or 0 for budget in BUDGETS)]
    # A proposal uses up its budget, so that it is outside all smaller ones.
    shares = shares_of([space.macs(widths) for widths in score.seen], limits)
    assert shares == [20, 20, 20]


def test_an_exhausted_budget_gives_its_turns_to_the_others_evenly():
    space = make_space(6)
    smallest = Limits(macs=space.macs(space.smallest()))
    score = Additive(space)
    found = search_each(space, [smallest, *BUDGETS], score, num_evaluations=61)
    assert [result.exhausted for result in found] == [True, False, False, False]
    assert len(found[0].evaluated) == 1
    limits = [smallest.macs or 0, *(budget.resolve(space).macs or 0 for budget in BUDGETS)]
    shares = shares_of([space.macs(widths) for widths in score.seen], limits)
    assert sum(shares) == 60 and min(shares) >= 17


def test_a_whole_space_is_exhausted_for_all():
    space = make_space(2)
    found = search_each(space, [Budget(macs="60%"), Budget(macs="100%")], Additive(space), num_evaluations=99)
    assert [result.exhausted for result in found] == [True, True] and len(found[1].evaluated) == 16


@pytest.mark.parametrize("with_predictor", [False, True])
def test_a_search_of_several_budgets_in_parts_equals_one_in_one_go(tmp_path: Path, with_predictor: bool):
    space = make_space(5)
    smallest = Limits(macs=space.macs(space.smallest()))
    budgets = [smallest, *BUDGETS]
    predictor = Predictor.untrained(space) if with_predictor else None

    def run(num: int, storage: Path | None) -> list[SearchResult]:
        score = Additive(space)
        return search_each(space, budgets, score, num_evaluations=num, seed=1, storage=storage, predictor=predictor)

    whole = run(40, None)
    for num in (7, 19, 40):
        parts = run(num, tmp_path / "study.journal")
    assert parts == whole


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_killed_search_of_several_budgets_goes_on_as_if_nothing_had_happened(tmp_path: Path):
    storage = str(tmp_path / "study.journal")
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_front import BUDGETS, Additive, make_space, search_each
        space = make_space(6)
        score = Additive(space)
        def kills_itself(widths):
            value = score(widths)
            if len(score.seen) == 17:
                os.kill(os.getpid(), signal.SIGKILL)
            return value
        search_each(space, BUDGETS, kills_itself, num_evaluations=30, seed=1, storage={storage!r})
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    space = make_space(6)
    score = Additive(space)
    found = search_each(space, BUDGETS, score, num_evaluations=30, seed=1, storage=storage)
    assert len(score.seen) == 30 - 16
    assert evaluations(found) == evaluations(search_each(space, BUDGETS, Additive(space), num_evaluations=30, seed=1))


def test_first_settings_must_be_inside_at_least_one_budget():
    space = make_space(5)
    limits = [budget.resolve(space) for budget in BUDGETS]
    first = [uniform_widths(space, limit) for limit in limits]
    score = Additive(space)
    search_each(space, BUDGETS, score, first=first, num_evaluations=9)
    assert score.seen[:3] == first
    with pytest.raises(InputError, match="inside at least one of the budgets; outside are:"):
        search_each(space, BUDGETS, score, first=[space.full()])


def test_a_budget_without_an_evaluation_gets_one_beyond_the_number():
    space = make_space(6)
    found = search_each(space, BUDGETS[::-1], Additive(space), num_evaluations=1)
    assert [len(result.evaluated) >= 1 for result in found] == [True] * 3
    assert len(found[0].evaluated) == 3


def test_a_budget_whose_scores_are_never_finite_is_named():
    space = make_space(6)
    limit = BUDGETS[0].resolve(space)
    score = Additive(space)

    def fails_when_small(widths: Widths) -> float:
        return float("nan") if limit.holds(space, widths) else score(widths)

    with pytest.raises(RuntimeError, match=r"all 20 candidates inside the budget of at most .* MACs .* never finite"):
        search_each(space, BUDGETS, fails_when_small, num_evaluations=100)


def test_no_budget_is_refused():
    with pytest.raises(InputError, match="needs at least one budget; got none"):
        search_each(make_space(), [], lambda widths: 0.0)


def test_the_time_left_is_that_of_the_median_evaluation(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.accumulate([0, 9, 0, 2, 0, 2, 0, 2])
    monkeypatch.setattr("psenet.scoring.time.perf_counter", lambda: next(clock))
    space, told = make_space(), list[SearchProgress]()
    search(space, Budget(macs="50%"), Additive(space), num_evaluations=4, progress=told.append)
    assert [progress.seconds_left for progress in told] == [9 * 3, 5.5 * 2, 2 * 1, 0]


# Pareto fronts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_resources", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_what_brute_force_finds(seed: int, num_resources: int):
    rng = np.random.default_rng(seed)
    costs = rng.integers(8, size=(60, num_resources))
    made = [Evaluation(Widths({"g": n + 1}), float(s), 0, 0) for n, s in enumerate(rng.integers(8, size=60))]

    def beats(one: int, other: int) -> bool:
        ours = [made[one].score, *(-costs[one]).tolist()]
        theirs = [made[other].score, *(-costs[other]).tolist()]
        return all(a >= b for a, b in zip(ours, theirs, strict=True)) and (ours != theirs or one < other)

    kept = [n for n in range(60) if not any(beats(other, n) for other in range(60) if other != n)]
    found = pareto_front(made, costs if num_resources > 1 else costs[:, 0])
    assert {id(evaluation) for evaluation in found} == {id(made[n]) for n in kept}
    firsts = [int(costs[made.index(evaluation)][0]) for evaluation in found]
    assert firsts == sorted(firsts)


def test_the_front_of_nothing_is_empty_and_costs_must_match():
    assert pareto_front([], []) == []
    one = Evaluation(Widths({"g": 1}), 1.0, 1, 1)
    with pytest.raises(InputError, match=r"expected costs of 1 evaluations, one row each; got shape \(2,\)"):
        pareto_front([one], [1, 2])


def test_budgets_between_two_grow_by_the_same_factor():
    space = make_space(8, tuple(range(8, 65, 8)))
    full = space.macs(space.full())
    found = budgets_between(space, Budget(macs="20%"), Budget(macs="80%"), 3)
    assert [limits.macs for limits in found] == [int(0.2 * full), pytest.approx(0.4 * full, abs=1), int(0.8 * full)]
    assert all(limits.params is None for limits in found)
    assert len(budgets_between(space, found[0], found[0], 5)) == 1


def test_a_front_is_searched_over_a_range_and_answers_for_any_budget_inside_it():
    space = make_space(6)
    score = Additive(space)
    found = search_front(space, Budget(macs="20%"), Budget(macs="70%"), score, num_budgets=4, num_evaluations=80)
    assert [evaluation.widths for evaluation in found.evaluated] == score.seen and len(score.seen) == 80
    assert len(found.budgets) == len(found.results) == 4
    assert found.front == tuple(pareto_front(found.evaluated, [one.macs for one in found.evaluated]))
    assert [one.score for one in found.front] == sorted({one.score for one in found.front})
    for share in ("20%", "37%", "70%"):
        limits = Budget(macs=share).resolve(space)
        inside = [one for one in found.evaluated if one.macs <= (limits.macs or 0)]
        assert found.best_within(limits) == max(inside, key=lambda one: one.score)
        assert found.best_within(Budget(macs=share)) in found.front
    with pytest.raises(InputError, match="nothing that was evaluated is inside the budget of .* search went from"):
        found.best_within(Limits(macs=space.macs(space.smallest())))


@pytest.mark.parametrize(
    ("low", "high", "num", "match"),
    [
        (Budget(macs="20%"), Budget(params="70%"), 4, r"same resources; low has \['macs'\], high \['params'\]"),
        (Budget(macs="20%"), Budget(macs="70%", params="70%"), 4, "must limit the same resources"),
        (Budget(macs="70%"), Budget(macs="20%"), 4, "low must not be above high; got macs "),
        (Budget(macs="20%"), Budget(macs="70%"), 1, "num_budgets must be at least 2; got 1"),
        (Limits(), Limits(), 3, "low has none, high none"),
    ],
)
def test_budgets_that_make_no_range_are_refused(low: Budget, high: Budget, num: int, match: str):
    space = make_space(8, tuple(range(8, 65, 8)))
    with pytest.raises(InputError, match=match):
        search_front(space, low, high, Additive(space), num_budgets=num)
