"""The upper limits a subnet must keep, as the user states them and as the numbers they mean for one model.

Legend: N width settings, G channel groups.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from psenet.errors import InputError
from psenet.space import WidthSpace
from psenet.widths import Widths

_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)")
_COUNT_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTE_UNITS = {"": 1, "B": 1}
_BYTE_UNITS |= {f"{letter}{end}": 1000**power for power, letter in enumerate("kMG", 1) for end in ("", "B")}
_BYTE_UNITS |= {"KB": 1000, "KiB": 1024, "kiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_TIME_UNITS = {"": 1, "ms": 1, "s": 1000, "us": 1e-3}
_LARGEST = 1e18
"""No cost is as large: costs are 64-bit integers."""
_FINEST = 6
"""Decimals of a limit that is no count: those of a predicted latency."""


@dataclass(frozen=True)
class Resource:
    """What a limit can be set on."""

    name: str
    """The name of the field of `Budget` and of the cost method of `WidthSpace`."""
    units: Mapping[str, float]
    """What may follow a number, and its factor."""
    examples: str
    """Good values, for messages."""
    show: Callable[[float], str]
    """Writes an amount for a person."""
    counted: bool = True
    """Whether amounts are whole numbers: a limit is then rounded down, and below 1 there is nothing."""

    def limit(self, amount: float) -> int | float:
        """Return an amount as a limit on this resource."""
        return math.floor(amount) if self.counted else round(amount, _FINEST)


def _counted(amount: float) -> str:
    for factor, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if amount >= factor:
            return f"{amount / factor:.4g}{letter}"
    return f"{amount:.4g}"


def _in_bytes(amount: float) -> str:
    for factor, unit in ((1000**3, "GB"), (1000**2, "MB"), (1000, "kB")):
        if amount >= factor:
            return f"{amount / factor:.4g} {unit}"
    return f"{amount:.4g} B"


def _in_time(amount_ms: float) -> str:
    for factor, unit in ((1000, "s"), (1, "ms")):
        if amount_ms >= factor:
            return f"{amount_ms / factor:.4g} {unit}"
    return f"{amount_ms * 1000:.4g} us"


RESOURCES = (
    Resource("macs", _COUNT_UNITS, "300M, 1.5G, 1000000 or 50%", _counted),
    Resource("params", _COUNT_UNITS, "2M, 250k, 1000000 or 50%", _counted),
    Resource("memory", _BYTE_UNITS, "4 MB, 512 KiB, 1000000 or 50%", _in_bytes),
    Resource("latency_ms", _TIME_UNITS, "4 ms, 0.5 s or 50%", _in_time, counted=False),
)
"""Every resource a budget can limit, in the order messages and reports name them."""


@dataclass(frozen=True)
class Limits:
    """A budget worked out for one space: absolute upper limits, None where there is none."""

    macs: int | None = None
    """Multiply-accumulates of one forward pass of one sample."""
    params: int | None = None
    """Number of parameters."""
    memory: int | None = None
    """Peak of activation memory in bytes."""
    latency_ms: float | None = None
    """Predicted time of one forward pass in milliseconds, at the batch size of the space's latency model."""

    def each(self) -> list[tuple[Resource, int | float]]:
        """Return the limits that are set, each with its resource."""
        found = ((resource, getattr(self, resource.name)) for resource in RESOURCES)
        return [(resource, limit) for resource, limit in found if limit is not None]

    def accepts(self, space: WidthSpace, widths_NG: np.ndarray) -> np.ndarray:
        """Return which rows of an (N, G) array of widths keep all limits, bool of shape (N,)."""
        ok_N = np.ones(len(widths_NG), dtype=bool)
        for resource, limit in self.each():
            ok_N &= cost_of(space, resource, widths_NG) <= limit
        return ok_N

    def holds(self, space: WidthSpace, widths: Widths) -> bool:
        """Return whether one setting keeps all limits."""
        space.check(widths)
        return bool(self.accepts(space, space.to_array([widths]))[0])

    def describe(self, space: WidthSpace) -> str:
        """Return the limits for a person, absolute and relative: `at most 300M MACs (50.0 % of the full model)`."""
        full = space.to_array([space.full()])
        parts = [
            f"{resource.show(limit)} {_title(resource)} ({100 * limit / full_cost:.1f} % of the full model)"
            for resource, limit in self.each()
            for full_cost in (cost_of(space, resource, full)[0],)
        ]
        return "at most " + ", ".join(parts) if parts else "no limit"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper limits on what a subnet may cost; at least one must be set, and a subnet must keep all that are.

    Raises:
        InputError: No limit is set, or limits are malformed; all offenders are named.

    Example:
        >>> Budget(macs="50%", params="2M")
        Budget(macs='50%', params='2M', memory=None, latency_ms=None)
    """

    macs: int | str | None = None
    """Multiply-accumulates of one sample: a count ("300M", "1.5G") or a share of the full model ("50%")."""
    params: int | str | None = None
    """Parameters: a count ("2M", "250k") or a share of the full model."""
    memory: int | str | None = None
    """Peak activation memory of one sample: bytes ("4 MB", "512 KiB") or a share of the full model."""
    latency_ms: float | str | None = None
    """Time of one forward pass: milliseconds ("4 ms", "0.5 s") or a share of the full model, both as the space's
    latency model predicts them; see `WidthSpace.with_latency`."""

    def __post_init__(self) -> None:
        if all(getattr(self, field.name) is None for field in fields(self)):
            raise InputError(
                "a budget needs at least one limit: set macs, params, memory or latency_ms, for example "
                "Budget(macs='50%')"
            )
        problems = []
        for resource in RESOURCES:
            try:
                _parse(resource, getattr(self, resource.name))
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError("; ".join(problems))

    def resolve(self, space: WidthSpace) -> Limits:
        """Work the limits out for one space and make sure that some subnet keeps them.

        Costs never fall when a width grows, so the smallest setting has the least of every cost: if it keeps each
        limit alone, it keeps all of them together.

        Args:
            space: The width space of the model to be pruned.

        Returns:
            Absolute limits.

        Raises:
            InputError: Limits are below the smallest that can be reached, or not below the full model when given as
                an absolute number, or on a latency that the space does not know; all offenders are named.
        """
        limits: dict[str, int | float] = {}
        problems = []
        for resource in RESOURCES:
            value = getattr(self, resource.name)
            if value is None:
                continue
            try:
                limits[resource.name] = _reachable(space, resource, value)
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError(
                "the budget does not fit this model: "
                + "; ".join(problems)
                + ". Raise the limit, or trace the model with a lower min_ratio"
                * any("cannot be reached" in problem for problem in problems)
            )
        return Limits(**limits)  # pyright: ignore[reportArgumentType] - counts are whole


def _reachable(space: WidthSpace, resource: Resource, value: object) -> int | float:
    """Return the limit that a value means for a space.

    Raises:
        InputError: No subnet keeps it, or all do; or the space does not know this cost.
    """
    parsed = _parse(resource, value)
    assert parsed is not None
    amount, is_share = parsed
    least, full = cost_of(space, resource, space.to_array([space.smallest(), space.full()])).tolist()
    # The nudge undoes binary rounding, so that 30% of 10 is 3 and not 2.
    limit = resource.limit(amount * full * (1 + 1e-12) if is_share else amount)
    given = f"{resource.name}={value!r}"
    if not is_share and limit > full:
        raise InputError(
            f"{given} is above the full model's {resource.show(full)} {_title(resource)} ({full}): "
            f"nothing to prune; give less, or a share such as 50%"
        )
    if limit < least:
        raise InputError(
            f"{given} is {limit} and cannot be reached: the smallest reachable is {least} "
            f"({math.ceil(least / full * 10000) / 100:g}% of the full model's {full})"
        )
    return limit


def resolve_limits(budget: Budget | Limits, space: WidthSpace) -> Limits:
    """Return absolute limits from either form of a budget.

    Raises:
        InputError: No subnet of the space keeps the limits.
    """
    if isinstance(budget, Budget):
        return budget.resolve(space)
    if not isinstance(budget, Limits):
        raise TypeError(f"a budget is a psenet.Budget or psenet.budget.Limits; got {type(budget).__name__}")
    least = space.to_array([space.smallest()])
    problems = [
        f"{resource.name} limit {limit} cannot be reached: the smallest reachable is {cost}"
        for resource, limit in budget.each()
        for cost in (cost_of(space, resource, least)[0].item(),)
        if limit < cost
    ]
    if problems:
        raise InputError("the budget does not fit this model: " + "; ".join(problems))
    return budget


def uniform_widths(space: WidthSpace, limits: Limits) -> Widths:
    """Return the widest uniform setting inside the limits: the plain way to shrink a model, to compare with.

    Rounding to the allowed widths can leave much of a budget unused, so the setting is then widened by single steps,
    the group with the smallest share of its channels first, as long as the limits hold.
    """
    ratios = (step / 200 for step in range(200, 0, -1))
    settings = dict.fromkeys([*(space.uniform(ratio) for ratio in ratios), space.smallest()])
    widths = next(setting for setting in settings if limits.holds(space, setting))
    open_groups = list(space.groups)
    while open_groups:
        group = min(open_groups, key=lambda group: widths[group.name] / group.size)
        wider = next((width for width in group.choices if width > widths[group.name]), None)
        candidate = None if wider is None else Widths({**widths, group.name: wider})
        if candidate is not None and limits.holds(space, candidate):
            widths = candidate
        else:
            open_groups.remove(group)
    return widths


def cost_of(space: WidthSpace, resource: Resource, widths_NG: np.ndarray) -> np.ndarray:
    """Return what (N, G) widths cost of one resource, of shape (N,): float64 for a latency, else int64."""
    return getattr(space, resource.name)(widths_NG)


def _title(resource: Resource) -> str:
    titles = {"macs": "MACs", "memory": "of activation memory", "latency_ms": "of predicted latency"}
    return titles.get(resource.name, resource.name)


def _parse(resource: Resource, value: object) -> tuple[float, bool] | None:
    """Return (amount, whether it is a share of the full model), or None for no limit."""
    if value is None:
        return None
    least = 1 if resource.counted else 10**-_FINEST
    if isinstance(value, bool) or not isinstance(value, int | float | str | np.integer):
        raise InputError(_malformed(resource, value, "must be a number or a string"))
    if not isinstance(value, str):
        if not least <= value <= _LARGEST:  # also when NaN
            raise InputError(_malformed(resource, value, "must be a positive number"))
        return float(value), False
    match = _NUMBER.fullmatch(value.strip())
    if match is None or (match[2] != "%" and match[2] not in resource.units):
        raise InputError(_malformed(resource, value, "must be a positive number with a unit or a percentage"))
    number = float(match[1])
    if match[2] == "%":
        if not 0 < number <= 100:
            raise InputError(_malformed(resource, value, "must be above 0% and at most 100% of the full model"))
        return number / 100, True
    # Round first: 0.3 * 10 is a hair below 3 in binary, and a limit is floored later.
    amount = round(number * resource.units[match[2]], _FINEST)
    if not least <= amount <= _LARGEST:
        raise InputError(_malformed(resource, value, "must be a positive number"))
    return amount, False


def _malformed(resource: Resource, value: object, rule: str) -> str:
    return f"the budget's {resource.name} {rule}, such as {resource.examples}; got {value!r}"
