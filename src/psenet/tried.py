"""What a study has tried: all settings, and the scores of those that have one, carried on from trial to trial.

A study may have a hundred thousand trials. Each is worked out once, and what a proposal asks for is kept up to date, so
that one more candidate costs about the same however many there are.

Legend: G channel groups, N settings.
"""

from bisect import insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from psenet.budget import Limits
from psenet.growing import Growing
from psenet.proposal import Levels
from psenet.storage import RETRY_OF, Changes
from psenet.widths import Widths

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_CHUNK = 8192
"""Settings whose costs are worked out at once."""


class Inside(NamedTuple):
    """What has been tried inside some limits."""

    num_settings: int
    levels: np.ndarray
    """Of the best, in order, the earlier of equals first, shape (N, G)."""
    scores: np.ndarray
    """Shape (N,)."""


class Tried:
    """What has been tried in one study.

    Of widths that are tried again only the new trial counts.

    Args:
        levels: The levels of the study's space.
    """

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self._names = [group.name for group in levels.space.groups]
        self._changes = Changes()
        self._superseded: set[int] = set()
        # Both by trial number; rows of trials without all their widths stay empty.
        self._rows = Growing(np.zeros(len(self._names), dtype=np.int64))
        self._scores = Growing(np.array(np.nan))
        self._trials_of: dict[bytes, list[int]] = {}
        self._done: list[int] = []
        self._best: dict[tuple[Limits, int], _Best] = {}
        # Trial numbers in the order in which their settings became known and scores came: what `_Best` has not seen.
        self._new_settings: list[int] = []
        self._new_scores: list[int] = []
        # Something counts no more, so that all is to be counted anew.
        self._is_outdated = False

    def read(self, trials: "Sequence[FrozenTrial]") -> None:
        """Take in the study as it is now: all its trials, in any state, in their order."""
        changed = self._changes.among(trials)
        self._rows.grow_to(len(trials))
        self._scores.grow_to(len(trials))
        self._take_settings(changed)
        for trial in changed:
            if RETRY_OF in trial.user_attrs:
                self._supersede(trial.user_attrs[RETRY_OF])
        for trial in changed:
            self._take_score(trial)
        if self._is_outdated:
            self._best.clear()
            self._new_settings = [numbers[0] for numbers in self._trials_of.values()]
            self._new_scores = list(self._done)
            self._is_outdated = False

    @property
    def num_settings(self) -> int:
        """How many different settings have been tried, or are being tried."""
        return len(self._trials_of)

    @property
    def num_scores(self) -> int:
        """How many trials have a score."""
        return len(self._done)

    def knows(self, levels_G: np.ndarray) -> bool:
        """Return whether a setting has been tried, or is being tried."""
        return levels_G.tobytes() in self._trials_of

    def first_trial(self, widths: Widths) -> int | None:
        """Return the number of the first trial of a setting; None if there is none."""
        row_1G = self._levels.levels(self._levels.space.to_array([widths]))
        return min(self._trials_of.get(row_1G.tobytes(), ()), default=None)

    def scored(self, *, at_most: int, among_first: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the latest settings that have a score, in the order of their trials.

        Args:
            at_most: How many.
            among_first: Only among so many first ones; None for all.

        Returns:
            Levels of shape (N, G) and scores of shape (N,).
        """
        end = len(self._done) if among_first is None else among_first
        numbers_N = self._done[max(0, end - at_most) : end]
        return self._rows.values[numbers_N], self._scores.values[numbers_N]

    def inside(self, limits: Limits, *, at_most: int) -> Inside:
        """Return how many settings inside limits have been tried, and those with the highest scores.

        Args:
            limits: The limits.
            at_most: How many to return.
        """
        best = self._best.setdefault((limits, at_most), _Best(at_most))
        for numbers in best.unseen_settings(self._new_settings):
            best.num_settings += int(self._fits(limits, numbers).sum())
        for numbers in best.unseen_scores(self._new_scores):
            best.take(np.array(numbers)[self._fits(limits, numbers)], self._scores.values)
        return Inside(best.num_settings, self._rows.values[best.numbers_N], self._scores.values[best.numbers_N])

    def _fits(self, limits: Limits, numbers: list[int]) -> np.ndarray:
        return limits.accepts(self._levels.space, self._levels.widths(self._rows.values[numbers]))

    def _take_settings(self, trials: "Sequence[FrozenTrial]") -> None:
        """Take in the settings of trials that have all their widths by now."""
        whole = [
            trial
            for trial in trials
            if trial.number not in self._superseded and all(name in trial.params for name in self._names)
        ]
        widths = [[trial.params[name] for name in self._names] for trial in whole]
        rows_NG = self._levels.levels(np.array(widths, dtype=np.int64).reshape(len(whole), len(self._names)))
        for trial, row_G in zip(whole, rows_NG, strict=True):
            numbers = self._trials_of.setdefault(row_G.tobytes(), [])
            if trial.number in numbers:  # it was running when it was read before
                continue
            if not numbers:
                self._new_settings.append(trial.number)
            numbers.append(trial.number)
            self._rows.values[trial.number] = row_G

    def _supersede(self, number: int) -> None:
        """Let a trial count no more."""
        if number in self._superseded:
            return
        self._superseded.add(number)
        key = self._rows.values[number].tobytes()
        numbers = self._trials_of.get(key, [])
        if number in numbers:
            numbers.remove(number)
            if not numbers:
                del self._trials_of[key]
                self._is_outdated = True
        if not np.isnan(self._scores.values[number]):
            self._scores.values[number] = np.nan
            self._done.remove(number)
            self._is_outdated = True

    def _take_score(self, trial: "FrozenTrial") -> None:
        from optuna.trial import TrialState

        if trial.state != TrialState.COMPLETE or not trial.values or trial.number in self._superseded:
            return
        if np.isfinite(trial.values[0]) and all(name in trial.params for name in self._names):
            self._scores.values[trial.number] = trial.values[0]
            insort(self._done, trial.number)
            self._new_scores.append(trial.number)


class _Best:
    """The best inside some limits, as far as they have been looked at."""

    def __init__(self, at_most: int) -> None:
        self.num_settings = 0
        self.numbers_N = np.zeros(0, dtype=np.int64)
        self._at_most = at_most
        self._settings_seen = self._scores_seen = 0

    def unseen_settings(self, numbers: list[int]) -> list[list[int]]:
        """Return what has been added since the last call, in chunks."""
        begin, self._settings_seen = self._settings_seen, len(numbers)
        return _chunks(numbers, begin)

    def unseen_scores(self, numbers: list[int]) -> list[list[int]]:
        """Return what has been added since the last call, in chunks."""
        begin, self._scores_seen = self._scores_seen, len(numbers)
        return _chunks(numbers, begin)

    def take(self, numbers_M: np.ndarray, scores_T: np.ndarray) -> None:
        """Take in more trials; whatever the order in which they come, the same are kept."""
        numbers_N = np.sort(np.concatenate([self.numbers_N, numbers_M]))
        self.numbers_N = numbers_N[np.argsort(-scores_T[numbers_N], kind="stable")[: self._at_most]]


def _chunks(numbers: list[int], begin: int) -> list[list[int]]:
    return [numbers[first : first + _CHUNK] for first in range(begin, len(numbers), _CHUNK)]
