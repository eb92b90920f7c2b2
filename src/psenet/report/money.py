"""What pruning returns in money, from the user's own figures; nothing is assumed where one is missing.

Requests are served one after the other and a machine is paid for the time it computes.
"""

import math
from dataclasses import dataclass, fields

from psenet.errors import InputError

DAYS_PER_MONTH = 30.44
_MS_PER_HOUR = 3_600_000


@dataclass(frozen=True, kw_only=True)
class ReturnFigures:
    """The user's figures; None for one that is not known.

    Raises:
        InputError: A figure is negative or not finite; all offenders are named.
    """

    price_per_hour: float | None = None
    """Price of one machine-hour."""
    requests_per_day: float | None = None
    """Samples that the net is run on."""
    engineering_hours: float | None = None
    """Hours that people spent on pruning."""
    engineering_rate: float | None = None
    """Cost of one such hour."""
    currency: str | None = None
    """Shown beside amounts of money, as it is."""

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(ReturnFigures) if field.name != "currency"}
        problems = [
            f"{name} must be a number of at least 0; got {value}"
            for name, value in given.items()
            if value is not None and not (math.isfinite(value) and value >= 0)
        ]
        if problems:
            raise InputError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One step of the calculation."""

    key: str
    """Names it: `hours_baseline`, `hours_pruned`, `savings`, `machine_cost`, `engineering_cost`, `run_cost` or
    `payback`."""
    unit: str
    """`hours`, `money`, `months`."""
    formula: str
    """With the numbers put in; empty where it cannot be worked out."""
    value: float | None
    missing: tuple[str, ...] = ()
    """The figures that it lacks."""
    never: bool = False
    """Of the pay-back: there are no savings, so it never comes."""


def return_lines(
    figures: ReturnFigures,
    *,
    baseline_ms: float | None,
    pruned_ms: float | None,
    run_hours: float | None,
) -> tuple[Line, ...]:
    """Return the calculation, line by line.

    Args:
        figures: The user's figures.
        baseline_ms: Time of one request by the baseline.
        pruned_ms: The same by the pruned net.
        run_hours: What the run took.
    """
    before = _machine_hours("baseline", figures.requests_per_day, baseline_ms)
    after = _machine_hours("pruned", figures.requests_per_day, pruned_ms)
    price, rate = ("price_per_hour", figures.price_per_hour), ("engineering_rate", figures.engineering_rate)
    savings = _savings(before, after, figures.price_per_hour)
    machine = _product("machine_cost", ("run_hours", run_hours), price)
    people = _product("engineering_cost", ("engineering_hours", figures.engineering_hours), rate)
    cost = _sum("run_cost", machine, people)
    return (before, after, savings, machine, people, cost, _payback(cost, savings))


def _machine_hours(net: str, requests: float | None, latency_ms: float | None) -> Line:
    key = f"hours_{net}"
    missing = _lacking(("requests_per_day", requests), (f"latency_{net}", latency_ms))
    if requests is None or latency_ms is None:
        return Line(key=key, unit="hours", formula="", value=None, missing=missing)
    value = requests * DAYS_PER_MONTH * latency_ms / _MS_PER_HOUR
    formula = f"{_put(requests)} × {DAYS_PER_MONTH} × {_put(latency_ms)} ms ÷ 3,600,000"
    return Line(key=key, unit="hours", formula=formula, value=value)


def _savings(before: Line, after: Line, price: float | None) -> Line:
    missing = tuple(dict.fromkeys([*before.missing, *after.missing, *_lacking(("price_per_hour", price))]))
    if before.value is None or after.value is None or price is None:
        return Line(key="savings", unit="money", formula="", value=None, missing=missing)
    formula = f"({_put(before.value)} − {_put(after.value)}) × {_put(price)}"
    return Line(key="savings", unit="money", formula=formula, value=(before.value - after.value) * price)


def _product(key: str, one: tuple[str, float | None], other: tuple[str, float | None]) -> Line:
    if one[1] is None or other[1] is None:
        return Line(key=key, unit="money", formula="", value=None, missing=_lacking(one, other))
    return Line(key=key, unit="money", formula=f"{_put(one[1])} × {_put(other[1])}", value=one[1] * other[1])


def _sum(key: str, one: Line, other: Line) -> Line:
    missing = tuple(dict.fromkeys([*one.missing, *other.missing]))
    if one.value is None or other.value is None:
        return Line(key=key, unit="money", formula="", value=None, missing=missing)
    return Line(
        key=key, unit="money", formula=f"{_put(one.value)} + {_put(other.value)}", value=one.value + other.value
    )


def _payback(cost: Line, savings: Line) -> Line:
    missing = tuple(dict.fromkeys([*cost.missing, *savings.missing]))
    if savings.value is not None and savings.value <= 0:
        return Line(key="payback", unit="months", formula="", value=None, never=True)
    if cost.value is None or savings.value is None:
        return Line(key="payback", unit="months", formula="", value=None, missing=missing)
    formula = f"{_put(cost.value)} ÷ {_put(savings.value)}"
    return Line(key="payback", unit="months", formula=formula, value=cost.value / savings.value)


def _lacking(*given: tuple[str, float | None]) -> tuple[str, ...]:
    return tuple(name for name, value in given if value is None)


def _put(number: float) -> str:
    """Write a number in a formula with so many digits that a reader who works it out gets what is shown."""
    if number == int(number):
        return f"{int(number):,}"
    return f"{number:,.2f}" if abs(number) >= 10_000 else f"{number:.6g}"
