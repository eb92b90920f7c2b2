"""What a maker of parts returns."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Random = random.Random


@dataclass(frozen=True)
class Made:
    """A part and the shape of what it returns, (B, channels, side, side)."""

    module: nn.Module
    channels: int
    side: int


Maker = Callable[[Random, int, int], Made | None]
"""Takes a random generator, channels and side of the input; None where that does not suit the part."""
