"""A study is carried on from candidate to candidate: it reads the same, and one more candidate takes no more work."""

import datetime
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from psenet import sampler as sampler_module
from psenet.budget import Budget, Limits
from psenet.cost import ProductCost
from psenet.evolution import search, search_each
from psenet.found import Evaluation, best_of
from psenet.growing import Growing
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.sampler import PriorEvolutionSampler
from psenet.scoring import Scored
from psenet.space import WidthSpace
from psenet.storage import RETRY_OF, open_study, put_back
from psenet.tally import BAD_SCORE, SHARE, StudyReader, Tally
from psenet.tried import Tried
from psenet.widths import Widths
from synthetic import Additive, make_space


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _budgets(space: WidthSpace) -> tuple[Limits, ...]:
    return tuple(Budget(macs=share).resolve(space) for share in ("30%", "50%", "80%"))


def _disturb(study: optuna.Study, sampler: PriorEvolutionSampler, rng: np.random.Generator) -> None:
    """Do one of the things that happen to a study."""
    trials = study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    again = [
        trial
        for trial in trials
        if trial.number not in retried and (trial.state == TrialState.FAIL or SHARE in trial.user_attrs)
    ]
    what = rng.integers(8)
    if what < 3 or not running:
        widths: Any = sampler.space.sample(rng)
        marks: dict[str, Any] = {}
        if again and rng.random() < 0.5:
            marks[RETRY_OF] = again[0].number
            widths = again[0].params
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING, params=dict(widths), distributions=sampler.distributions, user_attrs=marks
            )
        )
        return
    trial = running[int(rng.integers(len(running)))]
    handle = optuna.trial.Trial(study, trial._trial_id)
    if what < 6:
        if rng.random() < 0.3 and trial.number not in retried:
            handle.set_user_attr(SHARE, 0.5)
        study.tell(trial.number, float(rng.integers(12)))
    elif what == 6:
        handle.set_user_attr(BAD_SCORE, "nan")
        study.tell(trial.number, state=TrialState.FAIL)
    else:
        put_back(study, trial.number)


def _said(tally: Tally, space: WidthSpace, rng: np.random.Generator) -> list[Any]:
    """Return all that a tally says, by going through its trials where that is possible."""
    said: list[Any] = [[entry.trial.number for entry in part] for part in (tally.done, tally.failed)]
    said += [[trial.number for trial in tally.left_over], tally.best and tally.best.evaluation]
    for budget in range(3):
        doubtful = tally.doubtful(budget)
        said += [tally.evaluated(budget), tally.num_evaluated(budget), tally.num_failed(budget)]
        said += [doubtful and doubtful.trial.number, tally.rival(range(budget, 3), least=3)]
        said += [tally.rival_on_front((space.macs(space.sample(rng)),), least=3)]
    return said


def _expected(tally: Tally, space: WidthSpace, rng: np.random.Generator) -> list[Any]:
    """Return what `_said` must return."""
    evaluated = [entry.evaluation for entry in tally.done if entry.evaluation is not None]
    said: list[Any] = [[entry.trial.number for entry in part] for part in (tally.done, tally.failed)]
    said += [[trial.number for trial in tally.left_over], best_of(evaluated)]
    inside = [
        [entry.evaluation for entry in tally.done if budget in entry.budgets and entry.evaluation is not None]
        for budget in range(3)
    ]
    for budget in range(3):
        best = best_of(inside[budget])
        estimates = [
            entry
            for entry in tally.done
            if entry.evaluation is not None and entry.evaluation.is_estimate and budget in entry.budgets
        ]
        highest = max(estimates, key=lambda entry: entry.score, default=None)
        is_doubtful = highest is not None and (best is None or highest.score > best.score)
        rivals = [best_of(each) for each in inside[budget:]]
        whole: list[Evaluation] = [rival for rival in rivals if rival is not None]
        are_known = len(whole) == len(rivals) and all(len(each) >= 3 for each in inside[budget:])
        said += [inside[budget], len(inside[budget]), sum(budget in entry.budgets for entry in tally.failed)]
        said += [highest and is_doubtful and highest.trial.number or (0 if is_doubtful else None)]
        said += [min(whole, key=lambda evaluation: evaluation.score) if are_known else None]
        limit = space.macs(space.sample(rng))
        cheaper = [evaluation for evaluation in evaluated if evaluation.macs <= limit]
        said += [best_of(cheaper) if len(cheaper) >= 3 else None]
    return said


def _tried(tried: Tried, budgets: tuple[Limits, ...]) -> list[Any]:
    said: list[Any] = [tried.num_settings, tried.num_scores, [part.tolist() for part in tried.scored(at_most=5)]]
    for limits in budgets:
        inside = tried.inside(limits, at_most=4)
        said += [inside.num_settings, inside.levels.tolist(), inside.scores.tolist()]
    return said


@pytest.mark.parametrize("seed", range(6))
def test_a_study_read_after_every_change_reads_like_one_that_is_read_at_once(seed: int):
    space, rng = make_space(3), np.random.default_rng(seed)
    budgets = _budgets(space)
    sampler = PriorEvolutionSampler(space, budgets[0])
    study = open_study(None, "psenet", sampler, space)
    reader, tried = StudyReader(space, budgets, study), sampler.tried()
    for _ in range(150):
        _disturb(study, sampler, rng)
        tally = reader.read()
        tried.read(tally.trials)
        fresh, at_once = StudyReader(space, budgets, study).read(), sampler.tried()
        at_once.read(tally.trials)
        said = _said(tally, space, np.random.default_rng(seed))
        assert said == _said(fresh, space, np.random.default_rng(seed))
        assert said == _expected(fresh, space, np.random.default_rng(seed))
        assert _tried(tried, budgets) == _tried(at_once, budgets)


def _large_study(space: WidthSpace, score: Additive, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches open a study of so many evaluations."""
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr("psenet.storage.open_storage", lambda _: storage)
    limits = Budget(macs="50%").resolve(space)
    sampler = PriorEvolutionSampler(space, limits)
    study = open_study(None, "psenet", sampler, space)
    rows_NG = Prior.uniform(space).proposal(limits).sample(num, np.random.default_rng(0))
    now = datetime.datetime(2026, 1, 1)
    trials = storage._studies[study._study_id].trials
    for number, widths in enumerate(space.from_array(sampler._prior.levels.widths(rows_NG))):
        trials.append(
            FrozenTrial(
                *(number, TrialState.COMPLETE, score.of(widths), now, now, dict(widths)),
                *(sampler.distributions, {}, {}, {}, storage._max_trial_id + 1),
            )
        )
        storage._max_trial_id += 1
        storage._trial_id_to_study_id_and_number[storage._max_trial_id] = (study._study_id, number)


@pytest.mark.parametrize("num_budgets", [1, 3])
def test_one_more_candidate_takes_the_same_work_in_a_study_of_any_size(
    num_budgets: int, monkeypatch: pytest.MonkeyPatch
):
    space, num_more = make_space(8, tuple(range(8, 65, 8))), 6
    monkeypatch.setattr(sampler_module, "_LEARNED", 256)
    budgets = [Budget(macs=share) for share in ("50%", "45%", "40%")[:num_budgets]]
    params_of, by_term = FrozenTrial.params.fget, ProductCost.by_term
    assert params_of is not None
    work: dict[str, int] = {}

    def count(what: str, num: int) -> None:
        work[what] = work.get(what, 0) + num

    def counted_params(trial: FrozenTrial) -> dict[str, Any]:
        count("trials looked at", 1)
        return params_of(trial)

    def counted_by_term(cost: ProductCost, units_NG: np.ndarray) -> np.ndarray:
        count("settings whose cost was computed", len(units_NG))
        return by_term(cost, units_NG)

    def work_of_candidates(num: int) -> list[dict[str, int]]:
        told: list[dict[str, int]] = []
        score = Additive(space)

        def remember(_: object) -> None:
            told.append(dict(work))
            work.clear()

        with monkeypatch.context() as patch:
            _large_study(space, score, num, patch)
            patch.setattr(FrozenTrial, "params", property(counted_params))
            patch.setattr(ProductCost, "by_term", counted_by_term)
            search_each(
                space,
                budgets,
                score,
                num_evaluations=num + num_more,
                predictor=Predictor.untrained(space),
                progress=remember,
            )
        return told[num_budgets:]  # at the first turn of a budget all is gone through once

    for each in work_of_candidates(5000):
        assert each["trials looked at"] < 300
        assert each["settings whose cost was computed"] < 5000
    assert max(each["trials looked at"] for each in work_of_candidates(1000)) < 300


def test_what_is_learned_from_is_bounded_and_a_search_in_parts_still_equals_one_in_one_go(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    space = make_space(6, tuple(range(8, 65, 8)))
    score = Additive(space)
    monkeypatch.setattr(sampler_module, "_LEARNED", 12)
    learned: list[int] = []
    updated = Prior.updated

    def counted(prior: Prior, widths: Any, scores: Any, **options: Any) -> Prior:
        learned.append(len(scores))
        return updated(prior, widths, scores, **options)

    monkeypatch.setattr(Prior, "updated", counted)

    def run(where: str, num: int) -> tuple[Evaluation, ...]:
        return search(
            space,
            Budget(macs="40%"),
            score,
            num_evaluations=num,
            storage=tmp_path / where,
            predictor=Predictor.untrained(space),
        ).evaluated

    whole = run("whole", 50)
    assert max(learned) == 12
    for num in (7, 20, 33):
        run("parts", num)
    assert run("parts", 50) == whole


def test_a_space_is_searched_to_its_end_and_its_settings_are_listed_a_few_times_only(monkeypatch: pytest.MonkeyPatch):
    from psenet.proposal import Proposal

    space = make_space(4)
    monkeypatch.setattr(sampler_module, "_LISTED", 4)
    monkeypatch.setattr(sampler_module, "_TRIES", 1)
    listed: list[int] = []
    list_fitting = Proposal.list_fitting

    def counted(proposal: Proposal, at_most: int) -> tuple[np.ndarray, bool]:
        listed.append(at_most)
        return list_fitting(proposal, at_most)

    monkeypatch.setattr(Proposal, "list_fitting", counted)
    found = search(space, Budget(macs="90%"), Additive(space), num_evaluations=1000)
    assert found.exhausted and len(found.evaluated) > 200
    assert len(listed) < 12


def test_a_search_with_estimates_counts_them_once(tmp_path: Any):
    space = make_space(4)
    score = Additive(space)

    class Early:
        def __call__(self, widths: Widths) -> float:
            return score(widths)

        def against(self, widths: Widths, rival: Widths) -> Scored:
            value, least = score.of(widths), score.of(rival)
            return Scored(value) if value > least else Scored(least - 0.1, 0.4)

    low, high = Budget(macs="30%"), Budget(macs="60%")
    search(space, high, Early(), num_evaluations=60, storage=tmp_path / "s")
    found = search_each(space, [low, high], Early(), num_evaluations=70, storage=tmp_path / "s")
    for result in found:
        assert result.best.score >= max(evaluation.score for evaluation in result.evaluated)
        assert len({evaluation.widths for evaluation in result.evaluated}) == len(result.evaluated)


def test_an_array_grows_with_what_it_is_filled_with():
    growing = Growing(np.array([7, 7]))
    assert growing.values.shape == (0, 2)
    growing.append(np.array([1, 2]))
    growing.grow_to(3)
    growing.grow_to(2)
    assert growing.values.tolist() == [[1, 2], [7, 7], [7, 7]] and len(growing) == 3
