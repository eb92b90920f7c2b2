"""Both languages say the same, and numbers are written as a reader wants them."""

import string

import pytest
import scipy.stats

from psenet.errors import InputError
from psenet.report.confidence import overlap, wilson_interval
from psenet.report.shown import change, digits, in_bytes, in_ms, money, percent, points, share, short
from psenet.report.text import LANGUAGES, TEXT, Words


def _fields(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


@pytest.mark.parametrize("key", TEXT)
def test_a_sentence_is_there_in_every_language_with_the_same_gaps(key: str):
    sentences = TEXT[key]
    assert len(sentences) == len(LANGUAGES) and all(sentences)
    assert len({tuple(_fields(sentence)) for sentence in sentences}) == 1


def test_japanese_sentences_are_japanese():
    """Only names and marks may be the same in both."""
    same = {key for key, (english, japanese) in TEXT.items() if english == japanese}
    allowed = {"macs", "flops", "versus_cost"} | {key for key in same if TEXT[key][0].startswith("--")}
    assert same == allowed


def test_an_unknown_language_is_refused():
    with pytest.raises(InputError, match="language must be one of en, ja; got 'de'"):
        Words("de")


@pytest.mark.parametrize(("right", "count"), [(0, 10), (1, 3), (593, 600), (600, 600), (48_123, 50_000)])
def test_the_interval_is_scipy_s(right: int, count: int):
    expected = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    found = wilson_interval(100 * right / count, count)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_intervals_overlap_where_they_have_a_point_in_common():
    assert overlap((1, 2), (2, 3)) and overlap((2, 3), (1, 2)) and overlap((0, 9), (4, 5))
    assert not overlap((1, 2), (2.1, 3)) and not overlap((2.1, 3), (1, 2))


def test_numbers_are_short_and_keep_their_digits():
    assert [short(value) for value in (None, 7, 999, 1000, 74_752, 4_475_500, 999_600_000, 2_190_000)] == [
        *("–", "7", "999", "1.00k", "74.8k", "4.48M", "1.00G", "2.19M")
    ]
    assert [digits(value) for value in (0, 0.0123, 0.57, 1.2, 24.55, 99.96, 1234.5)] == [
        *("0", "0.0123", "0.57", "1.20", "24.6", "100", "1234")
    ]
    unbroken = [in_bytes(683_000), in_bytes(12), in_ms(0.5713), percent(98.648), share(49, 100), money(-3.5, "EUR")]
    assert unbroken == ["683\u00a0kB", "12\u00a0B", "0.57\u00a0ms", "98.65\u00a0%", "49\u00a0%", "−3.50\u00a0EUR"]
    assert (points(-0.166), points(2), change(115, 100), change(9, 10)) == (
        "−0.17",
        "+2.00",
        "+15\u00a0%",
        "−10\u00a0%",
    )
