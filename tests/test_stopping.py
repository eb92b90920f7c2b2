"""Scores that stop early, against a replay of the known answers of every subnet."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from answers import Answers
from psenet.evaluate import SupernetScore, accuracy, soft_accuracy
from psenet.scoring import Scored, scored
from psenet.space import WidthSpace
from psenet.stopping import is_hopeless, shuffled
from psenet.widths import Widths
from synthetic import make_space


@pytest.fixture
def space() -> WidthSpace:
    return make_space()


def _settings(space: WidthSpace, num: int) -> list[Widths]:
    rng = np.random.default_rng(0)
    return list({space.sample(rng): None for _ in range(2 * num)})[:num]


def _order(num_samples: int) -> np.ndarray:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(0)).numpy()


def _replay(values_N: np.ndarray, rival_N: np.ndarray, *, batch: int) -> tuple[float, float]:
    """Compare two nets sample by sample as the rule is written, and return score and share."""
    num = len(values_N)
    ours, theirs = values_N[_order(num)].tolist(), rival_N[_order(num)].tolist()
    last = 192
    for seen in range(batch, num, batch):
        if seen - last < 64:
            continue
        last = seen
        differences = [one - other for one, other in zip(ours[:seen], theirs[:seen], strict=True)]
        mean = sum(differences) / seen
        variance = sum((difference - mean) ** 2 for difference in differences) / (seen - 1)
        if mean + 3 * math.sqrt(variance / seen * (1 - seen / num)) < 0:
            return 100 * (sum(theirs) / num + mean), seen / num
    return 100 * sum(ours) / num, 1.0


# One comparison -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch"), [(250, 128), (100, 100), (24, 24)])
def test_a_hopeless_net_is_stopped_where_a_replay_stops_it(space: WidthSpace, size: int, batch: int):
    answers = Answers(space)
    score = SupernetScore(answers, answers.batches(), answers.batches(size), score_fn=soft_accuracy)
    widths = _settings(space, 12)
    shares = set()
    for one in widths:
        for rival in widths[:3]:
            found = score.against(one, rival)
            expected = _replay(answers.probability(one), answers.probability(rival), batch=batch)
            assert found == (pytest.approx(expected[0], rel=1e-5), expected[1])
            shares.add(found.share)
    assert min(shares) < 0.2 and len(shares) > 3 and max(shares) == 1


def test_accuracy_stops_by_right_answers(space: WidthSpace):
    answers = Answers(space)
    score = SupernetScore(answers, answers.batches(), answers.batches())
    widths = _settings(space, 12)
    found = [score.against(one, widths[0]) for one in widths]
    right = [(answers.probability(one) > 0.5).astype(float) for one in widths]
    assert [one.share for one in found] == [_replay(one, right[0], batch=128)[1] for one in right]
    assert min(one.share for one in found) < 1
    assert [one.score for one in found] == pytest.approx([_replay(one, right[0], batch=128)[0] for one in right])


def test_a_score_to_the_end_is_what_a_call_and_the_score_function_give(space: WidthSpace):
    answers = Answers(space)
    best, *others = sorted(_settings(space, 8), key=lambda one: -answers.probability(one).mean())
    for score_fn in (None, accuracy, soft_accuracy):
        for rival in others:
            fresh = [SupernetScore(answers, answers.batches(), answers.batches(), score_fn=score_fn) for _ in range(2)]
            plain = (score_fn or accuracy)(answers.subnet(best), answers.batches())
            assert fresh[0].against(best, rival) == Scored(fresh[1](best), 1.0)
            assert fresh[1](best) == pytest.approx(plain, rel=1e-6)


def test_the_smaller_part_of_the_samples_is_run_and_a_rival_only_once(space: WidthSpace):
    answers = Answers(space)
    worst, *_, best = sorted(_settings(space, 8), key=lambda one: answers.probability(one).mean())
    score = answers.score()
    shares = [score.against(worst, best).share for _ in range(3)]
    assert shares == [256 / 2000] * 3
    assert answers.num_seen == 2000 + 3 * 256


def test_a_net_that_is_worse_on_the_first_classes_only_is_not_stopped(space: WidthSpace):
    """Its first images in the order of the data are all of the class that it is bad at."""
    answers = Answers(space, noise=0)
    one, other = _settings(space, 2)
    better = answers.probability(one)
    strange = np.clip(better + np.where(answers.labels_N == 0, -0.05, 0.3), 1e-3, 1 - 1e-3)
    assert strange.mean() > better.mean() and answers.labels_N[:900].max() == 0
    answers.probability = lambda widths: better if widths == one else strange  # type: ignore[method-assign]
    assert answers.score().against(other, one).share == 1.0
    assert answers.score().against(one, other).share < 0.3


def test_the_latest_rivals_are_remembered_and_no_more(space: WidthSpace):
    answers = Answers(space, num_samples=300)
    score, widths = answers.score(), _settings(space, 40)
    for one in widths:
        score(one)
    for rival, num_run in ((widths[-1], 300), (widths[8], 300), (widths[7], 600)):
        answers.num_seen = 0
        score.against(rival, rival)
        assert answers.num_seen == num_run
    score(widths[-1])
    assert answers.num_seen == 900  # a call measures, whatever is remembered: the supernet may have been trained on


def test_another_process_stops_at_the_same_place(space: WidthSpace):
    answers = Answers(space)
    one, rival, other = _settings(space, 3)
    score = answers.score()
    score(other)
    copy = pickle.loads(pickle.dumps(score))
    assert copy.against(one, rival) == score.against(one, rival) == score.against(one, rival)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_net_is_nan_as_soon_as_that_is_seen(space: WidthSpace, value: float):
    answers = Answers(space)
    worst, *_, best = sorted(_settings(space, 8), key=lambda one: answers.probability(one).mean())
    score = answers.score()
    score(best)
    answers.broken = {int(_order(2000)[40]): value}
    found = score.against(worst, best)
    assert math.isnan(found.score) and found.share == 128 / 2000
    assert math.isnan(answers.score()(worst))
    answers.broken = {int(_order(2000)[1990]): value}
    assert math.isfinite(score.against(worst, best).score)  # it was hopeless before


def test_nothing_is_hopeless_beside_a_broken_rival(space: WidthSpace):
    answers = Answers(space)
    one, rival = _settings(space, 2)
    score = answers.score()
    answers.broken = {3: math.nan}
    assert math.isnan(score(rival))
    answers.broken = {}
    assert score.against(one, rival) == (score(one), 1.0)


def test_samples_without_a_label_do_not_count_and_are_not_run(space: WidthSpace):
    answers = Answers(space)
    unlabelled = np.random.default_rng(1).random(2000) < 0.3
    answers.labels_N = np.where(unlabelled, -100, answers.labels_N)
    one, rival = _settings(space, 2)
    score = answers.score()
    plain = soft_accuracy(answers.subnet(one), answers.batches())
    answers.num_seen = 0
    assert score(one) == pytest.approx(plain, rel=1e-6)
    assert answers.num_seen == (~unlabelled).sum()
    assert score.against(rival, one).share <= 1


# What cannot stop -----------------------------------------------------------------------------------------------------


class _OneNet:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def subnet(self, widths: Widths, /) -> nn.Module:
        """Return the net, or one that is wrong wherever it is right."""
        return self.net if next(iter(widths.values())) == 8 else nn.Sequential(self.net, _Negated())


class _Negated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


def _dense() -> list[Any]:
    x = torch.randn(600, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return list(zip((9 * x).split(50), x.argmax(dim=1).split(50), strict=True))


def _of_two_sizes() -> list[Any]:
    large, small = (torch.randn(300, 3, size, size) for size in (4, 2))
    return [(9 * x, x.mean((2, 3)).argmax(dim=1)) for x in (large, small)]


def _with_names() -> list[Any]:
    x = torch.randn(600, 3)
    return [(9 * x, x.argmax(dim=1), "name")]


@pytest.mark.parametrize(
    ("batches", "net"),
    [
        (_dense, nn.Identity()),
        (_of_two_sizes, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())),
        (_with_names, nn.Identity()),
    ],
)
def test_data_that_cannot_be_put_into_another_order_are_scored_to_the_end(batches: Any, net: nn.Module):
    torch.manual_seed(0)
    given = batches()
    score = SupernetScore(_OneNet(net), given, given, score_fn=soft_accuracy)
    good, bad = Widths({"g": 8}), Widths({"g": 2})
    assert score(good) == pytest.approx(soft_accuracy(net, given)) and score(good) > 80
    assert score.against(bad, good) == (score(bad), 1.0) and score(bad) < 20


def test_a_score_of_ones_own_is_taken_to_the_end_on_the_batches_as_they_came(space: WidthSpace):
    answers = Answers(space)
    given: list[Any] = []

    def score_fn(module: nn.Module, batches: Any) -> float:
        given[:] = batches
        return soft_accuracy(module, batches)

    score = SupernetScore(answers, answers.batches(), answers.batches(), score_fn=score_fn)
    worst, *_, best = sorted(_settings(space, 8), key=lambda one: answers.probability(one).mean())
    assert score.against(worst, best) == (score(worst), 1.0)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(given, answers.batches(), strict=True))


def test_a_plain_function_is_called_whatever_the_rival(space: WidthSpace):
    one, rival = _settings(space, 2)
    assert scored(lambda widths: 3, one, rival) == (3.0, 1.0)
    answers = Answers(space)
    assert scored(answers.score(), one, None) == (answers.score()(one), 1.0)


# The parts ------------------------------------------------------------------------------------------------------------


def test_a_clear_and_certain_difference_is_hopeless():
    rng = np.random.default_rng(0)
    noise_M = rng.normal(size=400)
    noise_M = (noise_M - noise_M.mean()) / noise_M.std(ddof=1)
    # The standard error of 400 of very many is 1/20, of 400 of 625 it is 0.6 of that.
    for mean, num_samples, expected in (
        *((-0.16, 10**9, True), (-0.14, 10**9, False)),
        *((-0.1, 625, True), (-0.08, 625, False), (0.5, 625, False), (-1e-3, 400, True)),
    ):
        assert is_hopeless(noise_M + mean, num_samples) is expected
    assert not is_hopeless(np.array([-1.0]), 10) and not is_hopeless(np.zeros(300), 400)


def test_as_good_a_net_is_almost_never_taken_for_hopeless():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(1000):
        difference_N = rng.normal(size=2000)
        difference_N -= difference_N.mean()
        wrong += any(is_hopeless(difference_N[:seen], 2000) for seen in range(256, 2000, 128))
    assert wrong / 1000 < 0.015


def test_all_samples_are_there_in_a_random_order_that_is_always_the_same():
    batches = [(torch.arange(start, start + 30)[:, None], torch.arange(start, start + 30)) for start in (0, 30, 60)]
    found, again = shuffled(batches, ignored=-100), shuffled([list(batch) for batch in batches], ignored=-100)
    assert found is not None and again is not None
    numbers = torch.cat([labels for _, labels in found])
    assert sorted(numbers.tolist()) == list(range(90)) != numbers.tolist()
    assert torch.equal(numbers, torch.cat([labels for _, labels in again]))
    assert all(torch.equal(x[:, 0], labels) and len(x) == 30 for x, labels in found)
    # Of its own memory, or each batch would be sent to another process with all others.
    assert all(x.untyped_storage().nbytes() == 30 * 8 for x, _ in found)
    assert shuffled([(torch.zeros(3, 1), torch.full((3,), -100))], ignored=-100) is None
