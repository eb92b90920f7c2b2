import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest

from psenet.budget import Budget, Limits
from psenet.errors import InputError
from psenet.evolution import SearchProgress, SearchResult, search
from psenet.prior import Prior
from psenet.sampler import PriorEvolutionSampler
from psenet.space import WidthSpace
from psenet.widths import Widths
from synthetic import Additive, make_space, simulate_history


def fit_prior(space: WidthSpace, score: Additive, seed: int, num: int = 2000) -> Prior:
    return Prior.fit(simulate_history(space, score, seed=seed, num=num, noise=0.3), space)


@pytest.mark.parametrize("seed", range(5))
def test_the_search_comes_to_the_best_that_brute_force_finds(seed: int):
    space = make_space()
    score = Additive(space, seed)
    limit = int(0.4 * space.macs(space.full()))
    found = search(space, Limits(macs=limit), score, num_evaluations=60, seed=seed)
    assert found.best.score == pytest.approx(score.best_inside(limit))
    assert found.best.score == score.of(found.best.widths)


def test_every_evaluation_is_inside_the_budget_new_and_in_order():
    space = make_space(8, tuple(range(8, 65, 8)))
    score = Additive(space)
    budget = Budget(macs="40%", params="35%")
    limits = budget.resolve(space)
    found = search(space, budget, score, num_evaluations=80)
    assert [evaluation.widths for evaluation in found.evaluated] == score.seen
    assert len(set(score.seen)) == len(score.seen) == 80
    for evaluation in found.evaluated:
        assert evaluation.macs == space.macs(evaluation.widths) <= (limits.macs or 0)
        assert evaluation.params == space.params(evaluation.widths) <= (limits.params or 0)
        assert evaluation.score == score.of(evaluation.widths)
    assert found.best.score == max(evaluation.score for evaluation in found.evaluated)
    assert not found.exhausted and found.num_failed == 0


def test_guided_by_a_prior_it_needs_fewer_evaluations_than_random_sampling():
    space = make_space(10, tuple(range(8, 65, 8)))
    limit = int(0.3 * space.macs(space.full()))
    guided, blind, random = [], [], []
    for seed in range(5):
        score = Additive(space, seed)
        prior = fit_prior(space, score, seed)
        guided.append(search(space, Limits(macs=limit), score, prior=prior, num_evaluations=15, seed=seed).best.score)
        blind.append(search(space, Limits(macs=limit), score, num_evaluations=15, seed=seed).best.score)
        rng = np.random.default_rng(seed)
        rows_NG = 8 * rng.integers(1, 9, size=(20_000, 10))
        rows_NG = rows_NG[space.macs(rows_NG) <= limit][:150]
        random.append(max(score.of(widths) for widths in space.from_array(rows_NG)))
        assert len(rows_NG) == 150
    # Fifteen guided evaluations beat 150 random ones inside the budget on every landscape.
    assert all(one > other for one, other in zip(guided, random, strict=True))
    assert np.mean(guided) > np.mean(blind)


def test_a_whole_space_is_evaluated_once_and_the_result_says_so():
    space = make_space(3, (2, 4, 6))
    limit = int(0.5 * space.macs(space.full()))
    inside = {
        row
        for row in itertools.product((2, 4, 6), repeat=3)
        if 16 * 3 * row[0] + 8 * row[0] * row[1] + 4 * row[1] * row[2] <= limit
    }
    score = Additive(space)
    found = search(space, Limits(macs=limit), score, num_evaluations=100)
    assert found.exhausted
    assert {tuple(widths.values()) for widths in score.seen} == inside
    assert len(score.seen) == len(inside)


def test_an_unreachable_budget_is_refused_before_any_evaluation():
    space = make_space()
    score = Additive(space)
    with pytest.raises(InputError, match="the smallest reachable is"):
        search(space, Budget(macs="1%"), score)
    assert score.seen == []


def test_settings_out_of_range_are_named_together():
    space = make_space()
    with pytest.raises(
        InputError, match=r"num_evaluations must be at least 1; got 0; population_size must be .*; the prior belongs to"
    ):
        search(
            space,
            Budget(macs="50%"),
            Additive(space),
            prior=Prior.uniform(make_space(2)),
            num_evaluations=0,
            population_size=1,
        )


def test_a_score_that_is_not_finite_fails_its_candidate_only():
    space = make_space()
    score = Additive(space)
    bad = [float("nan"), float("inf")]

    def sometimes(widths: Widths) -> float:
        value = score(widths)
        return bad[len(score.seen) % 2] if len(score.seen) % 3 == 0 else value

    found = search(space, Budget(macs="50%"), sometimes, num_evaluations=20)
    assert len(found.evaluated) == 20 and found.num_failed == len(score.seen) - 20 >= 9
    assert len(set(score.seen)) == len(score.seen)
    assert np.isfinite([evaluation.score for evaluation in found.evaluated]).all()


def test_a_score_that_is_never_finite_is_an_error():
    space = make_space()
    with pytest.raises(RuntimeError, match="all 20 candidates failed: the score was never finite"):
        search(space, Budget(macs="50%"), lambda widths: float("nan"), num_evaluations=50)
    tiny = Limits(macs=space.macs(space.smallest()))
    with pytest.raises(RuntimeError, match="all 1 candidates inside the budget failed"):
        search(space, tiny, lambda widths: float("nan"), num_evaluations=50)


def test_progress_is_told_after_every_candidate():
    space = make_space()
    told: list[SearchProgress] = []
    score = Additive(space)
    found = search(space, Budget(macs="50%"), score, num_evaluations=7, progress=told.append)
    assert [progress.num_done for progress in told] == list(range(1, 8))
    assert [progress.last and progress.last.widths for progress in told] == score.seen
    assert told[-1].best == found.best and told[-1].num_evaluations == 7


def test_optuna_logs_nothing_and_keeps_its_verbosity(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.INFO)
    try:
        search(make_space(), Budget(macs="50%"), Additive(make_space()), num_evaluations=3)
        assert optuna.logging.get_verbosity() == logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr().err == ""


def evaluations(found: SearchResult) -> list[tuple[Widths, float]]:
    return [(evaluation.widths, evaluation.score) for evaluation in found.evaluated]


@pytest.mark.parametrize("learn", [True, False])
def test_the_same_seed_gives_the_same_search(learn: bool):
    space = make_space(8)
    score = Additive(space)
    prior = fit_prior(space, score, 0)

    def run(seed: int) -> list[tuple[Widths, float]]:
        return evaluations(
            search(space, Budget(macs="50%"), score, prior=prior, num_evaluations=40, seed=seed, learn=learn)
        )

    assert run(3) == run(3)
    assert run(3) != run(4)


def to_journal(folder: Path) -> str:
    return str(folder / "deep" / "study.journal")


def to_sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/study.db"


@pytest.mark.parametrize("where", [to_journal, to_sqlite])
def test_a_search_in_parts_equals_one_in_one_go(tmp_path: Path, where: Callable[[Path], str]):
    space = make_space(5)
    score = Additive(space)
    whole = search(space, Budget(macs="50%"), score, num_evaluations=24, seed=1)
    storage = where(tmp_path)
    for num in (1, 11, 11, 24):
        parts = search(space, Budget(macs="50%"), score, num_evaluations=num, seed=1, storage=storage)
        assert len(parts.evaluated) == num
    assert evaluations(parts) == evaluations(whole)
    assert parts.best == whole.best
    assert len(score.seen) == 48


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_scoring_goes_through_and_the_search_can_go_on(tmp_path: Path, error: type[BaseException]):
    space = make_space(6)
    score = Additive(space)
    whole = search(space, Budget(macs="50%"), score, num_evaluations=30, seed=1)

    def fails_at_20(widths: Widths) -> float:
        if widths == whole.evaluated[19].widths:
            raise error
        return score(widths)

    storage = to_journal(tmp_path)
    for _ in range(2):
        with pytest.raises(error):
            search(space, Budget(macs="50%"), fails_at_20, num_evaluations=30, seed=1, storage=storage)
    found = search(space, Budget(macs="50%"), score, num_evaluations=30, seed=1, storage=storage)
    assert evaluations(found) == evaluations(whole)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path: Path):
    storage = to_journal(tmp_path)
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_evolution import Additive, Budget, make_space, search
        space = make_space(6)
        score = Additive(space)
        def kills_itself(widths):
            value = score(widths)
            if len(score.seen) == 18:
                os.kill(os.getpid(), signal.SIGKILL)
            return value
        search(space, Budget(macs="50%"), kills_itself, num_evaluations=30, seed=1, storage={storage!r})
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    space = make_space(6)
    score = Additive(space)
    found = search(space, Budget(macs="50%"), score, num_evaluations=30, seed=1, storage=storage)
    assert len(score.seen) == 30 - 17
    whole = search(space, Budget(macs="50%"), Additive(space), num_evaluations=30, seed=1)
    assert evaluations(found) == evaluations(whole)


def test_two_workers_on_one_storage_never_score_the_same_widths(tmp_path: Path):
    # The second worker runs inside the first one's scoring: each sees a candidate of the other in progress.
    space = make_space(4)
    storage = to_journal(tmp_path)
    inner, outer = Additive(space), Additive(space)

    def outer_score(widths: Widths) -> float:
        if len(outer.seen) == 5:
            search(space, Budget(macs="50%"), inner, num_evaluations=20, seed=1, storage=storage)
        return outer(widths)

    found = search(space, Budget(macs="50%"), outer_score, num_evaluations=30, seed=1, storage=storage)
    assert len(inner.seen) == 15
    assert len(set(inner.seen + outer.seen)) == len(inner.seen + outer.seen) == len(found.evaluated) == 30


def test_a_study_of_another_space_is_refused(tmp_path: Path):
    storage = to_journal(tmp_path)
    space, other = make_space(4), make_space(4, name="h")
    search(space, Budget(macs="50%"), Additive(space), num_evaluations=2, storage=storage)
    with pytest.raises(InputError, match=r"study 'psenet' in .*study.journal belongs to another width space"):
        search(other, Budget(macs="50%"), Additive(other), num_evaluations=2, storage=storage)
    named = search(other, Budget(macs="50%"), Additive(other), num_evaluations=2, storage=storage, study_name="other")
    assert len(named.evaluated) == 2


@pytest.mark.parametrize("content", [None, b"not a journal\n", b"\x00\xff", b'{"a": 1}', b"[1]\n"])
def test_a_storage_that_cannot_be_opened_is_named(tmp_path: Path, content: bytes | None):
    space = make_space(4)
    path = tmp_path / "study"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"the storage '.*study' cannot be opened \(.*\): give another path"):
        search(space, Budget(macs="50%"), Additive(space), num_evaluations=2, storage=path)
    assert content is None or path.read_bytes() == content


def test_a_password_is_not_repeated_in_a_message():
    space = make_space(4)
    with pytest.raises(InputError, match=r"the storage 'nosuch://me:\*\*\*@here/db' cannot be opened"):
        search(space, Budget(macs="50%"), Additive(space), num_evaluations=2, storage="nosuch://me:secret@here/db")


def test_a_record_that_a_crash_left_half_written_is_cut_off(tmp_path: Path):
    space = make_space(4)
    score = Additive(space)
    path = tmp_path / "study"
    whole = search(space, Budget(macs="50%"), score, num_evaluations=9)
    search(space, Budget(macs="50%"), score, num_evaluations=5, storage=path)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    found = search(space, Budget(macs="50%"), score, num_evaluations=9, storage=path)
    assert evaluations(found) == evaluations(whole)


def test_the_sampler_serves_a_study_of_optunas_own():
    space = make_space(5)
    score = Additive(space)
    limits = Budget(macs="50%").resolve(space)
    study = optuna.create_study(direction="maximize", sampler=PriorEvolutionSampler(space, limits, seed=1))

    def objective(trial: optuna.Trial) -> float:
        widths = Widths({group.name: trial.suggest_int(group.name, 2, 8, step=2) for group in space.groups})
        return score(widths)

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study.optimize(objective, n_trials=30)
    optuna.logging.set_verbosity(verbosity)
    assert all(limits.holds(space, widths) for widths in score.seen)
    assert len(set(score.seen)) == 30
    found = search(space, limits, Additive(space), num_evaluations=30, seed=1)
    assert [evaluation.widths for evaluation in found.evaluated] == score.seen


def test_the_sampler_refuses_parameters_that_are_no_groups():
    space = make_space(2)
    sampler = PriorEvolutionSampler(space, Budget(macs="50%").resolve(space))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    with pytest.raises(ValueError, match="parameter 'depth' is no channel group"):
        study.ask().suggest_int("depth", 1, 3)


def test_unevenly_spaced_choices_are_kept_as_they_are():
    space = make_space(4, (1, 2, 6, 8))
    score = Additive(space)
    limit = int(0.5 * space.macs(space.full()))
    found = search(space, Limits(macs=limit), score, num_evaluations=70)
    assert found.best.score == pytest.approx(score.best_inside(limit))


def test_importing_psenet_evolution_does_not_import_optuna():
    code = "import sys, psenet.evolution; sys.exit('optuna' in sys.modules or 'sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_storage_serves_several_budgets_each_with_its_own_evaluations(tmp_path: Path):
    space = make_space(5)
    storage = to_journal(tmp_path)
    loose = search(space, Budget(macs="70%"), Additive(space), num_evaluations=12, storage=storage)
    score = Additive(space)
    tight = search(space, Budget(macs="30%"), score, num_evaluations=12, storage=storage)
    limits = Budget(macs="30%").resolve(space)
    assert len(tight.evaluated) == 12
    assert all(limits.holds(space, evaluation.widths) for evaluation in tight.evaluated)
    assert not {evaluation.widths for evaluation in loose.evaluated} & set(score.seen)


def test_what_a_search_of_another_budget_left_outside_is_not_evaluated(tmp_path: Path):
    space = make_space(5)
    storage = to_journal(tmp_path)

    def fail(widths: Widths) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(space, Budget(macs="90%"), fail, num_evaluations=5, storage=storage)
    score = Additive(space)
    found = search(space, Budget(macs="20%"), score, num_evaluations=5, storage=storage)
    limits = Budget(macs="20%").resolve(space)
    assert len(found.evaluated) == 5 and all(limits.holds(space, widths) for widths in score.seen)
