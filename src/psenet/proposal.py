"""Settings inside the limits: a distribution over widths bent towards a budget, and moves that stay within it.

Everything works on *levels*: level k of a group is its k-th choice, so that a single step up or down is one level.
Costs never fall when a level rises, so lowering always ends inside reachable limits.

Legend: N settings, G channel groups, C choices of the group that has most.
"""

from dataclasses import dataclass

import numpy as np

from psenet.budget import Limits
from psenet.errors import InputError
from psenet.space import WidthSpace

_ROUNDS = 12
"""Draws before what does not fit is repaired."""
_CHUNK = 256
"""Settings repaired at once; the work of one pass is N * G rows of G levels."""
_AIM = 0.985
"""Share of a limit that the mean widths may cost; with it somewhat more than half of all draws fit."""
_MOST_LISTED = 4096
"""Settings that are listed one by one when drawing finds no new ones."""


class Levels:
    """Conversion between widths and levels of one space."""

    def __init__(self, space: WidthSpace) -> None:
        self.space = space
        self.num_G = np.array([len(group.choices) for group in space.groups], dtype=np.int64)
        self.top = int(self.num_G.max(initial=1))
        self.valid_GC = np.arange(self.top) < self.num_G[:, None]
        # Padding with the widest choice keeps rows sorted.
        self.choices_GC = np.array(
            [group.choices + (group.choices[-1],) * (self.top - len(group.choices)) for group in space.groups],
            dtype=np.int64,
        ).reshape(len(space.groups), self.top)
        self._columns_G = np.arange(len(space.groups))

    def widths(self, levels_NG: np.ndarray) -> np.ndarray:
        """Return the widths of (N, G) levels, int64 of shape (N, G)."""
        return self.choices_GC[self._columns_G, levels_NG]

    def levels(self, widths_NG: np.ndarray) -> np.ndarray:
        """Return the levels of (N, G) widths, int64 of shape (N, G).

        Raises:
            InputError: A width is not among its group's choices.
        """
        levels_NG = np.empty(widths_NG.shape, dtype=np.int64)
        for number, group in enumerate(self.space.groups):
            levels_N = np.searchsorted(group.choices, widths_NG[:, number])
            levels_NG[:, number] = np.minimum(levels_N, len(group.choices) - 1)
        wrong_G = (self.widths(levels_NG) != widths_NG).any(axis=0)
        if wrong_G.any():
            names = [self.space.groups[number].name for number in np.flatnonzero(wrong_G)[:10]]
            raise InputError(f"widths are not among the choices of groups {names}")
        return levels_NG

    def uniform(self) -> np.ndarray:
        """Return equal probabilities over every group's choices, shape (G, C), zero on padding."""
        return self.valid_GC / self.num_G[:, None]


@dataclass(frozen=True)
class Proposal:
    """A distribution over widths, independent between groups, and the limits its settings must keep."""

    levels: Levels
    limits: Limits
    probability: np.ndarray
    """Probability of each choice, shape (G, C), bent so that about half of all draws keep the limits."""
    liking: np.ndarray
    """Log-probability of each choice before bending, shape (G, C): what the prior likes, whatever the cost."""

    def fits(self, levels_NG: np.ndarray) -> np.ndarray:
        """Return which settings keep the limits, bool of shape (N,)."""
        return self.limits.accepts(self.levels.space, self.levels.widths(levels_NG))

    def score(self, levels_NG: np.ndarray) -> np.ndarray:
        """Return the log-probability of settings, shape (N,)."""
        columns = np.arange(levels_NG.shape[1])
        return np.log(np.maximum(self.probability[columns, levels_NG], 1e-300)).sum(axis=1)

    def draw(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """Draw settings, inside the limits or not, int64 of shape (num, G)."""
        return draw_levels(self.probability, num, rng)

    def sample(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """Draw settings inside the limits, int64 of shape (num, G); duplicates only if fewer settings keep them."""
        found: dict[bytes, np.ndarray] = {}
        for _ in range(_ROUNDS):
            levels_NG = self.draw(2 * (num - len(found)) + 8, rng)
            _add_rows(found, levels_NG[self.fits(levels_NG)], num)
            if len(found) >= num:
                break
        if len(found) < num:
            _add_rows(found, self.repair(self.draw(2 * (num - len(found)), rng), rng), num)
        if len(found) < num:
            listed_NG, _ = self.list_fitting(num + _MOST_LISTED)
            rng.shuffle(listed_NG)
            _add_rows(found, listed_NG, num)
        rows_NG = np.stack(list(found.values()))
        again_N = np.arange(num) % len(rows_NG)
        return rows_NG[again_N]

    def repair(self, levels_NG: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Lower settings by single steps, those the distribution likes most first, until they keep the limits.

        Each pass puts the steps (one a group) in order and takes the shortest run of them that is enough, or all of
        them: at most C passes.
        """
        if len(levels_NG) > _CHUNK:
            parts = np.array_split(levels_NG, -(-len(levels_NG) // _CHUNK))
            return np.concatenate([self.repair(part_NG, rng) for part_NG in parts])
        levels_NG = levels_NG.copy()
        over_N = np.flatnonzero(~self.fits(levels_NG))
        log_GC = np.log(np.maximum(self.probability, 1e-300))
        while len(over_N):
            levels_MG = levels_NG[over_N]
            columns = np.arange(levels_MG.shape[1])
            gain_MG = log_GC[columns, np.maximum(levels_MG - 1, 0)] - log_GC[columns, levels_MG]
            gain_MG = np.where(levels_MG > 0, gain_MG + rng.gumbel(size=gain_MG.shape), -np.inf)
            runs_MRG = _runs(levels_MG, np.argsort(-gain_MG, axis=1), -1)
            fits_MR = self.fits(runs_MRG.reshape(-1, levels_MG.shape[1])).reshape(runs_MRG.shape[:2])
            first_M = np.where(fits_MR.any(axis=1), fits_MR.argmax(axis=1), runs_MRG.shape[1] - 1)
            lowered_MG = runs_MRG[np.arange(len(over_N)), first_M]
            assert (lowered_MG != levels_MG).any(axis=1).all(), "limits below the smallest setting"
            levels_NG[over_N] = lowered_MG
            over_N = over_N[~fits_MR.any(axis=1)]
        return levels_NG

    def grow(self, levels_G: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Raise one setting that keeps the limits into what they leave free, single steps, liked ones first.

        Returns:
            A setting of which no group can be raised by one step, shape (G,).
        """
        levels_G = levels_G.copy()
        columns = np.arange(len(levels_G))
        while True:
            steps_G = np.flatnonzero(levels_G + 1 < self.levels.num_G)
            singles_SG = np.repeat(levels_G[None], len(steps_G), axis=0)
            singles_SG[np.arange(len(steps_G)), steps_G] += 1
            steps_G = steps_G[self.fits(singles_SG)]
            if not len(steps_G):
                return levels_G
            gain_G = self.liking[columns, np.minimum(levels_G + 1, self.levels.num_G - 1)]
            gain_G = gain_G - self.liking[columns, levels_G]
            order_S = steps_G[np.argsort(-(gain_G[steps_G] + rng.gumbel(size=len(steps_G))))]
            runs_SG = _runs(levels_G[None], order_S[None], 1)[0]
            # The first run is a single step that fits; costs rise along the runs.
            levels_G = runs_SG[int(self.fits(runs_SG).sum()) - 1]

    def mutate(self, levels_NG: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
        """Redraw each group of settings with probability `rate` from the distribution, shape (N, G)."""
        return np.where(rng.random(levels_NG.shape) < rate, self.draw(len(levels_NG), rng), levels_NG)

    def list_fitting(self, at_most: int) -> tuple[np.ndarray, bool]:
        """List settings that keep the limits, smallest first, each once.

        A setting that keeps the limits keeps them with any group lowered, so all are reached from the smallest one;
        raising only the last raised group or a later one reaches each exactly once.

        Returns:
            Levels of shape (M, G) with M <= at_most, and whether these are all there are.
        """
        num_groups = len(self.levels.num_G)
        frontier_NG, last_N = np.zeros((1, num_groups), dtype=np.int64), np.zeros(1, dtype=np.int64)
        found, num_found = [frontier_NG], 1
        while len(frontier_NG):
            can_NG = (frontier_NG + 1 < self.levels.num_G) & (np.arange(num_groups) >= last_N[:, None])
            parent_N, last_N = np.nonzero(can_NG)
            frontier_NG = frontier_NG[parent_N]
            frontier_NG[np.arange(len(last_N)), last_N] += 1
            fits_N = self.fits(frontier_NG)
            frontier_NG, last_N = frontier_NG[fits_N], last_N[fits_N]
            found.append(frontier_NG)
            num_found += len(frontier_NG)
            if num_found > at_most:
                return np.concatenate(found)[:at_most], False
        return np.concatenate(found), True


def draw_levels(probability_GC: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Draw levels from independent distributions over each group's choices, int64 of shape (num, G)."""
    cumulative_GC = np.cumsum(probability_GC, axis=1)[:, :-1]
    uniform_NG = rng.random((num, len(cumulative_GC)))
    levels_NG = np.empty(uniform_NG.shape, dtype=np.int64)
    for number, cuts_C in enumerate(cumulative_GC):
        levels_NG[:, number] = np.searchsorted(cuts_C, uniform_NG[:, number])
    # Rounding may leave the last cumulative sum below one.
    last_G = probability_GC.shape[1] - 1 - (probability_GC[:, ::-1] > 0).argmax(axis=1)
    return np.minimum(levels_NG, last_G)


def bend(levels: Levels, probability_GC: np.ndarray, limits: Limits) -> np.ndarray:
    """Bend a distribution towards the limits: multiply by exp(-pressure * width share) so that the mean fits them.

    Of all distributions whose mean relative width is the one needed, this is the nearest to the given one, in
    Kullback-Leibler divergence. Costs are taken at the mean widths.

    Args:
        levels: The space.
        probability_GC: The distribution, shape (G, C).
        limits: What the mean widths shall cost.

    Returns:
        A distribution of the same shape whose mean widths cost as much as the limits allow, or nearly.
    """
    share_GC = levels.choices_GC / levels.choices_GC[:, -1:]
    log_GC = np.where(probability_GC > 0, np.log(np.maximum(probability_GC, 1e-300)), -np.inf)

    def bent(pressure_P: np.ndarray) -> np.ndarray:
        logits_PGC = log_GC - pressure_P[:, None, None] * share_GC
        weight_PGC = np.exp(logits_PGC - logits_PGC.max(axis=2, keepdims=True))
        return weight_PGC / weight_PGC.sum(axis=2, keepdims=True)

    low, high = -24.0, 96.0
    for _ in range(3):
        pressure_P = np.linspace(low, high, 17)
        # The more pressure, the smaller the mean widths: every fourth says between which the first that fits is.
        coarse_P = _mean_fits(levels, bent(pressure_P[3:-1:4]), limits)
        start = 4 * (int(coarse_P.argmax()) if coarse_P.any() else len(coarse_P))
        ok_P = _mean_fits(levels, bent(pressure_P[start : start + 4]), limits)
        first = start + int(ok_P.argmax()) if ok_P.any() else len(pressure_P) - 1
        low, high = pressure_P[max(first - 1, 0)], pressure_P[first]
    return bent(np.array([high]))[0]


def mean_costs(levels: Levels, probability_PGC: np.ndarray, limits: Limits) -> np.ndarray:
    """Return the costs at the mean widths of P distributions as shares of the limits, shape (P, 1 + limits)."""
    unit_G = np.array([group.unit for group in levels.space.groups])
    units_PG = (probability_PGC * levels.choices_GC).sum(axis=2) / unit_G
    formulas = levels.space.costs
    costs = [getattr(formulas, resource.name)(units_PG) / limit for resource, limit in limits.each()]
    return np.stack([np.zeros(len(units_PG)), *costs], axis=1)


def _mean_fits(levels: Levels, probability_PGC: np.ndarray, limits: Limits) -> np.ndarray:
    return mean_costs(levels, probability_PGC, limits).max(axis=1) <= _AIM


def _runs(levels_NG: np.ndarray, order_NS: np.ndarray, step: int) -> np.ndarray:
    """Return settings after the first 1, 2, ... S steps of an order of groups, (N, S, G); never below level 0."""
    num, num_steps = order_NS.shape
    change_NSG = np.zeros((num, num_steps, levels_NG.shape[1]), dtype=np.int64)
    np.put_along_axis(change_NSG, order_NS[:, :, None], step, axis=2)
    return np.maximum(levels_NG[:, None] + np.cumsum(change_NSG, axis=1), 0)


def _add_rows(found: dict[bytes, np.ndarray], levels_NG: np.ndarray, most: int) -> None:
    for row_G in levels_NG:
        if len(found) >= most:
            return
        found.setdefault(row_G.tobytes(), row_G)
