"""Numbers as a reader wants them."""

DASH, MINUS = "–", "−"
NARROW = "\u00a0"
"""Between a number and its unit: no line breaks there."""


def digits(value: float) -> str:
    """Return an amount with three digits, zeros at its end included: `2.20`, `24.6`, `683`."""
    if value == 0:
        return "0"
    for least, decimals in ((99.95, 0), (9.995, 1), (0.0995, 2)):
        if abs(value) >= least:
            return f"{value:.{decimals}f}"
    return f"{value:.3g}"


def short(value: float | None) -> str:
    """Return an amount with three digits and a letter: `4.48M`."""
    if value is None:
        return DASH
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # what rounds to 1000 of the next smaller unit
            return f"{digits(value / size)}{letter}"
    return f"{value:.0f}"


def share(value: float | None, whole: float | None) -> str:
    """Return what part of a whole an amount is: `49 %`."""
    return DASH if value is None or not whole else f"{100 * value / whole:.0f}{NARROW}%"


def with_share(text: str, value: float | None, whole: float | None) -> str:
    """Return an amount as it is written, and what part of a whole it is."""
    return text if value is None or not whole else f"{text} ({share(value, whole)})"


def in_bytes(value: float | None) -> str:
    """Return a size in the units of files, which count by 1000."""
    if value is None:
        return DASH
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * size:
            return f"{digits(value / size)}{NARROW}{unit}"
    return f"{value:.0f}{NARROW}B"


def in_ms(value: float | None) -> str:
    """Return a time in milliseconds."""
    return DASH if value is None else f"{digits(value)}{NARROW}ms"


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a percentage: `98.65 %`."""
    return DASH if value is None else f"{value:.{decimals}f}{NARROW}%"


def points(value: float) -> str:
    """Return a difference of percentages, its sign always there."""
    return f"{value:+.2f}".replace("-", MINUS)


def change(value: float, before: float) -> str:
    """Return by how much an amount differs from another: `+15 %`."""
    return f"{100 * (value / before - 1):+.0f}{NARROW}%".replace("-", MINUS)


def money(value: float, currency: str | None) -> str:
    """Return an amount of money; without a currency the bare number."""
    text = f"{value:,.2f}".replace("-", MINUS)
    return f"{text}{NARROW}{currency}" if currency else text
