"""How sure an accuracy is that was counted on so many samples."""

import math

_Z95 = 1.959963984540054
"""Of the standard normal distribution, 2.5 % on either side."""


def wilson_interval(accuracy: float, num_samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers (Wilson, J. Am. Stat. Assoc. 22, 1927).

    Args:
        accuracy: In percent, as counted.
        num_samples: On so many samples, at least one.

    Returns:
        Lower and upper end in percent.

    Example:
        >>> low, high = wilson_interval(90.0, 100)
        >>> f"{low:.1f} to {high:.1f}"
        '82.6 to 94.5'
    """
    share, z2 = accuracy / 100, _Z95**2
    scale = 1 + z2 / num_samples
    middle = (share + z2 / (2 * num_samples)) / scale
    reach = _Z95 / scale * math.sqrt(share * (1 - share) / num_samples + z2 / (4 * num_samples**2))
    return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether two intervals have a point in common."""
    return one[0] <= other[1] and other[0] <= one[1]
