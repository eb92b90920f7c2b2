"""How candidates are scored: what a search asks of whoever does it, and the scorer in this process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from psenet.widths import Widths

ScoreOf = Callable[[Widths], float]
"""Scores one setting; higher is better."""


class Scored(NamedTuple):
    """A score, or an estimate of one."""

    score: float
    share: float = 1.0
    """Of the validation samples: how many the score is from. Below 1 it is an estimate."""


@runtime_checkable
class StopsEarly(Protocol):
    """A score that need not be known to its end where a setting is hopeless, such as `psenet.SupernetScore`."""

    def __call__(self, widths: Widths, /) -> float:
        """Return the score of a setting; higher is better."""
        ...

    def against(self, widths: Widths, rival: Widths, /) -> Scored:
        """Return the score of a setting, or an estimate below the rival's score once it is hopeless beside that."""
        ...


def scored(score_fn: ScoreOf, widths: Widths, rival: Widths | None) -> Scored:
    """Score a setting, to the end unless there is a rival and the score can stop early."""
    if rival is not None and isinstance(score_fn, StopsEarly):
        score, share = score_fn.against(widths, rival)
        return Scored(float(score), float(share))
    return Scored(float(score_fn(widths)))


@dataclass(frozen=True)
class Outcome:
    """How the scoring of one candidate ended."""

    key: int
    """As given to `start`."""
    score: float | None
    """None if the worker died."""
    seconds: float
    share: float = 1.0
    """Of the validation samples, which the score is from."""


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

    def start(self, key: int, widths: Widths, rival: Widths | None = None) -> None:
        """Begin to score a candidate, to the end or against a rival; `key` names it in its outcome."""
        ...

    def wait(self) -> list[Outcome]:
        """Wait until at least one started candidate has ended; what the score function raises goes through."""
        ...


class ScoreHere:
    """Scores one candidate at a time in this process."""

    num_workers = 1

    def __init__(self, score_fn: ScoreOf) -> None:
        self._score_fn = score_fn
        self._started: tuple[int, Widths, Widths | None] | None = None

    @property
    def num_free(self) -> int:
        """Whether nothing is started: 1 or 0."""
        return int(self._started is None)

    def start(self, key: int, widths: Widths, rival: Widths | None = None) -> None:
        """Keep a candidate for `wait`, which scores it."""
        self._started = key, widths, rival

    def wait(self) -> list[Outcome]:
        """Score the candidate that was started."""
        assert self._started is not None
        (key, widths, rival), self._started = self._started, None
        begin = time.perf_counter()
        score, share = scored(self._score_fn, widths, rival)
        return [Outcome(key, score, time.perf_counter() - begin, share)]
