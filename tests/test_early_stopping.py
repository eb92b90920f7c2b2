"""Searches that stop scoring what is hopeless: what they find, spare and keep."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import optuna
import pytest

import psenet
from answers import Answers
from psenet.budget import Budget, Limits, cost_of
from psenet.evolution import search, search_each
from psenet.finalists import search_measured
from psenet.found import Evaluation, SearchProgress, SearchResult, best_of
from psenet.front import pareto_front, search_front
from psenet.predictor import Predictor
from psenet.scoring import Scored
from psenet.storage import open_storage
from psenet.widths import Widths
from synthetic import Additive, make_space

HALF = Budget(macs="50%")
SPACE = make_space(6)


def everything(found: SearchResult) -> list[tuple[Widths, float, float]]:
    return [(one.widths, one.score, one.share) for one in found.evaluated]


class Strict:
    """Stops whatever does not beat its rival, and notes who was scored against whom."""

    def __init__(self, shown: float = 0.25) -> None:
        self.score = Additive(SPACE)
        self.shown = shown
        self.rivals: dict[Widths, Widths] = {}

    def __call__(self, widths: Widths) -> float:
        return self.score(widths)

    def against(self, widths: Widths, rival: Widths) -> Scored:
        self.rivals[widths] = rival
        value = self.score(widths)
        return Scored(value, self.shown) if value < self.score.of(rival) else Scored(value)


# What is found and spared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_it_loses_no_best_and_looks_at_far_fewer_samples(seed: int):
    answers = Answers(SPACE)
    found = search(SPACE, HALF, answers.score(), num_evaluations=60, seed=seed)
    stopped = [one for one in found.evaluated if one.is_estimate]
    assert len(found.evaluated) == 60 and len(stopped) > 20
    assert answers.num_seen == pytest.approx(2000 * sum(one.share for one in found.evaluated))
    assert answers.num_seen < 0.65 * 60 * 2000
    score, best = answers.score(), -np.inf
    for one in found.evaluated:
        if one.is_estimate:
            assert score(one.widths) < best and one.score < best
        else:
            assert one.score == score(one.widths)
            best = max(best, one.score)
    assert found.best.score == best and not found.best.is_estimate


def test_it_finds_what_a_search_to_the_end_of_every_score_finds():
    pairs = []
    for seed in range(4):
        pairs.append(
            [
                search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=50, seed=seed, early_stopping=stops).best
                for stops in (True, False)
            ]
        )
    differences = [stopping.score - whole.score for stopping, whole in pairs]
    assert np.mean(differences) > -0.1 and np.median(differences) == pytest.approx(0, abs=1e-9)


def test_nothing_is_stopped_where_it_is_switched_off_or_before_a_population_is_there():
    answers = Answers(SPACE)
    whole = search(SPACE, HALF, answers.score(), num_evaluations=40, early_stopping=False)
    assert answers.num_seen == 40 * 2000 and not any(one.is_estimate for one in whole.evaluated)
    few, whole = (
        search(SPACE, HALF, answers.score(), num_evaluations=40, population_size=30, early_stopping=stops)
        for stops in (True, False)
    )
    assert [one.share for one in few.evaluated[:30]] == [1.0] * 30 and few.evaluated[-1].share < 1
    assert everything(few)[:30] == everything(whole)[:30]


def test_what_shall_be_tried_first_is_scored_to_the_end(tmp_path: Path):
    first = [SPACE.smallest()]
    for num_before in (0, 20):  # even where the study has a best already
        storage = tmp_path / f"{num_before}.journal"
        if num_before:
            search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=num_before, storage=storage)
        found = search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=30, first=first, storage=storage)
        tried = {one.widths: one.share for one in found.evaluated}
        assert tried[first[0]] == 1 and min(tried.values()) < 1


def test_a_score_of_ones_own_may_stop_early_and_the_search_learns_from_its_estimates():
    score = Strict()
    found = search(SPACE, HALF, score, num_evaluations=40, predictor=Predictor.untrained(SPACE))
    best = None
    for number, one in enumerate(found.evaluated):
        if number >= 16:
            assert best is not None and score.rivals[one.widths] == best.widths
            assert one.is_estimate == (one.score < best.score)
        best = best_of(found.evaluated[: number + 1])
    # Its estimates are the scores themselves, so it goes where a search without them goes.
    plain = search(SPACE, HALF, Additive(SPACE), num_evaluations=40, predictor=Predictor.untrained(SPACE))
    assert [one.widths for one in plain.evaluated] == [one.widths for one in found.evaluated]
    assert found.predicted_rank_correlation == plain.predicted_rank_correlation


def test_a_broken_candidate_fails_whether_or_not_it_would_be_stopped():
    answers = Answers(SPACE)
    answers.broken = {}
    original = answers.subnet

    def sometimes_broken(widths: Widths, /):
        answers.broken = {100: float("nan")} if widths["g0"] == 4 else {}
        return original(widths)

    answers.subnet = sometimes_broken  # type: ignore[method-assign]
    found = search(SPACE, HALF, answers.score(), num_evaluations=40, seed=2)
    assert found.num_failed > 0 and len(found.evaluated) == 40
    assert all(one.widths["g0"] != 4 for one in found.evaluated if not one.is_estimate)
    assert np.isfinite([one.score for one in found.evaluated]).all()


def test_progress_tells_of_estimates_but_never_as_the_best():
    told: list[SearchProgress] = []
    search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=40, progress=told.append)
    assert any(one.last is not None and one.last.is_estimate for one in told)
    assert all(one.best is not None and not one.best.is_estimate for one in told)
    assert [one.num_done for one in told] == list(range(1, 41))


# Several budgets ------------------------------------------------------------------------------------------------------


def test_the_rival_is_the_lowest_best_of_the_budgets_that_a_candidate_keeps():
    budgets = [Budget(macs=share).resolve(SPACE) for share in ("30%", "45%", "60%")]
    score = Strict()
    results = search_each(SPACE, budgets, score, num_evaluations=90, seed=1)
    evaluated: list[Evaluation] = []
    for one in results[-1].evaluated:
        kept = [limits for limits in budgets if limits.holds(SPACE, one.widths)]
        inside = [[other for other in evaluated if limits.holds(SPACE, other.widths)] for limits in kept]
        if min(map(len, inside)) < 16:
            assert one.widths not in score.rivals
        else:
            best = [
                max((other for other in some if other.share == 1), key=lambda other: other.score) for some in inside
            ]
            assert score.rivals[one.widths] == min(best, key=lambda other: other.score).widths
        evaluated.append(one)
    assert len(set(score.rivals.values())) > 3
    for limits, result in zip(budgets, results, strict=True):
        inside = [score.score.of(one.widths) for one in evaluated if limits.holds(SPACE, one.widths)]
        assert result.best.score == max(inside)


def test_the_front_loses_nothing_and_what_is_stopped_is_beaten_by_something_cheaper():
    score = Strict()
    found = search_front(SPACE, Budget(macs="20%"), Budget(macs="70%"), score, num_evaluations=120, seed=1)
    stopped = [one for one in found.evaluated if one.is_estimate]
    assert len(stopped) > 20
    for one in stopped:
        assert SPACE.macs(score.rivals[one.widths]) <= one.macs
    # The estimates are the scores themselves.
    front = pareto_front(found.evaluated, [one.macs for one in found.evaluated])
    assert list(found.front) == front and not any(one.is_estimate for one in front)
    middle = found.best_within(Budget(macs="45%"))
    assert not middle.is_estimate
    assert middle.score == max(one.score for one in found.evaluated if one.macs <= 0.45 * SPACE.macs(SPACE.full()))


def test_on_a_front_of_two_resources_a_rival_is_no_dearer_in_either():
    score = Strict()
    low, high = Budget(macs="20%", params="25%"), Budget(macs="70%", params="70%")
    found = search_front(SPACE, low, high, score, num_evaluations=100, seed=1)
    assert len(score.rivals) > 10
    for resource, _ in found.budgets[-1].each():
        ours, theirs = (
            cost_of(SPACE, resource, SPACE.to_array(list(some))) for some in (score.rivals, score.rivals.values())
        )
        assert (theirs <= ours).all()


def test_estimates_that_are_the_best_of_a_tighter_budget_are_scored_to_the_end(tmp_path: Path):
    storage = tmp_path / "study.journal"
    loose = search(SPACE, Budget(macs="60%"), Strict(), num_evaluations=80, storage=storage)
    limits = Limits(macs=loose.best.macs - 1)
    inside = [one for one in loose.evaluated if limits.holds(SPACE, one.widths)]
    best, best_estimate = best_of(inside), max((one for one in inside if one.is_estimate), key=lambda one: one.score)
    assert best is None or best.score < best_estimate.score
    score = Strict()
    tight = search(SPACE, limits, score, num_evaluations=len(inside), storage=storage)
    assert len(tight.evaluated) == len({one.widths for one in tight.evaluated}) == len(inside)
    assert tight.best.widths == best_estimate.widths and not tight.best.is_estimate
    assert score.score.seen == [best_estimate.widths]
    again = search(SPACE, limits, Strict(), num_evaluations=len(inside), storage=storage)
    assert everything(again) == everything(tight)
    more = search(SPACE, limits, Strict(), num_evaluations=len(inside) + 10, storage=storage)
    assert len({one.widths for one in more.evaluated}) == len(inside) + 10


def test_finalists_are_scored_to_the_end():
    net_space = psenet.trace(*_net(), divisor=2)
    rng = np.random.default_rng(0)
    settings = list({net_space.sample(rng): None for _ in range(60)})
    latencies = 1e-4 * net_space.params(net_space.to_array(settings))
    space = net_space.with_latency(psenet.LatencyModel.fit(net_space, settings, latencies))
    evaluated = tuple(
        Evaluation(widths, 50.0 - number, 1, 1, 1.0 if number % 3 == 0 else 0.2)
        for number, widths in enumerate(settings[:12])
    )
    found = SearchResult(best=evaluated[0], evaluated=evaluated, num_failed=0, exhausted=False)
    measured: list[Widths] = []

    def measure_ms(widths: list[Widths]) -> list[float]:
        measured.extend(widths)
        return [1.0] * len(widths)

    search_measured(space, Limits(latency_ms=5.0), lambda limits: found, measure_ms)  # pyright: ignore[reportArgumentType]
    assert measured == settings[:12:3]


def _net():
    import torch
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1))
    return net, torch.zeros(1, 3, 8, 8)


# In parts, in several processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", [True, False])
def test_a_search_in_parts_equals_one_in_one_go(tmp_path: Path, predicts: bool):
    def run(num: int, storage: Path | None) -> SearchResult:
        predictor = Predictor.untrained(SPACE) if predicts else None
        score = Answers(SPACE).score()
        return search(SPACE, HALF, score, num_evaluations=num, seed=3, storage=storage, predictor=predictor)

    for num in (7, 23, 24, 41):
        parts = run(num, tmp_path / "study.journal")
    whole = run(41, None)
    assert everything(parts) == everything(whole) and parts.best == whole.best
    assert any(one.is_estimate for one in whole.evaluated)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path: Path):
    storage = str(tmp_path / "study.journal")
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_early_stopping import *
        class Killed(Answers):
            num_nets = 0
            def subnet(self, widths, /):
                self.num_nets += 1
                if self.num_nets == 30:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().subnet(widths)
        search(SPACE, HALF, Killed(SPACE).score(), num_evaluations=45, seed=1, storage={storage!r})
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    found = search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=45, seed=1, storage=storage)
    whole = search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=45, seed=1)
    assert everything(found) == everything(whole)
    assert any(one.is_estimate for one in whole.evaluated[:29]) and any(one.is_estimate for one in whole.evaluated[30:])


def test_a_kill_between_the_share_and_the_score_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage = str(tmp_path / "study.journal")
    tell, stopped = optuna.Study.tell, 0

    def dies(self: optuna.Study, trial: int, *values: object, **more: object):
        nonlocal stopped
        stopped += "psenet_share" in self.get_trials(deepcopy=False)[trial].user_attrs
        if stopped == 3 and values:
            raise KeyboardInterrupt
        return tell(self, trial, *values, **more)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", dies)
        with pytest.raises(KeyboardInterrupt):
            search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=45, seed=1, storage=storage)
    found = search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=45, seed=1, storage=storage)
    whole = search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=45, seed=1)
    assert everything(found) == everything(whole)


def test_workers_stop_where_this_process_would(tmp_path: Path):
    answers = Answers(SPACE)
    found = search(SPACE, HALF, answers.score(), num_evaluations=40, seed=1, workers=2)
    assert len({one.widths for one in found.evaluated}) == 40 and answers.num_seen == 0
    stopped = [one for one in found.evaluated if one.is_estimate]
    assert stopped and not found.best.is_estimate
    score = answers.score()
    whole = [one for one in found.evaluated if not one.is_estimate]
    assert all(one.score == score(one.widths) for one in whole)
    # Each was stopped beside one of those that were known by then.
    for one in stopped:
        assert (one.score, one.share) in [tuple(score.against(one.widths, rival.widths)) for rival in whole]


def test_the_study_keeps_the_share_of_what_was_stopped(tmp_path: Path):
    storage = tmp_path / "study.journal"
    found = search(SPACE, HALF, Answers(SPACE).score(), num_evaluations=30, storage=storage)
    opened = open_storage(storage)
    assert opened is not None
    trials = optuna.load_study(study_name="psenet", storage=opened).trials
    kept = [trial.user_attrs.get("psenet_share") for trial in trials]
    assert kept == [one.share if one.is_estimate else None for one in found.evaluated]
    assert any(kept)
