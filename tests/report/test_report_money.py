"""The return is arithmetic that a reader can repeat, and nothing where a figure is missing."""

import pytest

from psenet.errors import InputError
from psenet.report.money import Line, ReturnFigures, return_lines

ALL = ReturnFigures(
    price_per_hour=3.0, requests_per_day=1_000_000, engineering_hours=10, engineering_rate=80, currency="EUR"
)


def _lines(figures: ReturnFigures = ALL, **changes: float | None) -> dict[str, Line]:
    given: dict[str, float | None] = {"baseline_ms": 36.0, "pruned_ms": 18.0, "run_hours": 4.0, **changes}
    return {line.key: line for line in return_lines(figures, **given)}  # pyright: ignore[reportArgumentType]


def test_every_line_is_what_a_person_works_out():
    lines = _lines()
    # A million requests of 36 ms are 10 hours a day; a month has 30.44 days.
    assert lines["hours_baseline"].value == pytest.approx(304.4)
    assert lines["hours_pruned"].value == pytest.approx(152.2)
    assert lines["savings"].value == pytest.approx(456.6)
    assert lines["machine_cost"].value == pytest.approx(12.0)
    assert lines["engineering_cost"].value == pytest.approx(800.0)
    assert lines["run_cost"].value == pytest.approx(812.0)
    assert lines["payback"].value == pytest.approx(812 / 456.6)
    assert [line.unit for line in lines.values()] == ["hours", "hours", *["money"] * 4, "months"]


def test_a_formula_gives_its_value_when_it_is_worked_out():
    for line in _lines(baseline_ms=0.5713, pruned_ms=0.4871).values():
        formula = line.formula.replace("×", "*").replace("÷", "/").replace("−", "-").replace(" ms", "")
        assert line.formula and line.value is not None
        assert eval(formula.replace(",", "")) == pytest.approx(line.value, rel=1e-4), line.formula


@pytest.mark.parametrize(
    ("without", "lacking"),
    [
        ("price_per_hour", {"savings", "machine_cost", "run_cost", "payback"}),
        ("requests_per_day", {"hours_baseline", "hours_pruned", "savings", "payback"}),
        ("engineering_hours", {"engineering_cost", "run_cost", "payback"}),
        ("engineering_rate", {"engineering_cost", "run_cost", "payback"}),
    ],
)
def test_a_missing_figure_is_named_where_it_is_needed_and_nowhere_else(without: str, lacking: set[str]):
    lines = _lines(ReturnFigures(**{**vars(ALL), without: None}))
    for key, line in lines.items():
        assert (line.value is None) == (key in lacking)
        assert line.missing == ((without,) if key in lacking else ())


def test_a_run_without_latency_or_time_lacks_those():
    lines = _lines(baseline_ms=None, run_hours=None)
    assert lines["savings"].missing == ("latency_baseline",)
    assert lines["run_cost"].missing == ("run_hours",)
    assert set(lines["payback"].missing) == {"latency_baseline", "run_hours"}


@pytest.mark.parametrize("pruned_ms", [36.0, 40.0])
def test_a_net_that_is_no_faster_never_pays_back(pruned_ms: float):
    line = _lines(pruned_ms=pruned_ms)["payback"]
    assert line.never and line.value is None


def test_a_cost_of_nothing_pays_back_at_once():
    lines = _lines(ReturnFigures(**{**vars(ALL), "engineering_hours": 0}), run_hours=0.0)
    assert lines["payback"].value == 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_figures_are_refused_together(value: float):
    with pytest.raises(InputError, match=r"price_per_hour must be a number of at least 0; .*; engineering_rate must"):
        ReturnFigures(price_per_hour=value, engineering_rate=value)
