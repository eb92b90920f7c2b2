"""An array that grows at its end: a list whose values can be computed with."""

import numpy as np


class Growing:
    """Values in one array, with room for more; adding one takes constant time on average.

    Args:
        fill: What new values are, of any shape (...).
    """

    def __init__(self, fill: np.ndarray) -> None:
        self._fill = fill
        self._room = np.zeros((0, *fill.shape), dtype=fill.dtype)
        self._num = 0

    def __len__(self) -> int:
        return self._num

    @property
    def values(self) -> np.ndarray:
        """The values, shape (N, ...), to read and to write until it grows."""
        return self._room[: self._num]

    def grow_to(self, num: int) -> None:
        """Make it at least so long."""
        if num > len(self._room):
            more = max(num, 2 * len(self._room)) - len(self._room)
            self._room = np.concatenate([self._room, np.broadcast_to(self._fill, (more, *self._fill.shape))])
        self._num = max(num, self._num)

    def append(self, value: np.ndarray | float) -> None:
        """Add one value."""
        self.grow_to(self._num + 1)
        self._room[self._num - 1] = value
