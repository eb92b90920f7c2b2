"""Numbers as a reader wants them."""

DASH = "–"


def short(value: float | None) -> str:
    """Return an amount with three digits and a letter: `4.48M`."""
    if value is None:
        return DASH
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # what rounds to 1000 of the next smaller unit
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def share(value: float | None, whole: float | None) -> str:
    """Return what part of a whole an amount is: `49 %`."""
    return DASH if value is None or not whole else f"{100 * value / whole:.0f} %"


def with_share(text: str, value: float | None, whole: float | None) -> str:
    """Return an amount as it is written, and what part of a whole it is."""
    return text if value is None or not whole else f"{text} ({share(value, whole)})"


def in_bytes(value: float | None) -> str:
    """Return a size in the units of files, which count by 1000."""
    if value is None:
        return DASH
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def in_ms(value: float | None) -> str:
    """Return a time in milliseconds, three digits at least."""
    return DASH if value is None else f"{ms_digits(value)} ms"


def ms_digits(value: float) -> str:
    """Return the digits of a time in milliseconds."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 or value < 0.1 else f"{value:.2f}"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a percentage: `98.65 %`."""
    return DASH if value is None else f"{value:.{digits}f} %"


def points(value: float) -> str:
    """Return a difference of percentages, its sign always there."""
    return f"{value:+.2f}".replace("-", "−")


def money(value: float, currency: str | None) -> str:
    """Return an amount of money; without a currency the bare number."""
    text = f"{value:,.2f}".replace("-", "−")
    return f"{text} {currency}" if currency else text
