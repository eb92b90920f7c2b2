"""One search on an open study: propose, score, keep, until there are enough evaluations or none is left."""

import contextlib
import math
import statistics
import uuid
from bisect import insort
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from psenet.budget import Limits
from psenet.found import SearchProgress, SearchResult
from psenet.scoring import Outcome, Scorer
from psenet.space import WidthSpace
from psenet.storage import RETRY_OF, WORKER, put_back, worker_name
from psenet.tally import BAD_SCORE, PREDICTED, SHARE, StudyReader, Tally
from psenet.widths import Widths

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from psenet.sampler import PriorEvolutionSampler

_KEY = "psenet_key"
"""Trial attribute: by which the trial just added is found."""
_PATIENCE = 20
"""So many candidates without a finite score, and none with one, mean that scoring is broken."""


class StudyRun:
    """One search on an open study.

    Args:
        space: The width space.
        budgets: The limits to search inside of, at least one.
        study: Where the trials are.
        sampler: Proposes settings.
        first: Settings to evaluate before all others.
        num_evaluations: How many evaluations inside any of the budgets to have in the end.
        least_rivals: A candidate is scored against the best of at least so many evaluations, and so perhaps not to its
            end; None to score all to the end.
        keep_front: Whether that is the best of what costs no more, not that of the budgets.
        progress: Called after every candidate.
    """

    def __init__(
        self,
        space: WidthSpace,
        budgets: Sequence[Limits],
        study: "Study",
        sampler: "PriorEvolutionSampler",
        *,
        first: Sequence[Widths],
        num_evaluations: int,
        least_rivals: int | None,
        keep_front: bool,
        progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        self._space = space
        self._budgets = tuple(budgets)
        self._study = study
        self._reader = StudyReader(space, self._budgets, study)
        self._sampler = sampler
        self._first = tuple(first)
        self._num_evaluations = num_evaluations
        self._least_rivals = least_rivals
        self._keep_front = keep_front
        self._progress = progress
        self._running: dict[int, FrozenTrial] = {}
        self._exhausted: set[int] = set()
        self._tried = sampler.tried()
        self._seconds: list[float] = []  # ascending, so that their median is found fast

    def until_done(self, scorer: Scorer) -> list[SearchResult]:
        """Evaluate candidates until there are enough, or none is left.

        Returns:
            One result for each budget.

        Raises:
            RuntimeError: Inside a budget no score was finite.
        """
        try:
            while True:
                tally = self._reader.read()
                is_enough = self._is_enough(tally)
                turns = self._turns(tally, is_enough=is_enough)
                again = None if self._running or turns else self._doubtful(tally)
                if scorer.num_free and (turns or (tally.left_over and not is_enough)):
                    self._start(tally, turns, scorer)
                elif self._running or ((turns or again) and not scorer.num_workers):
                    for outcome in scorer.wait():
                        self._finish(outcome, scorer)
                elif again is not None:
                    self._score(self._begin_again(again), tally, scorer)
                else:
                    return [self._result(tally, budget) for budget in range(len(self._budgets))]
        except BaseException:
            for number in self._running:
                put_back(self._study, number)
            raise

    # Whose turn it is ---------------------------------------------------------------------------------------------

    def _is_enough(self, tally: Tally) -> bool:
        """Return whether no more candidates are needed than are being scored.

        Candidates without a score count once there are as many of them as evaluations asked for.
        """
        is_scored = len(tally.done) + len(self._running) >= self._num_evaluations
        return is_scored or len(tally.failed) >= 2 * self._num_evaluations

    def _turns(self, tally: Tally, *, is_enough: bool) -> list[int]:
        """Return the budgets that may propose: all, but in the end only those that have no evaluation yet."""
        lacking = [budget for budget in range(len(self._budgets)) if not tally.num_evaluated(budget)]
        for budget in lacking:
            num_failed = tally.num_failed(budget)
            if num_failed >= min(_PATIENCE, self._num_evaluations):
                where = f" inside {self._described(budget)}" if len(self._budgets) > 1 else ""
                raise RuntimeError(
                    f"all {num_failed} candidates{where} failed: the score was never finite; check score_fn"
                )
        allowed = range(len(self._budgets))
        if is_enough:
            # What is being scored may be inside them.
            allowed = [] if self._running else lacking
        return [budget for budget in allowed if budget not in self._exhausted]

    def _in_turn(self, num_known: int) -> list[int]:
        """Return all budgets, that whose turn it is first; the others change places, so that all share its turn."""
        num = len(self._budgets)
        first = num_known % num
        others = [(first + step) % num for step in range(1, num)]
        shift = (num_known // num) % max(1, len(others))
        return [first, *others[shift:], *others[:shift]]

    # One candidate ------------------------------------------------------------------------------------------------

    def _start(self, tally: Tally, turns: list[int], scorer: Scorer) -> None:
        """Begin to score a candidate: one that was put back, else a new one."""
        if tally.left_over:
            trial = self._begin_again(tally.left_over[0])
        else:
            self._tried.read(tally.trials)
            widths = self._next_first() or self._proposed(turns)
            if widths is None:
                return
            predicted = self._sampler.predict(self._tried, widths)
            trial = self._begin(widths, {} if predicted is None else {PREDICTED: predicted})
        self._score(trial, tally, scorer)

    def _score(self, trial: "FrozenTrial", tally: Tally, scorer: Scorer) -> None:
        """Hand a candidate to the scorer, unless another search is at it."""
        from optuna.trial import TrialState

        widths = self._reader.widths(trial)
        # A search of other budgets on this storage may have left what is outside these.
        if not self._reader.budgets_of(widths) or self._is_taken(trial):
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            return
        self._running[trial.number] = trial
        scorer.start(trial.number, widths, self._rival(tally, widths))

    def _rival(self, tally: Tally, widths: Widths) -> Widths | None:
        """Return what a candidate is scored against, by nothing but the study; None to score it to its end."""
        if self._least_rivals is None or widths in self._first:
            return None
        if self._keep_front:
            rival = tally.rival_on_front(self._reader.costs_of(widths), least=self._least_rivals)
        else:
            rival = tally.rival(self._reader.budgets_of(widths), least=self._least_rivals)
        return None if rival is None else rival.widths

    def _doubtful(self, tally: Tally) -> "FrozenTrial | None":
        """Return an estimate that may be the best inside a budget, to be scored again."""
        found = (tally.doubtful(budget) for budget in range(len(self._budgets)))
        return next((entry.trial for entry in found if entry is not None), None)

    def _next_first(self) -> Widths | None:
        return next((widths for widths in self._first if self._tried.first_trial(widths) is None), None)

    def _begin(self, widths: Widths, attributes: dict[str, Any]) -> "FrozenTrial":
        """Add a running trial, whole: one write, where suggesting each group would be one write a group."""
        from optuna.trial import TrialState, create_trial

        key = uuid.uuid4().hex
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=dict(widths),
                distributions=self._sampler.distributions,
                user_attrs={WORKER: worker_name(), _KEY: key, **attributes},
            )
        )
        return next(trial for trial in reversed(self._read_tried()) if trial.user_attrs.get(_KEY) == key)

    def _begin_again(self, left: "FrozenTrial") -> "FrozenTrial":
        """Begin a trial with the widths of one that was put back or queued by hand."""
        from optuna.trial import TrialState

        if left.state == TrialState.WAITING:
            # Perhaps queued in part: the sampler fills in the rest.
            number = self._study.ask(self._sampler.distributions).number
            return self._read_tried()[number]
        predicted = {name: value for name, value in left.user_attrs.items() if name == PREDICTED}
        return self._begin(self._reader.widths(left), {RETRY_OF: left.number, **predicted})

    def _read_tried(self) -> "list[FrozenTrial]":
        """Return the trials as they are now, with note taken of what they try."""
        trials = self._study.get_trials(deepcopy=False)
        self._tried.read(trials)
        return trials

    def _proposed(self, turns: list[int]) -> Widths | None:
        from psenet.sampler import SpaceExhausted

        for budget in self._in_turn(self._tried.num_settings):
            if budget in turns:
                try:
                    return self._sampler.propose(self._tried, self._budgets[budget])
                except SpaceExhausted:
                    self._exhausted.add(budget)
        return None

    def _is_taken(self, trial: "FrozenTrial") -> bool:
        """Return whether an earlier trial has the same widths: of searches that propose the same, the first wins.

        The study was read after the trial was added, so all earlier ones are known.
        """
        first = self._tried.first_trial(self._reader.widths(trial))
        return first is not None and first < trial.number

    def _finish(self, outcome: Outcome, scorer: Scorer) -> None:
        """Keep a score; put the candidate back if its worker died."""
        from optuna.trial import TrialState

        trial = self._running[outcome.key]
        if outcome.score is None:
            put_back(self._study, trial.number)
        elif math.isfinite(outcome.score):
            if outcome.share < 1:
                self._note(trial, SHARE, outcome.share)
            self._study.tell(trial.number, outcome.score, skip_if_finished=True)
        else:
            self._note(trial, BAD_SCORE, str(outcome.score))
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        del self._running[outcome.key]
        if outcome.score is not None:
            insort(self._seconds, outcome.seconds)
            if self._progress is not None:
                self._progress(self._told(outcome.key, scorer.num_workers))

    def _note(self, trial: "FrozenTrial", name: str, value: float | str) -> None:
        """Keep something beside a score, unless another search has put the candidate back meanwhile."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import Trial

        with contextlib.suppress(UpdateFinishedTrialError):
            Trial(self._study, trial._trial_id).set_user_attr(name, value)

    def _told(self, number: int, num_workers: int) -> SearchProgress:
        tally = self._reader.read()
        num_left = max(0, self._num_evaluations - len(tally.done))
        return SearchProgress(
            num_done=len(tally.done),
            num_evaluations=self._num_evaluations,
            last=self._reader.evaluation(number),
            best=None if tally.best is None else tally.best.evaluation,
            seconds_left=statistics.median(self._seconds) * num_left / max(1, num_workers),
        )

    # The end ------------------------------------------------------------------------------------------------------

    def _result(self, tally: Tally, budget: int) -> SearchResult:
        result = tally.result(budget, exhausted=budget in self._exhausted)
        if result is None:
            what = "the budget" if len(self._budgets) == 1 else self._described(budget)
            raise RuntimeError(
                f"all {tally.num_failed(budget)} candidates inside {what} failed: the score was never finite; "
                "check score_fn"
            )
        return result

    def _described(self, budget: int) -> str:
        return f"the budget of {self._budgets[budget].describe(self._space)}"
