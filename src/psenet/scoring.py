"""How candidates are scored: what a search asks of whoever does it, and the scorer in this process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from psenet.widths import Widths

ScoreOf = Callable[[Widths], float]
"""Scores one setting; higher is better."""


@dataclass(frozen=True)
class Outcome:
    """How the scoring of one candidate ended."""

    key: int
    """As given to `start`."""
    score: float | None
    """None if the worker died."""
    seconds: float


class Scorer(Protocol):
    """Scores candidates, one or several at a time."""

    @property
    def num_workers(self) -> int:
        """How many can be scored at once."""
        ...

    @property
    def num_free(self) -> int:
        """How many more can be started now."""
        ...

    def start(self, key: int, widths: Widths) -> None:
        """Begin to score a candidate; `key` names it in its outcome."""
        ...

    def wait(self) -> list[Outcome]:
        """Wait until at least one started candidate has ended; what the score function raises goes through."""
        ...


class ScoreHere:
    """Scores one candidate at a time in this process."""

    num_workers = 1

    def __init__(self, score_fn: ScoreOf) -> None:
        self._score_fn = score_fn
        self._started: tuple[int, Widths] | None = None

    @property
    def num_free(self) -> int:
        """Whether nothing is started: 1 or 0."""
        return int(self._started is None)

    def start(self, key: int, widths: Widths) -> None:
        """Keep a candidate for `wait`, which scores it."""
        self._started = key, widths

    def wait(self) -> list[Outcome]:
        """Score the candidate that was started."""
        assert self._started is not None
        (key, widths), self._started = self._started, None
        begin = time.perf_counter()
        score = float(self._score_fn(widths))
        return [Outcome(key, score, time.perf_counter() - begin)]
