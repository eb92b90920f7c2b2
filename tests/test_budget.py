from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psenet.budget import RESOURCES, Budget, Limits, Resource, resolve_limits, uniform_widths
from psenet.cost import LatencyCost, LinearForm, PeakCost, ProductCost
from psenet.errors import InputError
from psenet.space import ChannelGroup, SpaceCosts, WidthSpace
from psenet.widths import Widths

GROUPS = [ChannelGroup("a", 8, (2, 4, 6, 8), ("a",)), ChannelGroup("b", 8, (2, 4, 6, 8), ("b",))]
A, B, ONE = LinearForm(0, ((0, 1),)), LinearForm(0, ((1, 1),)), LinearForm(1)
WITHOUT_MODEL = r"latency needs a latency model .* use space.with_latency\(psenet.LatencyModel.measure\("


@pytest.fixture
def space() -> WidthSpace:
    return WidthSpace(GROUPS, _costs())


@pytest.fixture
def timed() -> WidthSpace:
    """The same with latency 0.05 a b + 0.2 ms: full 3.4 ms, smallest 0.4 ms."""
    return WidthSpace(
        GROUPS,
        replace(_costs(), latency_ms=LatencyCost(ProductCost([(1, A, B), (1, ONE, ONE)], 2), np.array([0.05, 0.2]))),
    )


def _costs() -> SpaceCosts:
    """MACs 100 a b, params 10 a + b, memory 8 a: full 6400, 88, 64; smallest 400, 22, 16."""
    return SpaceCosts(
        macs=ProductCost([(100, A, B)], 2),
        params=ProductCost([(10, A, ONE), (1, B, ONE)], 2),
        memory=PeakCost([LinearForm(0, ((0, 8),))], 2),
    )


@pytest.mark.parametrize(
    ("value", "limit"),
    [("50%", 3200), (" 12.5 % ", 800), ("1000", 1000), (1000, 1000), ("2.5k", 2500), (".5k", 500), ("100%", 6400)],
)
def test_macs_are_counts_or_shares_of_the_full_model(space: WidthSpace, value: int | str, limit: int):
    assert Budget(macs=value).resolve(space) == Limits(macs=limit)


@pytest.mark.parametrize(("value", "num"), [("300M", 300 * 10**6), ("1.5G", 1500 * 10**6), ("0.3k", 300)])
def test_units_are_powers_of_a_thousand(value: str, num: int):
    wide = WidthSpace(
        [ChannelGroup("a", 2, (1, 2), ("a",))],
        SpaceCosts(
            macs=ProductCost([(10**9, LinearForm(0, ((0, 1),)), LinearForm(1)), (1, LinearForm(1), LinearForm(1))], 1),
            params=ProductCost([], 1),
            memory=PeakCost([], 1),
        ),
    )
    if num >= 10**9:
        assert Budget(macs=value).resolve(wide).macs == num
    else:
        with pytest.raises(InputError, match=f"is {num} and cannot be reached: the smallest reachable is 1000000001"):
            Budget(macs=value).resolve(wide)


@pytest.mark.parametrize(
    ("value", "num"),
    [("4 MB", 4_000_000), ("512 KiB", 524_288), ("2MiB", 2_097_152), ("4M", 4_000_000), ("100 kB", 100_000)],
)
def test_memory_also_takes_units_of_bytes(value: str, num: int):
    big = WidthSpace(
        [ChannelGroup("a", 10**7, (1, 10**7), ("a",))],
        SpaceCosts(macs=ProductCost([], 1), params=ProductCost([], 1), memory=PeakCost([LinearForm(0, ((0, 1),))], 1)),
    )
    assert Budget(memory=value).resolve(big) == Limits(memory=num)


@pytest.mark.parametrize(
    "value",
    ["5O%", "", "-3M", "abc", "0%", "0", 0, -1, float("nan"), float("inf"), "nan", True, "4 MB", "1e6", "3 M M"],
)
def test_a_malformed_limit_is_named_with_good_examples(value: object):
    with pytest.raises(InputError, match=r"budget's macs must be .* such as 300M, 1.5G, 1000000 or 50%; got"):
        Budget(macs=value)  # pyright: ignore[reportArgumentType]


def test_all_malformed_limits_are_named_together():
    with pytest.raises(InputError, match=r"macs must be .*'5O%'; the budget's memory must be .*'4 parsecs'"):
        Budget(macs="5O%", params="2M", memory="4 parsecs")


def test_a_share_above_the_full_model_is_refused():
    with pytest.raises(InputError, match=r"params must be above 0% and at most 100% of the full model.*'101%'"):
        Budget(params="101%")


def test_a_count_above_the_full_model_leaves_nothing_to_prune(space: WidthSpace):
    with pytest.raises(InputError, match=r"macs='7k' is above the full model's 6.4k MACs \(6400\): nothing to prune"):
        Budget(macs="7k").resolve(space)


def test_a_budget_without_a_limit_is_refused():
    with pytest.raises(InputError, match="at least one limit"):
        Budget()


def test_unreachable_limits_are_all_named_with_the_smallest_reachable(space: WidthSpace):
    with pytest.raises(InputError) as caught:
        Budget(macs="6.24%", params=21, memory="16").resolve(space)
    message = str(caught.value)
    assert "macs='6.24%' is 399 and cannot be reached: the smallest reachable is 400 (6.25% of the full" in message
    assert "params=21 is 21 and cannot be reached: the smallest reachable is 22 (25% of the full model's 88)" in message
    assert "memory" not in message
    assert "lower min_ratio" in message


def test_the_smallest_reachable_share_that_a_message_names_is_accepted(space: WidthSpace):
    assert Budget(macs="6.25%", params="25%", memory="25%").resolve(space) == Limits(400, 22, 16)


def test_limits_accept_exactly_what_costs_no_more(space: WidthSpace):
    limits = Limits(macs=2400, params=60, memory=48)
    rows = np.array([(a, b) for a in (2, 4, 6, 8) for b in (2, 4, 6, 8)])
    expected = [100 * a * b <= 2400 and 10 * a + b <= 60 and 8 * a <= 48 for a, b in rows.tolist()]
    assert limits.accepts(space, rows).tolist() == expected
    assert any(expected) and not all(expected)
    assert limits.holds(space, Widths({"a": 4, "b": 6}))
    assert not limits.holds(space, Widths({"a": 6, "b": 4}))


def test_limits_are_described_for_a_person(space: WidthSpace):
    limits = Limits(macs=3200, params=44, memory=32)
    assert limits.describe(space) == (
        "at most 3.2k MACs (50.0 % of the full model), 44 params (50.0 % of the full model), "
        "32 B of activation memory (50.0 % of the full model)"
    )


def test_ready_limits_are_checked_as_a_budget_is(space: WidthSpace):
    assert resolve_limits(Limits(macs=400), space) == Limits(macs=400)
    with pytest.raises(InputError, match="macs limit 399 cannot be reached: the smallest reachable is 400"):
        resolve_limits(Limits(macs=399), space)
    with pytest.raises(TypeError, match="a budget is a psenet.Budget"):
        resolve_limits("50%", space)  # pyright: ignore[reportArgumentType]


# Latency --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        ("50%", 1.7),
        (2, 2.0),
        (0.55, 0.55),
        ("2.5 ms", 2.5),
        ("0.002 s", 2.0),
        ("900us", 0.9),
        ("100%", 3.4),
        ("37%", 1.258),
    ],
)
def test_latency_is_a_time_or_a_share_and_never_rounded_down(timed: WidthSpace, value: float | str, limit: float):
    resolved = Budget(latency_ms=value).resolve(timed)
    assert resolved == Limits(latency_ms=limit) and isinstance(resolved.latency_ms, float)


@pytest.mark.parametrize("value", ["4 MB", "5 min", "0 ms", 0, -1.5, "0%", "101%", float("nan"), True, "0.0000001 ms"])
def test_a_malformed_latency_is_named_with_good_examples(value: object):
    with pytest.raises(InputError, match=r"budget's latency_ms must be .* such as 4 ms, 0.5 s or 50%; got"):
        Budget(latency_ms=value)  # pyright: ignore[reportArgumentType]


def test_latency_limits_accept_exactly_what_takes_no_longer(timed: WidthSpace):
    rows = np.array([(a, b) for a in (2, 4, 6, 8) for b in (2, 4, 6, 8)])
    limits = Limits(macs=3200, latency_ms=1.4)  # exactly a b = 24
    assert limits.accepts(timed, rows).tolist() == [a * b <= 24 for a, b in rows.tolist()]
    for row, widths in zip(rows, timed.from_array(rows), strict=True):
        assert limits.holds(timed, widths) == (row[0] * row[1] <= 24)


def test_latency_limits_are_described_for_a_person(timed: WidthSpace):
    limits = Limits(macs=3200, latency_ms=0.85)
    assert limits.describe(timed) == (
        "at most 3.2k MACs (50.0 % of the full model), 850 us of predicted latency (25.0 % of the full model)"
    )


def test_the_limit_below_the_smallest_reachable_latency_is_the_one_that_is_named(timed: WidthSpace):
    with pytest.raises(InputError) as caught:
        Budget(macs="50%", latency_ms="0.3 ms").resolve(timed)
    message = str(caught.value)
    assert "latency_ms='0.3 ms' is 0.3 and cannot be reached: the smallest reachable is 0.4 (11.77% of the " in message
    assert "macs" not in message
    assert Budget(macs="50%", latency_ms=0.4).resolve(timed) == Limits(macs=3200, latency_ms=0.4)
    assert Budget(latency_ms="11.77%").resolve(timed).latency_ms == pytest.approx(0.40018)


def test_a_latency_above_the_full_model_leaves_nothing_to_prune(timed: WidthSpace):
    with pytest.raises(InputError, match=r"latency_ms=5 is above the full model's 3.4 ms of predicted latency \(3.4\)"):
        Budget(latency_ms=5).resolve(timed)


def test_a_latency_of_a_space_without_a_model_is_refused_with_the_way_to_get_one(space: WidthSpace):
    with pytest.raises(InputError, match="budget does not fit this model: " + WITHOUT_MODEL):
        Budget(latency_ms="50%").resolve(space)
    with pytest.raises(InputError, match=WITHOUT_MODEL):
        resolve_limits(Limits(latency_ms=1.0), space)
    with pytest.raises(InputError, match=WITHOUT_MODEL):
        space.latency_ms(space.full())


def test_ready_latency_limits_are_checked_as_a_budget_is(timed: WidthSpace):
    assert resolve_limits(Limits(latency_ms=0.4), timed) == Limits(latency_ms=0.4)
    with pytest.raises(InputError, match="latency_ms limit 0.39 cannot be reached: the smallest reachable is 0.4"):
        resolve_limits(Limits(latency_ms=0.39), timed)


def test_uniform_widths_use_up_a_latency_limit(timed: WidthSpace):
    widths = uniform_widths(timed, Limits(latency_ms=1.4))
    assert widths["a"] * widths["b"] == 24  # 24 is the most that fits, and 4 x 4 the widest of one ratio
    assert uniform_widths(timed, Limits(latency_ms=0.4)) == timed.smallest()


# Any text, any number -------------------------------------------------------------------------------------------------

_numbers = st.integers() | st.floats() | st.just(10**400)
_texts = (
    st.text(max_size=12) | st.text("0123456789.%kMGTBibmsue +-", max_size=12) | st.integers(300, 400).map("9".__mul__)
)
_resources = st.sampled_from(RESOURCES)


def _wide_space() -> WidthSpace:
    """One channel costs one of everything, up to 10^15."""
    width, one = LinearForm(0, ((0, 1),)), LinearForm(1)
    return WidthSpace(
        [ChannelGroup("a", 10**15, (1, 10**15), ("a",))],
        SpaceCosts(
            macs=ProductCost([(1, width, one)], 1),
            params=ProductCost([(1, width, one)], 1),
            memory=PeakCost([width], 1),
            latency_ms=LatencyCost(ProductCost([(1, width, one)], 1), np.array([1.0])),
        ),
    )


_WIDE = _wide_space()


@settings(deadline=None)
@given(_resources, _numbers | _texts)
def test_any_limit_becomes_a_number_of_the_space_or_is_refused_in_words(resource: Resource, value: int | float | str):
    try:
        limits = Budget(**{resource.name: value}).resolve(_WIDE)  # pyright: ignore[reportArgumentType]
    except InputError as error:
        assert resource.name in str(error)
        return
    ((found, limit),) = limits.each()
    assert found == resource and 1 <= limit <= 10**15
    assert isinstance(limit, int) == resource.counted


@settings(deadline=None)
@given(_resources, st.integers(1, 10**12))
def test_an_amount_shown_for_a_person_is_read_as_the_same_limit(resource: Resource, amount: int):
    amount = amount if resource.counted else min(amount, 10**6)
    ((_, limit),) = Budget(**{resource.name: resource.show(amount)}).resolve(_WIDE).each()  # pyright: ignore[reportArgumentType]
    assert limit == pytest.approx(amount, rel=6e-4)


@settings(deadline=None)
@given(_resources, st.integers(1, 10**12))
def test_a_number_and_its_text_are_the_same_limit(resource: Resource, amount: int):
    as_number, as_text = (
        Budget(**{resource.name: value}).resolve(_WIDE).each()  # pyright: ignore[reportArgumentType]
        for value in (amount, f" {amount} ")
    )
    assert as_number == as_text == [(resource, amount)]


@settings(deadline=None)
@given(_resources, st.integers(1, 10**4))
def test_a_share_is_that_part_of_the_full_model(resource: Resource, hundredths: int):
    ((_, limit),) = Budget(**{resource.name: f"{hundredths / 100:.2f}%"}).resolve(_WIDE).each()  # pyright: ignore[reportArgumentType]
    assert limit == pytest.approx(hundredths * 10**11, rel=1e-9)
