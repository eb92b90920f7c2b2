"""The predictor against least squares written out, and in the search."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import psenet
from psenet.budget import Budget
from psenet.errors import InputError
from psenet.evolution import search
from psenet.history import History
from psenet.predictor import LEAST_SCORES, Predictor
from psenet.space import WidthSpace
from psenet.widths import Widths
from synthetic import Additive, make_space, simulate_history


def _history(space: WidthSpace, score: Additive, *, noise: float, num: int = 4000) -> History:
    return simulate_history(space, score, seed=0, num=num, noise=noise)


def _sample(space: WidthSpace, num: int, seed: int = 5) -> list[Widths]:
    rng = np.random.default_rng(seed)
    return [space.sample(rng) for _ in range(num)]


def _rho(predictor: Predictor, score: Additive, widths: list[Widths]) -> float:
    return float(spearmanr(predictor.predict(widths)[0], [score.of(one) for one in widths])[0])  # pyright: ignore[reportArgumentType, reportIndexIssue]


def test_scored_candidates_tell_the_score_of_others_with_an_honest_uncertainty():
    space = make_space(6)
    score, known, unknown = Additive(space, 1), _sample(space, 80), _sample(space, 200, seed=6)
    rng = np.random.default_rng(0)
    noisy = [score.of(widths) + 0.1 * rng.normal() for widths in known]
    predictor = Predictor.untrained(space).updated(known, noisy)
    mean_N, std_N = predictor.predict(unknown)
    error_N = mean_N - np.array([score.of(widths) for widths in unknown])
    assert _rho(predictor, score, unknown) > 0.95
    assert 0.3 < np.sqrt(np.mean(error_N**2)) / np.sqrt(np.mean(std_N**2)) < 1.5
    assert std_N.min() > 0.05


def test_losses_of_training_rank_subnets_of_equal_cost_before_any_is_scored():
    space = make_space(6)
    score = Additive(space, 2)
    predictor = Predictor.fit(_history(space, score, noise=0.5), space)
    widths = _sample(space, 3000, seed=8)
    macs = space.macs(widths)
    # What cost does to a score is not in it: it is for the choice among candidates of one budget.
    near = [one for one, cost in zip(widths, macs, strict=True) if abs(cost / np.median(macs) - 1) < 0.03]
    assert len(near) > 40
    assert _rho(predictor, score, near) > 0.6
    assert not predictor.predict(near)[1].any()


def test_training_helps_where_few_candidates_are_scored():
    space = make_space(8)
    score, unknown = Additive(space, 3), _sample(space, 300, seed=9)
    informed = Predictor.fit(_history(space, score, noise=1.0), space)
    gains = []
    for seed in range(8):
        known = _sample(space, 8, seed=seed)
        scores = [score.of(widths) for widths in known]
        with_history = _rho(informed.updated(known, scores), score, unknown)
        gains.append(with_history - _rho(Predictor.untrained(space).updated(known, scores), score, unknown))
    assert np.mean(gains) > 0.02


def test_predictions_are_those_of_the_regression():
    space = make_space(6)
    score = Additive(space)
    rng = np.random.default_rng(0)
    seen, unseen = ([space.sample(rng) for _ in range(num)] for num in (30, 20))
    predictor = Predictor.untrained(space).updated(seen, [score.of(widths) for widths in seen])
    features_NF = predictor._all_features(space.to_array(unseen))
    for ours, theirs in zip(predictor.predict(unseen), predictor.scores.predict(features_NF, True), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("num", [0, LEAST_SCORES - 1])
def test_too_few_scores_say_nothing(num: int):
    space = make_space()
    known = _sample(space, num)
    predictor = Predictor.untrained(space).updated(known, [float(n) for n in range(num)])
    assert predictor.scores is None and not predictor.knows_something
    assert not predictor.predict(_sample(space, 5))[0].any()


def test_equal_scores_and_scores_that_are_not_finite_say_nothing():
    space = make_space()
    known = _sample(space, 6)
    assert Predictor.untrained(space).updated(known, [1.0] * 6).scores is None
    assert Predictor.untrained(space).updated(known, [1.0, 2.0, 3.0, np.nan, np.inf, np.nan]).scores is None


def test_an_update_replaces_the_scores_and_leaves_the_old_predictor_alone():
    space = make_space()
    score, known = Additive(space), _sample(space, 30)
    first = Predictor.untrained(space).updated(known, [score.of(widths) for widths in known])
    before = first.predict(known)[0].copy()
    second = first.updated(known, [-score.of(widths) for widths in known])
    np.testing.assert_array_equal(first.predict(known)[0], before)
    # Of the negated scores alone, all that is learned is negated, up to the mean.
    np.testing.assert_allclose(second.predict(known)[0], -before, atol=1e-6)


def test_scores_and_candidates_must_match():
    space = make_space()
    with pytest.raises(InputError, match=r"expected 3 scores, one a candidate; got shape \(2,\)"):
        Predictor.untrained(space).updated(_sample(space, 3), [1.0, 2.0])


def test_a_history_of_another_space_is_refused():
    space, other = make_space(), make_space(5)
    with pytest.raises(InputError, match="the history belongs to another width space"):
        Predictor.fit(_history(other, Additive(other), noise=0.1, num=80), space)


def test_an_empty_history_is_no_training_at_all():
    space = make_space()
    assert not Predictor.fit(History(space), space).knows_something


# In the search --------------------------------------------------------------------------------------------------------


def test_a_search_with_a_predictor_stays_inside_the_budget_and_repeats_nothing():
    space = make_space(6)
    score, limit = Additive(space, 4), int(0.4 * space.macs(space.full()))
    found = search(space, Budget(macs=limit), score, predictor=Predictor.untrained(space), num_evaluations=60, seed=1)
    assert len({*score.seen}) == len(score.seen) == 60
    assert all(space.macs(widths) <= limit for widths in score.seen)
    assert found.best.score == max(map(score.of, score.seen))


def test_predictions_made_before_scoring_are_compared_with_the_scores():
    space = make_space(6)
    arguments = space, Budget(macs="50%"), Additive(space, 5)
    with_predictor = search(*arguments, predictor=Predictor.untrained(space), num_evaluations=50)
    assert with_predictor.predicted_rank_correlation is not None
    assert 0.3 < with_predictor.predicted_rank_correlation <= 1
    assert search(*arguments, num_evaluations=50).predicted_rank_correlation is None
    noise = np.random.default_rng(0)
    blind = search(
        *arguments[:2], lambda widths: noise.normal(), predictor=Predictor.untrained(space), num_evaluations=80
    )
    assert blind.predicted_rank_correlation is not None and abs(blind.predicted_rank_correlation) < 0.3


def test_with_a_predictor_the_best_of_forty_is_better():
    space = make_space(8, choices=tuple(range(2, 18, 2)))
    gains = []
    for seed in range(10):
        best = {}
        for predictor in (Predictor.untrained(space), None):
            found = search(
                space, Budget(macs="40%"), Additive(space, seed), predictor=predictor, num_evaluations=40, seed=seed
            )
            best[predictor is None] = found.best.score
        gains.append(best[False] - best[True])
    assert np.mean(gains) > 0 and np.mean(np.array(gains) > 0) > 0.5


def test_a_predictor_of_another_space_is_refused():
    space = make_space()
    with pytest.raises(InputError, match="the predictor belongs to another width space: fit it with this one"):
        search(space, Budget(macs="50%"), lambda widths: 0.0, predictor=Predictor.untrained(make_space(5)))


def test_a_search_in_parts_with_a_predictor_equals_one_in_one_go(tmp_path: Path):
    space = make_space(6)
    whole, parts = Additive(space, 6), Additive(space, 6)
    arguments = space, Budget(macs="50%")
    search(*arguments, whole, predictor=Predictor.untrained(space), num_evaluations=54, seed=2)
    for number in (7, 35, 41, 54):  # from 32 on the predictor does not learn from every single score
        search(
            *arguments,
            parts,
            predictor=Predictor.untrained(space),
            num_evaluations=number,
            seed=2,
            storage=tmp_path / "study.journal",
        )
    assert parts.seen == whole.seen


def test_the_more_scores_there_are_the_rarer_it_learns(monkeypatch: pytest.MonkeyPatch):
    learned: list[int] = []
    updated = Predictor.updated

    def counted(self: Predictor, widths: np.ndarray, scores: list[float]) -> Predictor:
        learned.append(len(scores))
        return updated(self, widths, scores)

    monkeypatch.setattr(Predictor, "updated", counted)
    space = make_space(6)
    search(space, Budget(macs="50%"), Additive(space, 6), predictor=Predictor.untrained(space), num_evaluations=68)
    assert learned == [*range(32), *range(32, 48, 2), *range(48, 64, 3), 64]


def test_it_is_a_public_name():
    assert psenet.Predictor is Predictor
