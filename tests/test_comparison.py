"""Statistics of two nets' answers, against counts by hand, scipy's own bootstrap, and simulated data."""

import math
from decimal import ROUND_UP, Context
from typing import Any

import numpy as np
import pytest
from scipy import stats

from psenet.comparison import (
    Comparison,
    compare_answers,
    draw_samples,
    images_needed,
    sampled_differences,
    verdict,
)
from psenet.errors import InputError


def _answers(both: int, only_first: int, only_second: int, neither: int, *, seed: int = 0) -> tuple[Any, Any]:
    """Return the answers of two nets that are right so often, in any order."""
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    order = np.random.default_rng(seed).permutation(len(first))
    return first[order], second[order]


def _made(**changes: Any) -> Comparison:
    fields = {"num_images": 250, "num_only_first": 6, "num_only_second": 4, "confidence": 0.95}
    return Comparison(**{**fields, "low": -1.5, "high": 3.0, "p_value": 0.75, **changes})


# A difference, its interval and its test ------------------------------------------------------------------------------


def test_the_counts_and_the_difference_are_those_of_the_answers():
    comparison = compare_answers(*_answers(150, 12, 4, 34))
    assert (comparison.num_images, comparison.num_only_first, comparison.num_only_second) == (200, 12, 4)
    assert comparison.difference == pytest.approx(4.0)
    assert (comparison.confidence, comparison.low < 4.0 < comparison.high) == (0.95, True)


@pytest.mark.parametrize(("only_first", "only_second"), [(12, 4), (4, 12), (9, 0), (1, 0), (0, 0), (30, 31)])
def test_the_p_value_is_that_of_a_coin_thrown_by_hand(only_first: int, only_second: int):
    count, most = only_first + only_second, max(only_first, only_second)
    tail = sum(math.comb(count, heads) for heads in range(most, count + 1)) / 2**count
    comparison = compare_answers(*_answers(50, only_first, only_second, 50))
    assert comparison.p_value == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_interval_is_that_of_a_bootstrap_over_images(confidence: float):
    first, second = _answers(1500, 180, 120, 200)
    found = compare_answers(first, second, confidence=confidence)
    resampled = stats.bootstrap(
        (first.astype(float) - second.astype(float),),
        np.mean,
        confidence_level=confidence,
        n_resamples=4000,
        method="percentile",
        batch=200,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.low == pytest.approx(100 * resampled.low, abs=0.2)
    assert found.high == pytest.approx(100 * resampled.high, abs=0.2)


def test_the_interval_turns_with_the_order_of_the_nets():
    first, second = _answers(150, 12, 4, 34)
    one, other = compare_answers(first, second), compare_answers(second, first)
    assert one.difference == -other.difference
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.51)  # one image is half a point


def test_the_same_seed_gives_the_same_interval():
    answers = _answers(1500, 180, 120, 200)
    few = {"num_resamples": 500}
    assert compare_answers(*answers, **few) == compare_answers(*answers, **few)
    assert compare_answers(*answers, **few) != compare_answers(*answers, **few, seed=1)


def test_nets_that_agree_on_all_images_are_not_called_equal_to_the_last_digit():
    comparison = compare_answers(*_answers(280, 0, 0, 20))
    # 300 images without an event exclude events of 1 % (the rule of three), and not much less.
    assert -1.1 < comparison.low < -0.3 and 0.3 < comparison.high < 1.1
    assert not comparison.is_real and comparison.p_value == 1.0


@pytest.mark.parametrize("size", [100, 400])
@pytest.mark.parametrize(("share", "lead"), [(0.02, 0.0), (0.02, 0.01), (0.1, 0.0), (0.1, 0.05), (0.3, 0.1)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(size: int, share: float, lead: float):
    rng = np.random.default_rng([size, round(1000 * share), round(1000 * lead)])
    rates = [(share + lead) / 2, (share - lead) / 2, 1 - share]
    num_held = num_false = 0
    for seed in range(300):
        only_first, only_second, same = rng.multinomial(size, rates)
        found = compare_answers(*_answers(same, only_first, only_second, 0), num_resamples=2000, seed=seed)
        num_held += found.low <= 100 * lead <= found.high
        num_false += found.is_real and (found.difference > 0) != (lead > 0)
    # Four standard errors of 300 throws below 95 %.
    assert num_held / 300 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 300)
    assert num_false / 300 <= 0.05 + 4 * math.sqrt(0.95 * 0.05 / 300)


def test_chance_passes_for_a_difference_no_more_often_than_said_even_where_few_images_differ():
    rng, num_real = np.random.default_rng(5), 0
    for seed in range(300):
        only_first, only_second, same = rng.multinomial(100, [0.03, 0.03, 0.94])
        comparison = compare_answers(*_answers(same, only_first, only_second, 0), num_resamples=2000, seed=seed)
        num_real += comparison.is_real
    assert num_real <= 0.05 * 300


def test_five_images_to_none_are_not_enough_though_the_interval_leaves_zero_out():
    comparison = compare_answers(*_answers(245, 5, 0, 0))
    assert comparison.low > 0 and comparison.p_value == 2 / 2**5
    assert not comparison.is_real
    assert compare_answers(*_answers(244, 6, 0, 0)).is_real


def test_a_higher_confidence_widens_the_interval_and_can_take_the_verdict_back():
    answers = _answers(150, 14, 3, 33)
    plain, strict = compare_answers(*answers), compare_answers(*answers, confidence=1 - 0.05 / 10)
    assert plain.is_real and not strict.is_real
    assert strict.low < plain.low and plain.high < strict.high


# How many images it takes ---------------------------------------------------------------------------------------------


def test_so_many_images_show_the_difference_eight_times_in_ten():
    comparison = compare_answers(*_answers(170, 18, 12, 0))
    needed = images_needed(comparison, 3.0)
    assert comparison.num_needed == needed
    rng, num_seen = np.random.default_rng(3), 0
    for seed in range(300):
        only_first, only_second, same = rng.multinomial(needed, [0.09, 0.06, 0.85])
        found = compare_answers(*_answers(same, only_first, only_second, 0), num_resamples=1000, seed=seed)
        num_seen += found.low > 0
    assert num_seen / 300 == pytest.approx(0.8, abs=0.08)


def test_the_smallest_visible_difference_is_the_one_that_takes_these_images():
    comparison = compare_answers(*_answers(900, 50, 50, 0))
    assert comparison.num_needed is None
    assert images_needed(comparison, comparison.smallest_visible) == pytest.approx(1000, rel=0.02)


def test_nets_that_never_differed_still_need_images():
    comparison = compare_answers(*_answers(100, 0, 0, 0))
    assert comparison.smallest_visible == pytest.approx(2.8, abs=0.1)
    assert images_needed(comparison, 5.0) > images_needed(comparison, 10.0) > 10


# Samples --------------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_without_replacement_and_by_the_seed():
    samples = draw_samples(50, num_repeats=8, sample_size=20, seed=4)
    assert samples.shape == (8, 20)
    assert all(len(set(row)) == 20 for row in samples.tolist())
    assert 0 <= samples.min() and samples.max() < 50
    assert np.array_equal(samples, draw_samples(50, num_repeats=8, sample_size=20, seed=4))
    assert not np.array_equal(samples, draw_samples(50, num_repeats=8, sample_size=20, seed=5))


def test_the_differences_of_samples_are_counted_by_hand():
    first = np.array([True, True, False, False, True])
    second = np.array([False, True, True, False, False])
    samples = np.array([[0, 1], [2, 3], [0, 4], [1, 3]])
    found = sampled_differences(first, second, samples)
    points = [50.0, -50.0, 100.0, 0.0]
    assert found.mean == pytest.approx(np.mean(points))
    assert found.std == pytest.approx(np.std(points, ddof=1))
    assert (found.num_ahead, found.num_level, found.num_behind) == (2, 1, 1)


def test_the_spread_over_samples_is_that_of_drawing_without_replacement():
    first, second = _answers(700, 150, 50, 100)
    found = sampled_differences(first, second, draw_samples(1000, num_repeats=4000, sample_size=200))
    differences = first.astype(float) - second.astype(float)
    expected = 100 * math.sqrt(differences.var(ddof=1) / 200 * (1 - 200 / 1000))
    assert found.std == pytest.approx(expected, rel=0.05)
    assert found.mean == pytest.approx(10.0, abs=0.2)


# In words -------------------------------------------------------------------------------------------------------------


def test_a_real_difference_is_said_of_the_better_net():
    comparison = _made(num_only_first=1, num_only_second=12, low=-7.25, high=-1.25, p_value=0.0034)
    assert verdict(comparison, "pruned of a", "pruned of b") == (
        "pruned of b is better than pruned of a by 4.40 points (95 %: 1.25 to 7.25): real"
    )


def test_what_cannot_be_told_apart_says_how_many_images_would_do():
    said = verdict(_made(confidence=1 - 0.05 / 3, low=-0.0), "a", "b")
    lead, _, rest = said.partition("; ")
    assert lead == "a leads b by 0.80 points (98.33 %: 0.00 to 3.00): these 250 images cannot tell them apart"
    needed = images_needed(_made(confidence=1 - 0.05 / 3), 0.8)
    rounded = int(Context(prec=2, rounding=ROUND_UP).create_decimal(needed))
    assert rest == f"about {rounded:,} images would be needed to see a difference of this size"


def test_nets_that_are_right_equally_often_are_not_said_to_lead():
    said = verdict(_made(num_only_first=5, num_only_second=5, low=-2.4, high=2.4, p_value=1.0), "a", "b")
    assert said == (
        "a and b are right equally often (95 %: -2.40 to 2.40): these 250 images cannot tell them apart; so few show "
        "a difference only from about 3.5 points on"
    )


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.ones(3, bool), np.ones(4, bool), r"answers to the same images.*got shapes \(3,\) and \(4,\)"),
        (np.ones(0, bool), np.ones(0, bool), r"got shapes \(0,\) and \(0,\)"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), r"got shapes \(2, 2\)"),
        (np.ones(3, bool), np.ones(3), r"right or wrong \(bool\); got bool and float64"),
    ],
)
def test_answers_that_do_not_go_together_are_refused(first: np.ndarray, second: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        compare_answers(first, second)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_out_of_range_is_refused(confidence: float):
    with pytest.raises(InputError, match="the confidence must be above 0 and below 1; got "):
        compare_answers(np.ones(3, bool), np.ones(3, bool), confidence=confidence)


@pytest.mark.parametrize("sample_size", [0, 50, 51])
def test_a_sample_of_nothing_or_of_everything_is_refused(sample_size: int):
    with pytest.raises(InputError, match=f"at least 1 image and fewer than all 50; got {sample_size}"):
        draw_samples(50, num_repeats=3, sample_size=sample_size)


def test_one_sample_has_no_spread():
    with pytest.raises(InputError, match="takes at least 2 of them; got 1"):
        draw_samples(50, num_repeats=1, sample_size=10)
