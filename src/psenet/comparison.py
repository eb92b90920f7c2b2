"""Is one net better than another, or is it the luck of the images? Statistics of right and wrong answers.

Both nets answer the same images, so that only the images that one of them gets right and the other wrong tell them
apart. Differences are in points of accuracy (percent), positive where the first net leads.
"""

import math
from dataclasses import dataclass

import numpy as np

from psenet.errors import InputError

_NUM_RESAMPLES = 100_000
_POWER = 0.8
"""Chance of seeing a difference, where it is said how many images that takes."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two nets differ on the images of a data set, and what that says of other images of its kind."""

    num_images: int
    num_only_first: int
    """Images that the first net alone gets right."""
    num_only_second: int
    confidence: float
    """Of the interval, 0 to 1."""
    low: float
    """Interval of the difference that all images of this kind would show, in points."""
    high: float
    p_value: float
    """Exact McNemar test: how often chance alone makes a difference at least this large where there is none."""

    @property
    def difference(self) -> float:
        """The first net's accuracy minus the second's, in points."""
        return 100 * (self.num_only_first - self.num_only_second) / self.num_images

    @property
    def is_real(self) -> bool:
        """Whether the difference is more than luck.

        Both must say so: the interval leaves zero out, and the exact test, which alone can be trusted where only a
        handful of images tell the nets apart, calls it rarer than the interval's error.
        """
        return (self.low > 0 or self.high < 0) and self.p_value <= 1 - self.confidence

    @property
    def num_needed(self) -> int | None:
        """Images with which a difference of this size would be seen 8 times in 10; None where there is none."""
        return None if self.difference == 0 else images_needed(self, abs(self.difference))

    @property
    def smallest_visible(self) -> float:
        """The difference, in points, that so many images show 8 times in 10.

        At least one image counts as telling the nets apart: nets that agree on all of these do not on all others.
        """
        share = max(1, self.num_only_first + self.num_only_second) / self.num_images
        return 100 * min(1.0, _error_factor(self.confidence) * math.sqrt(share / self.num_images))


def compare_answers(
    first: np.ndarray,
    second: np.ndarray,
    *,
    confidence: float = 0.95,
    num_resamples: int = _NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two nets by their answers to the same images.

    The interval is the percentile interval of a bootstrap over images. Its value for an image is 1, 0 or -1, so a
    resample is known by how many of each it has, and these numbers are drawn at once. Half an image is added to each of
    the four cells (right or wrong by either net; Agresti and Min 2005, "Simple improved confidence intervals for
    comparing matched proportions"): without it, nets that agree on all images would get the interval from 0 to 0.

    Args:
        first: Whether the first net is right, bool of shape (N,).
        second: The same of the second net, for the same images in the same order.
        confidence: Of the interval, above 0 and below 1. For m comparisons at once, give 1 - error / m (Bonferroni).
        num_resamples: Resamples of the bootstrap.
        seed: Of the resamples.

    Raises:
        InputError: The answers are not of the same images, there are none, or the confidence is out of range.
    """
    _check_answers(first, second)
    if not 0 < confidence < 1:
        raise InputError(f"the confidence must be above 0 and below 1; got {confidence}")
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    size = len(first) + 2
    share_first, share_second = (only_first + 0.5) / size, (only_second + 0.5) / size
    counts = np.random.default_rng(seed).multinomial(
        size, [share_first, share_second, 1 - share_first - share_second], size=num_resamples
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(100 * (counts[:, 0] - counts[:, 1]) / size, [tail, 1 - tail])
    return Comparison(
        num_images=len(first),
        num_only_first=only_first,
        num_only_second=only_second,
        confidence=confidence,
        low=float(low),
        high=float(high),
        p_value=_mcnemar(only_first, only_second),
    )


def images_needed(comparison: Comparison, difference: float) -> int:
    """Return with how many images a difference would be seen 8 times in 10, if nets differ as often as on these.

    Connor 1987, "Sample size for testing differences in proportions for the paired-sample design".

    Args:
        comparison: Says how often the nets differ, and with which confidence the difference shall be seen.
        difference: In points, above 0.
    """
    share = (comparison.num_only_first + comparison.num_only_second) / comparison.num_images
    wanted = difference / 100
    share = max(share, wanted)  # a difference takes at least so many images that one net alone gets right
    error, miss = _normal_quantiles(comparison.confidence)
    return math.ceil(((error * math.sqrt(share) + miss * math.sqrt(share - wanted**2)) / wanted) ** 2)


# Samples --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampledDifferences:
    """Differences that samples of some of the images show: what scoring on so few images is worth."""

    mean: float
    """In points."""
    std: float
    """Standard deviation over the samples, in points."""
    num_ahead: int
    """Samples in which the first net leads."""
    num_level: int
    num_behind: int


def draw_samples(num_images: int, *, num_repeats: int, sample_size: int, seed: int = 0) -> np.ndarray:
    """Draw samples of the images, each without replacement.

    Returns:
        Image numbers, shape (num_repeats, sample_size).

    Raises:
        InputError: A sample would be empty or all of the images, or there are less than two.
    """
    if not 0 < sample_size < num_images:
        raise InputError(
            f"a sample must have at least 1 image and fewer than all {num_images}; got {sample_size}: samples of all "
            "images are all the same"
        )
    if num_repeats < 2:
        raise InputError(f"the spread over samples takes at least 2 of them; got {num_repeats}")
    rng = np.random.default_rng([seed, 1])
    return np.stack([rng.choice(num_images, sample_size, replace=False) for _ in range(num_repeats)])


def sampled_differences(first: np.ndarray, second: np.ndarray, samples: np.ndarray) -> SampledDifferences:
    """Return what the difference of two nets is in each sample, taken together.

    Args:
        first: Whether the first net is right, bool of shape (N,).
        second: The same of the second net.
        samples: Image numbers, shape (K, n), as of `draw_samples`.
    """
    _check_answers(first, second)
    counts = (first.astype(np.int64) - second.astype(np.int64))[samples].sum(axis=1)
    points = 100 * counts / samples.shape[1]
    return SampledDifferences(
        mean=float(points.mean()),
        std=float(points.std(ddof=1)),
        num_ahead=int((counts > 0).sum()),
        num_level=int((counts == 0).sum()),
        num_behind=int((counts < 0).sum()),
    )


# In words -------------------------------------------------------------------------------------------------------------


def verdict(comparison: Comparison, first: str, second: str) -> str:
    """Return a sentence that says whether one of two nets is better.

    Args:
        comparison: Of the first net with the second.
        first: What to call the first net.
        second: What to call the second.
    """
    if comparison.difference < 0:
        comparison = _swapped(comparison)
        first, second = second, first
    points = f"{comparison.difference:.2f} points"
    interval = f"({100 * comparison.confidence:.4g} %: {shown(comparison.low)} to {shown(comparison.high)})"
    if comparison.is_real:
        return f"{first} is better than {second} by {points} {interval}: real"
    lead = f"{first} leads {second} by {points}"
    if comparison.num_needed is None:
        lead = f"{first} and {second} are right equally often"
        remedy = f"so few show a difference only from about {comparison.smallest_visible:.1f} points on"
    else:
        needed = _two_digits(comparison.num_needed)
        remedy = f"about {needed:,} images would be needed to see a difference of this size"
    return f"{lead} {interval}: these {comparison.num_images:,} images cannot tell them apart; {remedy}"


def shown(points: float) -> str:
    """Return points with two decimals, zero without a sign."""
    return f"{round(points, 2) + 0.0:.2f}"


def _swapped(comparison: Comparison) -> Comparison:
    return Comparison(
        num_images=comparison.num_images,
        num_only_first=comparison.num_only_second,
        num_only_second=comparison.num_only_first,
        confidence=comparison.confidence,
        low=-comparison.high,
        high=-comparison.low,
        p_value=comparison.p_value,
    )


def _two_digits(number: int) -> int:
    """Round up to two digits: more would promise what such an estimate does not hold."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step


# The mathematics ------------------------------------------------------------------------------------------------------


def _mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of the exact McNemar test (McNemar 1947): a fair coin for each image that one alone solves."""
    from scipy.stats import binomtest

    num_differing = only_first + only_second
    return 1.0 if num_differing == 0 else float(binomtest(only_first, num_differing).pvalue)


def _normal_quantiles(confidence: float) -> tuple[float, float]:
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2)), float(norm.ppf(_POWER))


def _error_factor(confidence: float) -> float:
    """Return how many standard errors a difference must have to be seen 8 times in 10."""
    return sum(_normal_quantiles(confidence))


def _check_answers(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise InputError(
            f"two nets are compared by their answers to the same images, shape (N,); got shapes {first.shape} and "
            f"{second.shape}"
        )
    if first.dtype != np.bool_ or second.dtype != np.bool_:
        raise InputError(f"answers must be right or wrong (bool); got {first.dtype} and {second.dtype}")
