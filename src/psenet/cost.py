"""Costs of a subnet as formulas of its widths, evaluated for many width settings at once.

Legend: N width settings, G channel groups, T terms (layers, parameters or moments in time).

The number of channels on any axis of a traced model is a linear form of the group widths: a constant (frozen
channels) plus a coefficient for each group. Every cost here is built of such forms, so ten thousand settings
cost two matrix products instead of ten thousand models. Numbers are integers below 2**53, for which float64 arithmetic
is exact; only a latency is a fraction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearForm:
    """A channel count: `constant + sum(coefficients[g] * units[g])`."""

    constant: int
    coefficients: tuple[tuple[int, int], ...] = ()
    """Pairs (group index, channels per unit of that group)."""

    def count(self, units: Sequence[int]) -> int:
        """Return the channels at the given units per group."""
        return self.constant + sum(coefficient * units[group] for group, coefficient in self.coefficients)

    def row(self, num_groups: int) -> np.ndarray:
        """Return the coefficients as a dense row, shape (G + 1,), the constant last."""
        row = np.zeros(num_groups + 1)
        for group, coefficient in self.coefficients:
            row[group] += coefficient
        row[num_groups] = self.constant
        return row


class ProductCost:
    """A sum over terms of `scale * left(widths) * right(widths)`: MACs and parameters.

    Args:
        terms: Triples (scale, left, right).
        num_groups: G, the number of channel groups.
    """

    def __init__(self, terms: Sequence[tuple[float, LinearForm, LinearForm]], num_groups: int) -> None:
        self.terms = tuple(terms)
        self.num_groups = num_groups
        self._scale_T = np.array([scale for scale, _, _ in terms], dtype=np.float64)
        self._left_TG1 = _stack([left for _, left, _ in terms], num_groups)
        self._right_TG1 = _stack([right for _, _, right in terms], num_groups)

    def __call__(self, units_NG: np.ndarray) -> np.ndarray:
        """Return the cost of each setting, int64 of shape (N,)."""
        return np.rint(self.by_term(units_NG).sum(axis=1)).astype(np.int64)

    def by_term(self, units_NG: np.ndarray) -> np.ndarray:
        """Return each term's share of the cost, float64 of shape (N, T)."""
        left_NT = units_NG @ self._left_TG1[:, :-1].T + self._left_TG1[:, -1]
        right_NT = units_NG @ self._right_TG1[:, :-1].T + self._right_TG1[:, -1]
        left_NT *= right_NT
        left_NT *= self._scale_T
        return left_NT


class PeakCost:
    """The maximum over moments of a linear form: peak activation memory.

    Args:
        moments: What is alive at each moment, in bytes.
        num_groups: G, the number of channel groups.
    """

    def __init__(self, moments: Sequence[LinearForm], num_groups: int) -> None:
        # A moment below another in every coefficient can never be the peak.
        rows_TG1 = np.unique(_stack(moments, num_groups), axis=0)
        dominated_T = [bool(((rows_TG1 >= row).all(axis=1) & (rows_TG1 > row).any(axis=1)).any()) for row in rows_TG1]
        self._rows_TG1 = rows_TG1[~np.array(dominated_T, dtype=bool)]

    def __call__(self, units_NG: np.ndarray) -> np.ndarray:
        """Return the peak of each setting, int64 of shape (N,)."""
        live_NT = units_NG @ self._rows_TG1[:, :-1].T + self._rows_TG1[:, -1]
        return np.rint(live_NT.max(axis=1, initial=0.0)).astype(np.int64)


class LatencyCost:
    """A sum of non-negative parts, each growing with the widths: predicted latency in milliseconds.

    Args:
        parts: What adds to the latency.
        weight_T: Milliseconds for one unit of each part, none negative, shape (T,).
    """

    def __init__(self, parts: ProductCost, weight_T: np.ndarray) -> None:
        assert (weight_T >= 0).all(), "more channels may not take less time"
        products: dict[tuple[LinearForm, LinearForm], float] = {}
        linear_G1 = np.zeros(parts.num_groups + 1)
        # Most parts are linear in the widths and one row says them all; search evaluates millions of settings.
        for (scale, left, right), weight in zip(parts.terms, weight_T.tolist(), strict=True):
            varying, other = (left, right) if left.coefficients else (right, left)
            if not other.coefficients:
                linear_G1 += weight * scale * other.constant * varying.row(parts.num_groups)
            elif weight > 0:
                products[left, right] = products.get((left, right), 0.0) + weight * scale
        self._products = ProductCost([(scale, *sides) for sides, scale in products.items()], parts.num_groups)
        self._linear_G1 = linear_G1

    def __call__(self, units_NG: np.ndarray) -> np.ndarray:
        """Return the latency of each setting in milliseconds, float64 of shape (N,).

        Rounded to nanoseconds, so that a setting has the same latency alone and among others, whatever the order in
        which sums were taken, and a limit can be met exactly.
        """
        products_N = self._products.by_term(units_NG).sum(axis=1)
        return np.round(products_N + (units_NG * self._linear_G1[:-1]).sum(axis=1) + self._linear_G1[-1], 6)


def _stack(forms: Sequence[LinearForm], num_groups: int) -> np.ndarray:
    if not forms:
        return np.zeros((0, num_groups + 1))
    return np.stack([form.row(num_groups) for form in forms])
