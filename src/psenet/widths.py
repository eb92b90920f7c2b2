"""One subnet, described by the width of every channel group."""

import json
from collections.abc import Iterator, Mapping

from psenet.errors import InputError


class Widths(Mapping[str, int]):
    """The number of channels that each group keeps: immutable, hashable, JSON both ways.

    Example:
        >>> widths = Widths({"conv1": 16, "conv2": 8})
        >>> widths["conv2"], len({widths, Widths({"conv1": 16, "conv2": 8})})
        (8, 1)
        >>> Widths.from_json(widths.to_json()) == widths
        True
    """

    __slots__ = ("_hash", "_widths")

    def __init__(self, widths: Mapping[str, int]) -> None:
        """Take a mapping from group name to a positive number of channels.

        Raises:
            InputError: A name is not a string or a width is not a positive integer.
        """
        for name, width in widths.items():
            if not isinstance(name, str) or isinstance(width, bool) or not _is_positive_int(width):
                raise InputError(f"a width is a positive integer for a group name; got {name!r}: {width!r}")
        self._widths = {name: int(width) for name, width in widths.items()}
        self._hash = hash(frozenset(self._widths.items()))

    def __getitem__(self, name: str) -> int:
        return self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Widths):
            return self._hash == other._hash and self._widths == other._widths
        return NotImplemented

    def __repr__(self) -> str:
        return f"Widths({self._widths})"

    def __reduce__(self) -> tuple[type["Widths"], tuple[dict[str, int]]]:
        return Widths, (self._widths,)

    def to_json(self) -> str:
        """Return the widths as a JSON object."""
        return json.dumps(self._widths)

    @classmethod
    def from_json(cls, text: str) -> "Widths":
        """Rebuild widths from `to_json`.

        Raises:
            InputError: The text is not a JSON object of positive integers.
        """
        try:
            widths = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"widths must be a JSON object of group name to width: {error}") from None
        if not isinstance(widths, dict):
            raise InputError(f"widths must be a JSON object of group name to width; got {type(widths).__name__}")
        return cls(widths)


def _is_positive_int(value: object) -> bool:
    try:
        return int(value) == value and int(value) > 0  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):  # int(infinity) overflows
        return False
