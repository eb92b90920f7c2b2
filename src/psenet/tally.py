"""What a study holds inside some budgets: evaluations, failures, and the result for each budget."""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from psenet.budget import Limits, cost_of
from psenet.found import Evaluation, SearchResult, best_of
from psenet.growing import Growing
from psenet.space import WidthSpace
from psenet.storage import RETRY_OF, Changes, is_to_be_tried
from psenet.widths import Widths

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

BAD_SCORE = "psenet_bad_score"
"""Trial attribute: the score that was not finite."""
PREDICTED = "psenet_predicted"
"""Trial attribute: the score that the predictor expected."""
SHARE = "psenet_share"
"""Trial attribute: share of the validation samples that the score is from; not there where it is from all."""
_LEAST_PREDICTED = 8
"""So many candidates must have been predicted for their ranks to be compared."""


@dataclass(frozen=True)
class Entry:
    """A trial that has ended inside at least one budget."""

    trial: "FrozenTrial"
    budgets: frozenset[int]
    """Numbers of the budgets that its widths keep."""
    costs: tuple[float, ...]
    """Of its widths, in every resource that some budget limits."""
    evaluation: Evaluation | None
    """None if its score was not finite."""

    @property
    def order(self) -> tuple[datetime | None, int]:
        """By the time of completion: with one worker that is the order of evaluation, retries included."""
        return self.trial.datetime_complete, self.trial.number

    @property
    def score(self) -> float:
        """The score; NaN if it was not finite."""
        return np.nan if self.evaluation is None else self.evaluation.score

    @property
    def is_estimate(self) -> bool:
        """Whether it was stopped early."""
        return self.evaluation is not None and self.evaluation.is_estimate


class Tally:
    """A study as it is at one moment: until its reader reads again.

    Whatever a search asks for after every candidate is kept up to date, not looked for: a study may be large.

    Args:
        num_budgets: How many budgets there are.
    """

    def __init__(self, num_budgets: int) -> None:
        self.trials: list[FrozenTrial] = []
        """All of them, in any state and at any cost."""
        self.left_over: list[FrozenTrial] = []
        """Those to be tried, because they were put back or queued by hand; inside a budget as far as can be told."""
        self.done: list[Entry] = []
        """Those with a score, in the order of completion."""
        self.failed: list[Entry] = []
        """Those whose score was not finite, in the order of their trials."""
        self.best: Entry | None = None
        """The highest score, estimates left out; the earliest of equals."""
        self._inside = [_Inside() for _ in range(num_budgets)]
        # Of those with a score, in the order in which they were read.
        self._read: list[Entry] = []
        self._costs: Growing | None = None
        self._whole_scores = Growing(np.array(-np.inf))

    def add(self, entry: Entry) -> None:
        """Take one more trial in."""
        for budget in entry.budgets:
            self._inside[budget].add(entry)
        if entry.evaluation is None:
            insort(self.failed, entry, key=lambda other: other.trial.number)
            return
        insort(self.done, entry, key=lambda other: other.order)
        if not entry.is_estimate:
            self.best = _higher(self.best, entry)
        self._read.append(entry)
        if self._costs is None:
            self._costs = Growing(np.zeros(len(entry.costs)))
        self._costs.append(np.array(entry.costs))
        self._whole_scores.append(-np.inf if entry.is_estimate else entry.score)

    def evaluated(self, budget: int) -> list[Evaluation]:
        """Return the evaluations inside one budget."""
        entries = (entry for entry in self.done if budget in entry.budgets)
        return [entry.evaluation for entry in entries if entry.evaluation is not None]

    def num_evaluated(self, budget: int) -> int:
        """Return how many evaluations are inside a budget."""
        return self._inside[budget].num_done

    def num_failed(self, budget: int) -> int:
        """Return how many candidates inside a budget had no finite score."""
        return self._inside[budget].num_failed

    def rival(self, budgets: Iterable[int], *, least: int) -> Evaluation | None:
        """Return what a candidate inside these budgets must beat to be the best of one: the lowest of their best.

        Args:
            budgets: Numbers of the budgets that the candidate keeps.
            least: A budget with fewer evaluations has no best yet that counts; then there is no rival.
        """
        inside = [self._inside[budget] for budget in sorted(budgets)]
        best = [each.best for each in inside if each.num_done >= least]
        known = [entry for entry in best if entry is not None]
        return min(known, key=lambda entry: entry.score).evaluation if len(known) == len(inside) else None

    def rival_on_front(self, costs: tuple[float, ...], *, least: int) -> Evaluation | None:
        """Return what a candidate must beat to be on the Pareto front: the best of what costs no more.

        Args:
            costs: The candidate's costs, as in `Entry`.
            least: If fewer evaluations cost no more, there is no rival.
        """
        if self._costs is None:
            return None
        cheaper_N = (self._costs.values <= np.array(costs)).all(axis=1)
        scores_N = np.where(cheaper_N, self._whole_scores.values, -np.inf)
        highest = scores_N.max()
        if cheaper_N.sum() < least or highest == -np.inf:
            return None
        equals = [self._read[number] for number in np.flatnonzero(scores_N == highest)]
        return min(equals, key=lambda entry: entry.order).evaluation

    def doubtful(self, budget: int) -> Entry | None:
        """Return the estimate inside a budget that is higher than its best score, if there is one; the highest.

        It was hopeless beside another one that this budget does not hold: made by a search of other budgets.
        """
        best, estimate = self._inside[budget].best, self._inside[budget].highest_estimate
        return estimate if estimate is not None and (best is None or estimate.score > best.score) else None

    def result(self, budget: int, *, exhausted: bool) -> SearchResult | None:
        """Return what was found inside a budget; None if nothing was."""
        evaluated = self.evaluated(budget)
        best = best_of(evaluated)
        if best is None:
            return None
        return SearchResult(
            best=best,
            evaluated=tuple(evaluated),
            num_failed=self.num_failed(budget),
            exhausted=exhausted,
            predicted_rank_correlation=self._rank_correlation(budget),
        )

    def _rank_correlation(self, budget: int) -> float | None:
        from scipy.stats import spearmanr

        pairs = [
            (entry.trial.user_attrs[PREDICTED], entry.evaluation.score)
            for entry in self.done
            if budget in entry.budgets and entry.evaluation is not None and PREDICTED in entry.trial.user_attrs
        ]
        predicted, scores = np.array(pairs).reshape(-1, 2).T
        if len(pairs) < _LEAST_PREDICTED or np.ptp(predicted) == 0 or np.ptp(scores) == 0:
            return None
        return float(spearmanr(predicted, scores)[0])  # pyright: ignore[reportArgumentType, reportIndexIssue]


class _Inside:
    """What is inside one budget."""

    def __init__(self) -> None:
        self.num_done = self.num_failed = 0
        self.best: Entry | None = None
        self.highest_estimate: Entry | None = None

    def add(self, entry: Entry) -> None:
        """Take one more trial in."""
        if entry.evaluation is None:
            self.num_failed += 1
            return
        self.num_done += 1
        if entry.is_estimate:
            self.highest_estimate = _higher(self.highest_estimate, entry)
        else:
            self.best = _higher(self.best, entry)


def _higher(one: Entry | None, other: Entry) -> Entry:
    """Return the entry with the higher score, the earlier one of equals."""
    if one is None or other.score > one.score:
        return other
    return other if other.score == one.score and other.order < one.order else one


class StudyReader:
    """Reads a study again and again, working each trial out once.

    Args:
        space: The width space.
        budgets: The limits that matter.
        study: Whose trials to read.
    """

    def __init__(self, space: WidthSpace, budgets: tuple[Limits, ...], study: "Study") -> None:
        self._space = space
        self._budgets = budgets
        self._study = study
        self._resources = {resource.name: resource for limits in budgets for resource, _ in limits.each()}
        self._changes = Changes()
        # By trial number: those that count, and those put back or queued by hand.
        self._entries: dict[int, Entry] = {}
        self._to_be_tried: dict[int, FrozenTrial] = {}
        self._superseded: set[int] = set()
        self._tally = Tally(len(budgets))

    def read(self) -> Tally:
        """Return the study as it is now."""
        trials = self._study.get_trials(deepcopy=False)
        changed = self._changes.among(trials)
        # An estimate that was not good enough is an evaluation no more once its widths are scored again.
        retried = {trial.user_attrs[RETRY_OF] for trial in changed if RETRY_OF in trial.user_attrs}
        self._superseded |= retried
        if not retried.isdisjoint(self._entries):
            self._entries = {number: entry for number, entry in self._entries.items() if number not in retried}
            self._tally = Tally(len(self._budgets))
            for entry in self._entries.values():
                self._tally.add(entry)
        counted = [trial for trial in changed if trial.number not in self._superseded]
        for entry in self._entries_of([trial for trial in counted if trial.state.is_finished()]):
            self._entries[entry.trial.number] = entry
            self._tally.add(entry)
        for number in (*retried, *(trial.number for trial in changed)):
            self._to_be_tried.pop(number, None)
        self._to_be_tried |= {trial.number: trial for trial in counted if is_to_be_tried(trial)}
        self._tally.trials = trials
        self._tally.left_over = [trial for _, trial in sorted(self._to_be_tried.items()) if self._may_be_inside(trial)]
        return self._tally

    def evaluation(self, number: int) -> Evaluation | None:
        """Return the evaluation of a trial that was read, None if it has none inside the budgets."""
        entry = self._entries.get(number)
        return None if entry is None else entry.evaluation

    def budgets_of(self, widths: Widths) -> frozenset[int]:
        """Return the numbers of the budgets that a setting keeps."""
        return frozenset(n for n, limits in enumerate(self._budgets) if limits.holds(self._space, widths))

    def costs_of(self, widths: Widths) -> tuple[float, ...]:
        """Return what a setting costs, in every resource that some budget limits."""
        widths_1G = self._space.to_array([widths])
        return tuple(float(cost_of(self._space, resource, widths_1G)[0]) for resource in self._resources.values())

    def widths(self, trial: "FrozenTrial") -> Widths:
        """Return the widths of a trial."""
        return Widths({group.name: trial.params[group.name] for group in self._space.groups})

    def has_widths(self, trial: "FrozenTrial") -> bool:
        """Return whether a trial has the width of every group, which one queued by hand may not have."""
        return all(group.name in trial.params for group in self._space.groups)

    def _may_be_inside(self, trial: "FrozenTrial") -> bool:
        return not self.has_widths(trial) or bool(self.budgets_of(self.widths(trial)))

    def _entries_of(self, trials: "Sequence[FrozenTrial]") -> list[Entry]:
        """Return those of finished trials that count."""
        from optuna.trial import TrialState

        ended = [trial for trial in trials if trial.state == TrialState.COMPLETE or BAD_SCORE in trial.user_attrs]
        if not ended:
            return []
        widths = self._space.from_array(
            np.array([[trial.params[group.name] for group in self._space.groups] for trial in ended])
        )
        widths_NG = self._space.to_array(widths)
        inside_BN = [limits.accepts(self._space, widths_NG) for limits in self._budgets]
        costs_RN = [cost_of(self._space, resource, widths_NG) for resource in self._resources.values()]
        macs_N, params_N = self._space.macs(widths_NG), self._space.params(widths_NG)
        entries = []
        for number, (trial, setting) in enumerate(zip(ended, widths, strict=True)):
            budgets = frozenset(budget for budget, inside_N in enumerate(inside_BN) if inside_N[number])
            costs = tuple(float(costs_N[number]) for costs_N in costs_RN)
            evaluation = None
            if trial.state == TrialState.COMPLETE:
                share = float(trial.user_attrs.get(SHARE, 1.0))
                counts = int(macs_N[number]), int(params_N[number])
                evaluation = Evaluation(setting, trial.values[0], *counts, share)
            if budgets:
                entries.append(Entry(trial, budgets, costs, evaluation))
        return entries
