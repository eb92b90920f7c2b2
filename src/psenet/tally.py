"""What a study holds inside some budgets: evaluations, failures, and the result for each budget."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from psenet.budget import Limits, cost_of
from psenet.found import Evaluation, SearchResult, best_of
from psenet.space import WidthSpace
from psenet.storage import left_over, numbers_retried
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


@dataclass(frozen=True)
class Tally:
    """A study as it is at one moment."""

    trials: "list[FrozenTrial]"
    """All of them, in any state and at any cost."""
    left_over: "list[FrozenTrial]"
    """Those to be tried, because they were put back or queued by hand; inside a budget as far as can be told."""
    done: list[Entry]
    """Those with a score, in the order of completion."""
    failed: list[Entry]
    """Those whose score was not finite."""

    def evaluated(self, budget: int | None = None) -> list[Evaluation]:
        """Return the evaluations inside one budget, or inside any."""
        entries = (entry for entry in self.done if budget is None or budget in entry.budgets)
        return [entry.evaluation for entry in entries if entry.evaluation is not None]

    def rival(self, budgets: Iterable[int], *, least: int) -> Evaluation | None:
        """Return what a candidate inside these budgets must beat to be the best of one: the lowest of their best.

        Args:
            budgets: Numbers of the budgets that the candidate keeps.
            least: A budget with fewer evaluations has no best yet that counts; then there is no rival.
        """
        inside = [self.evaluated(budget) for budget in sorted(budgets)]
        best = [best_of(evaluated) for evaluated in inside if len(evaluated) >= least]
        known = [evaluation for evaluation in best if evaluation is not None]
        return min(known, key=lambda evaluation: evaluation.score) if len(known) == len(inside) else None

    def rival_on_front(self, costs: tuple[float, ...], *, least: int) -> Evaluation | None:
        """Return what a candidate must beat to be on the Pareto front: the best of what costs no more.

        Args:
            costs: The candidate's costs, as in `Entry`.
            least: If fewer evaluations cost no more, there is no rival.
        """
        cheaper = [
            entry.evaluation
            for entry in self.done
            if entry.evaluation is not None and all(map(operator.le, entry.costs, costs))
        ]
        return best_of(cheaper) if len(cheaper) >= least else None

    def doubtful(self, budget: int) -> Entry | None:
        """Return the estimate inside a budget that is higher than its best score, if there is one; the highest.

        It was hopeless beside another one that this budget does not hold: made by a search of other budgets.
        """
        best = best_of(self.evaluated(budget))
        above = [
            (evaluation.score, entry)
            for entry in self.done
            if (evaluation := entry.evaluation) is not None
            and evaluation.is_estimate
            and budget in entry.budgets
            and (best is None or evaluation.score > best.score)
        ]
        return max(above, key=lambda pair: pair[0])[1] if above else None

    def num_failed(self, budget: int) -> int:
        """Return how many candidates inside a budget had no finite score."""
        return sum(budget in entry.budgets for entry in self.failed)

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
        # By trial number, for trials that will not change; None for those that do not count.
        self._entries: dict[int, Entry | None] = {}

    def read(self) -> Tally:
        """Return the study as it is now."""
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.number not in self._entries and trial.state.is_finished():
                self._entries[trial.number] = self._entry(trial)
        # An estimate that was not good enough is an evaluation no more once its widths are scored again.
        superseded = numbers_retried(trials)
        counted = (trial.number for trial in trials if trial.number not in superseded)
        entries = [entry for number in counted if (entry := self._entries.get(number)) is not None]
        done = [entry for entry in entries if entry.evaluation is not None]
        # By the time of completion: with one worker that is the order of evaluation, retries included.
        done.sort(key=lambda entry: (entry.trial.datetime_complete, entry.trial.number))
        failed = [entry for entry in entries if entry.evaluation is None]
        return Tally(trials, [trial for trial in left_over(trials) if self._may_be_inside(trial)], done, failed)

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

    def _entry(self, trial: "FrozenTrial") -> Entry | None:
        from optuna.trial import TrialState

        is_done = trial.state == TrialState.COMPLETE
        if not is_done and BAD_SCORE not in trial.user_attrs:
            return None
        widths = self.widths(trial)
        budgets = self.budgets_of(widths)
        if not budgets:
            return None
        costs = self.costs_of(widths)
        if not is_done:
            return Entry(trial, budgets, costs, None)
        share = float(trial.user_attrs.get(SHARE, 1.0))
        evaluation = Evaluation(widths, trial.values[0], self._space.macs(widths), self._space.params(widths), share)
        return Entry(trial, budgets, costs, evaluation)
