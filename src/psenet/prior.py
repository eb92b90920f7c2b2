"""The prior: which widths were good during training, at which cost.

The cost axis (log of MACs) has a few bins. In each bin every group has a categorical distribution over its choices: how
often training visited the choice near that cost, each visit weighted by how good its loss was, smoothed towards
uniform. A loss is good or bad only against what was to be expected at that step of training and at that cost.

Legend: N settings, G channel groups, B cost bins, C choices of the group that has most, K basis functions.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from psenet.budget import Budget, Limits, resolve_limits
from psenet.errors import InputError
from psenet.history import History, read_arrays, write_arrays
from psenet.proposal import Levels, Proposal, bend, mean_costs
from psenet.space import WidthSpace
from psenet.widths import Widths

_FORMAT = 1
_KNOTS = 8
"""Knots of the trend of training."""
_SHARPNESS = 3.0
"""Power of the probabilities that settings are drawn with; above one, because a loss is mostly noise and the visits
weighted by it understate how much better a choice is."""
_CLIP = 3.0
"""A residual counts for at most this many scales."""


class Prior:
    """A distribution over widths, conditioned on cost. Immutable; made by `fit`, `uniform` or `load`.

    Args:
        space: The width space.
        visits_BGC: Weighted visits of each choice of each group in each bin, shape (B, G, C).
        smoothing: Visits added to every group of every bin, shared equally by its choices.
        factor_BGC: What scored candidates say of each choice: how much likelier it is than its visits make it, above 0
            and of the same shape; None for nothing.
        levels: The levels of the space, where they are there already.
    """

    def __init__(
        self,
        space: WidthSpace,
        visits_BGC: np.ndarray,
        *,
        smoothing: float,
        factor_BGC: np.ndarray | None = None,
        levels: Levels | None = None,
    ) -> None:
        self.space = space
        self.smoothing = smoothing
        self.levels = levels or Levels(space)
        self._visits_BGC = visits_BGC
        self._factor_BGC = np.ones_like(visits_BGC) if factor_BGC is None else factor_BGC
        smoothed_BGC = (visits_BGC + smoothing * self.levels.uniform()) * self._factor_BGC
        self._probability_BGC = smoothed_BGC / smoothed_BGC.sum(axis=2, keepdims=True)
        self._proposals: dict[Limits, Proposal] = {}

    def __repr__(self) -> str:
        return f"Prior({self.num_bins} bins, {self._visits_BGC.sum() / max(len(self.space.groups), 1):.4g} visits)"

    def on(self, space: WidthSpace) -> "Prior":
        """Return the prior on the same space with other costs: one with a latency model has one more."""
        if space is self.space:
            return self
        return Prior(space, self._visits_BGC, smoothing=self.smoothing, factor_BGC=self._factor_BGC)

    @property
    def num_bins(self) -> int:
        """How many bins the cost axis has."""
        return len(self._visits_BGC)

    @property
    def bin_macs(self) -> np.ndarray:
        """The MACs at the middle of each bin, ascending, float64 of shape (B,)."""
        return np.exp(_bin_log_macs(self.space, self.num_bins))

    @classmethod
    def uniform(cls, space: WidthSpace, *, num_bins: int = 12, smoothing: float = 4.0) -> "Prior":
        """Return the prior that knows nothing: every choice is as likely as any other, at any cost."""
        _check_positive(num_bins=num_bins, smoothing=smoothing)
        levels = Levels(space)
        return cls(space, np.zeros((num_bins, *levels.valid_GC.shape)), smoothing=smoothing)

    @classmethod
    def fit(
        cls, history: History, space: WidthSpace, *, num_bins: int = 12, smoothing: float = 4.0, half_life: float = 0.5
    ) -> "Prior":
        """Learn from the losses that training saw.

        A visit weighs `exp(-residual / scale)`, where the residual is the loss less the trend of training and less
        the effect of cost (one least-squares fit), and the scale is the residuals' median absolute deviation. Visits
        with a loss that is not finite are left out.

        Args:
            history: Visited subnets; with none in it the result is `uniform`.
            space: The width space.
            num_bins: Bins of cost, of equal size in log MACs, between the smallest and the full model.
            smoothing: Visits added to every group of every bin, shared equally by its choices. A choice never
                visited gets its share of them, no more and no less.
            half_life: Age at which a visit weighs half, as a fraction of the history's steps.

        Raises:
            InputError: The history is of another space, or a setting is not positive.
        """
        _check_positive(num_bins=num_bins, smoothing=smoothing, half_life=half_life)
        prior = cls.uniform(space, num_bins=num_bins, smoothing=smoothing)
        widths_NG, residual_N, freshness_N = loss_residuals(history, space, half_life=half_life)
        if not len(residual_N):
            return prior
        goodness_N = _goodness(residual_N)
        # A weight of one is an average visit: smoothing is then comparable to a number of visits.
        return prior._with_visits(widths_NG, goodness_N * freshness_N / goodness_N.mean())

    @classmethod
    def of_visits(
        cls, history: History, space: WidthSpace, *, num_bins: int = 12, smoothing: float = 4.0, half_life: float = 0.5
    ) -> "Prior":
        """Return where training went, whatever its losses: what `fit` is compared with to see what losses taught it.

        Args and errors are those of `fit`.
        """
        _check_positive(num_bins=num_bins, smoothing=smoothing, half_life=half_life)
        widths_NG, _, freshness_N = loss_residuals(history, space, half_life=half_life)
        prior = cls.uniform(space, num_bins=num_bins, smoothing=smoothing)
        return prior._with_visits(widths_NG, freshness_N) if len(widths_NG) else prior

    def updated(self, widths: Sequence[Widths] | np.ndarray, scores: Sequence[float], *, doubt: float = 2.0) -> "Prior":
        """Return a prior that has also learned from evaluated candidates.

        The probability of a choice is multiplied by the mean goodness of the candidates that have it (see `fit`), not
        by their number: candidates are drawn where the prior is high, and counting them would make it higher still.

        Args:
            widths: The candidates, or their widths as an array of shape (N, G).
            scores: Their scores, higher is better; those not finite are left out.
            doubt: Candidates of average goodness that each choice is credited with beforehand.

        Raises:
            InputError: There is not one score for each candidate.
        """
        widths_NG, scores_N = finite_scores(self.space, widths, scores)
        if not len(scores_N):
            return self
        log_macs_N = np.log(self.space.macs(widths_NG).astype(np.float64))
        # Few candidates, all near one budget: a constant and, once there are enough of them, a slope in cost.
        basis_NK = np.ones((len(scores_N), 1))
        if len(scores_N) >= 16:
            basis_NK = np.stack([basis_NK[:, 0], _unit_range(self.space, log_macs_N)], axis=1)
        goodness_N = _goodness(_residuals(-scores_N, basis_NK))
        goodness_N = goodness_N / goodness_N.mean()
        tried_BGC, good_BGC = (self._counts(widths_NG, each_N) for each_N in (np.ones(len(scores_N)), goodness_N))
        return Prior(
            self.space,
            self._visits_BGC,
            smoothing=self.smoothing,
            factor_BGC=self._factor_BGC * (good_BGC + doubt) / (tried_BGC + doubt),
            levels=self.levels,
        )

    def marginals(self, macs: float) -> dict[str, np.ndarray]:
        """Return, for every group, the probability of each of its choices at a cost."""
        probability_GC = self._probability_BGC[self._nearest_bin(np.array([macs], dtype=np.float64))[0]]
        counts = zip(self.space.groups, probability_GC, strict=True)
        return {group.name: row_C[: len(group.choices)] for group, row_C in counts}

    def keep_ratios(self) -> np.ndarray:
        """Return the share of its channels that each group keeps on average, at the cost of each bin, shape (B, G)."""
        share_GC = self.levels.choices_GC / self.levels.choices_GC[:, -1:]
        return (self._probability_BGC * share_GC).sum(axis=2)

    def log_prob(self, widths_NG: np.ndarray) -> np.ndarray:
        """Return the log-probability of settings at their own cost, float64 of shape (N,)."""
        levels_NG = self.levels.levels(widths_NG)
        bin_N = self._nearest_bin(self.space.macs(widths_NG).astype(np.float64))
        columns = np.arange(levels_NG.shape[1])
        return np.log(self._probability_BGC[bin_N[:, None], columns, levels_NG]).sum(axis=1)

    def sample(self, budget: Budget | Limits, n: int, rng: np.random.Generator) -> list[Widths]:
        """Draw settings inside a budget.

        Args:
            budget: The limits to keep.
            n: How many settings.
            rng: Source of randomness.

        Returns:
            Exactly n settings, all inside the budget, all different unless fewer than n settings are.

        Raises:
            InputError: No setting is inside the budget (the smallest reachable cost is named), or n is negative.
        """
        if n < 0:
            raise InputError(f"the number of settings to sample must not be negative; got {n}")
        limits = resolve_limits(budget, self.space)
        return self.space.from_array(self.levels.widths(self.proposal(limits).sample(n, rng))) if n else []

    def proposal(self, limits: Limits) -> Proposal:
        """Return the distribution to draw from inside reachable limits.

        It mixes the bins whose mean widths keep the limits, those just below them most (the lowest bin if none
        does), and is bent so that its mean widths cost what the limits allow.
        """
        if limits not in self._proposals:
            shares_B = mean_costs(self.levels, self._probability_BGC, limits).max(axis=1)
            gap_B = np.where(shares_B <= 1, np.log(np.maximum(shares_B, 1e-9)), -np.inf)
            nearest = gap_B.max()
            weight_B = np.exp((gap_B - nearest) / 0.1) if np.isfinite(nearest) else np.eye(self.num_bins)[0]
            mixed_GC = np.einsum("b,bgc->gc", weight_B / weight_B.sum(), self._probability_BGC)
            sharp_GC = np.where(self.levels.valid_GC, mixed_GC**_SHARPNESS, 0.0)
            mixed_GC = sharp_GC / sharp_GC.sum(axis=1, keepdims=True)
            liking_GC = np.log(np.maximum(mixed_GC, 1e-300))
            self._proposals[limits] = Proposal(self.levels, limits, bend(self.levels, mixed_GC, limits), liking_GC)
        return self._proposals[limits]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prior as an .npz file; a kill leaves the old file or the new one."""
        arrays = {"visits": self._visits_BGC, "factor": self._factor_BGC, "smoothing": np.array(self.smoothing)}
        write_arrays(path, arrays, space_digest=self.space.digest(), kind="prior", version=_FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str], space: WidthSpace) -> "Prior":
        """Read a prior that `save` wrote.

        Raises:
            InputError: The file is missing or corrupt, or belongs to another space.
        """
        arrays = read_arrays(path, space_digest=space.digest(), kind="prior", version=_FORMAT)
        _check_arrays(arrays, Levels(space), path)
        smoothing = float(arrays["smoothing"])
        return cls(space, arrays["visits"], smoothing=smoothing, factor_BGC=arrays.get("factor"))

    def _with_visits(self, widths_NG: np.ndarray, weight_N: np.ndarray) -> "Prior":
        visits_BGC = self._visits_BGC + self._counts(widths_NG, weight_N)
        return Prior(self.space, visits_BGC, smoothing=self.smoothing, factor_BGC=self._factor_BGC, levels=self.levels)

    def _counts(self, widths_NG: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
        """Count visits of each choice in each bin, shape (B, G, C).

        Each visit is shared by the bins near its cost: a Gaussian as wide as a bin, cut at three bins.
        """
        middle_B = _bin_log_macs(self.space, self.num_bins)
        distance_NB = np.log(self.space.macs(widths_NG).astype(np.float64))[:, None] - middle_B
        distance_NB /= max(middle_B[1] - middle_B[0], 1e-9) if self.num_bins > 1 else np.inf
        kernel_NB = np.where(np.abs(distance_NB) <= 3, np.exp(-0.5 * distance_NB**2), 0.0)
        weight_NB = weight_N[:, None] * kernel_NB
        levels_NG = self.levels.levels(widths_NG)
        counts_BGC = np.zeros_like(self._visits_BGC)
        num_groups, top = self.levels.valid_GC.shape
        slots_NG = levels_NG + np.arange(num_groups) * top
        for number, weight_N in enumerate(weight_NB.T):
            near_N = weight_N > 0
            if near_N.any():
                weight_M = np.repeat(weight_N[near_N], num_groups)
                counts_X = np.bincount(slots_NG[near_N].ravel(), weight_M, minlength=num_groups * top)
                counts_BGC[number] = counts_X.reshape(num_groups, top)
        return counts_BGC

    def _nearest_bin(self, macs_N: np.ndarray) -> np.ndarray:
        return np.abs(np.log(macs_N)[:, None] - _bin_log_macs(self.space, self.num_bins)).argmin(axis=1)


def loss_residuals(
    history: History, space: WidthSpace, *, half_life: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what is left of training's losses without the trend of training and the effect of cost.

    Args:
        history: Visited subnets; visits with a loss that is not finite are left out.
        space: The width space.
        half_life: Age at which a visit weighs half, as a fraction of the history's steps.

    Returns:
        Widths of shape (N, G), residuals of shape (N,), lower is better, and the weights of their age, shape (N,).

    Raises:
        InputError: The history is of another space.
    """
    if history.space_digest != space.digest():
        raise InputError(
            f"the history belongs to another width space ({history.space_digest}, here {space.digest()}): "
            "use the space that the supernet was trained with"
        )
    finite_N = np.isfinite(history.losses)
    widths_NG, losses_N = history.widths[finite_N], history.losses[finite_N]
    if not len(losses_N):
        return widths_NG, losses_N, losses_N
    steps_N = history.steps[finite_N].astype(np.float64)
    time_N = (steps_N - steps_N.min()) / max(np.ptp(steps_N), 1.0)
    log_macs_N = np.log(space.macs(widths_NG).astype(np.float64))
    residual_N = _residuals(losses_N, _basis(time_N, _unit_range(space, log_macs_N)))
    return widths_NG, residual_N, 0.5 ** ((time_N.max() - time_N) / half_life)


def finite_scores(
    space: WidthSpace, widths: Sequence[Widths] | np.ndarray, scores: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidates whose scores are finite: widths of shape (N, G) and scores of shape (N,).

    Raises:
        InputError: There is not one score for each candidate.
    """
    widths_NG = widths if isinstance(widths, np.ndarray) else space.to_array(widths)
    scores_N = np.asarray(scores, dtype=np.float64)
    if scores_N.shape != (len(widths_NG),):
        raise InputError(f"expected {len(widths_NG)} scores, one a candidate; got shape {scores_N.shape}")
    finite_N = np.isfinite(scores_N)
    return widths_NG[finite_N], scores_N[finite_N]


def _bin_log_macs(space: WidthSpace, num_bins: int) -> np.ndarray:
    low, high = np.log(space.macs(space.to_array([space.smallest(), space.full()])).astype(np.float64))
    return low + (high - low) * (np.arange(num_bins) + 0.5) / num_bins


def _unit_range(space: WidthSpace, log_macs_N: np.ndarray) -> np.ndarray:
    """Scale log MACs to 0 at the smallest and 1 at the full model."""
    low, high = np.log(space.macs(space.to_array([space.smallest(), space.full()])).astype(np.float64))
    return (log_macs_N - low) / max(high - low, 1e-9)


def _basis(time_N: np.ndarray, cost_N: np.ndarray) -> np.ndarray:
    """Return the trend of training, the effect of cost and how that changes with training, shape (N, K).

    Losses fall steeply at first: the trend is piecewise linear with knots at equal ratios of time. The effect of cost
    is a cubic (quadratic while data are few), that of its change over training a product with time.
    """
    num = len(time_N)
    columns = [np.ones(num)]
    if num >= 4:
        columns += [cost_N]
    if num >= 8:
        columns += [time_N, cost_N**2]
    if num >= 16 * _KNOTS:
        columns += [np.maximum(time_N - knot, 0.0) for knot in np.geomspace(0.005, 0.7, _KNOTS)]
        columns += [cost_N**3, time_N * cost_N, np.sqrt(time_N) * cost_N, time_N * cost_N**2]
    return np.stack(columns, axis=1)


def _residuals(values_N: np.ndarray, basis_NK: np.ndarray) -> np.ndarray:
    """Return what a least-squares fit leaves, refitted once without outliers so that a loss spike bends nothing."""
    keep_N = np.ones(len(values_N), dtype=bool)
    residual_N = values_N
    for _ in range(2):
        solution_K = np.linalg.lstsq(basis_NK[keep_N], values_N[keep_N], rcond=1e-9)[0]
        residual_N = values_N - basis_NK @ solution_K
        keep_N = np.abs(residual_N) <= 6 * _scale(residual_N) + 1e-12
        if keep_N.sum() < basis_NK.shape[1]:
            break
    return residual_N


def _scale(residual_N: np.ndarray) -> float:
    """Return the median absolute deviation as a standard deviation; if it is zero, the standard deviation."""
    deviation = 1.4826 * float(np.median(np.abs(residual_N - np.median(residual_N))))
    return deviation if deviation > 0 else float(residual_N.std())


def _goodness(residual_N: np.ndarray) -> np.ndarray:
    scale = _scale(residual_N)
    return np.exp(-np.clip(residual_N / scale, -_CLIP, _CLIP)) if scale > 1e-12 else np.ones(len(residual_N))


def _check_positive(**settings: float) -> None:
    problems = [f"{name} must be positive; got {value}" for name, value in settings.items() if not value > 0]
    if problems:
        raise InputError("; ".join(problems))


def _check_arrays(arrays: Mapping[str, np.ndarray], levels: Levels, path: str | os.PathLike[str]) -> None:
    visits = arrays.get("visits", np.zeros(0))
    smoothing = arrays.get("smoothing", np.zeros(1))
    if visits.ndim != 3 or visits.shape[1:] != levels.valid_GC.shape or len(visits) == 0 or smoothing.shape != ():
        raise InputError(
            f"the prior {str(path)!r} must hold visits of shape (bins, {', '.join(map(str, levels.valid_GC.shape))}) "
            f"and one smoothing; got {visits.shape} and {smoothing.shape}"
        )
    factor = arrays.get("factor", np.ones_like(visits))  # files of earlier versions have none
    if factor.shape != visits.shape or not (np.isfinite(factor).all() and (factor > 0).all()):
        raise InputError(f"the prior {str(path)!r} must hold factors above 0, as many as visits")
    if not (np.isfinite(visits).all() and (visits >= 0).all() and 0 < float(smoothing) < np.inf):
        raise InputError(f"the prior {str(path)!r} must hold finite visits, none negative, and a positive smoothing")
