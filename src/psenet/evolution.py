"""Search: the best widths inside a budget, by evaluating as few as possible."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from psenet.budget import Budget, Limits, resolve_limits
from psenet.errors import InputError
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.space import WidthSpace
from psenet.storage import (
    WORKER,
    numbers_put_back,
    open_storage,
    put_back,
    put_back_orphans,
    without_password,
    worker_name,
)
from psenet.widths import Widths

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from psenet.sampler import PriorEvolutionSampler

_DIGEST = "psenet_space"
_BAD_SCORE = "psenet_bad_score"
_PREDICTED = "psenet_predicted"
_LEAST_PREDICTED = 8
"""So many candidates must have been predicted for their ranks to be compared."""
_PATIENCE = 20
"""So many candidates without a finite score, and none with one, mean that scoring is broken."""


@dataclass(frozen=True)
class Evaluation:
    """One candidate and its score."""

    widths: Widths
    score: float
    """What the score function returned; higher is better."""
    macs: int
    params: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    best: Evaluation
    """The evaluation with the highest score; the earliest of equals."""
    evaluated: tuple[Evaluation, ...]
    """Every evaluation with a finite score, in order, those of earlier runs on the same storage first."""
    num_failed: int
    """Candidates whose score was not finite."""
    exhausted: bool
    """Whether the search stopped because nothing inside the budget was left to evaluate."""
    predicted_rank_correlation: float | None = None
    """Spearman's rho between scores and what the predictor expected before it knew them; None without a predictor or
    with too few candidates."""


@dataclass(frozen=True)
class SearchProgress:
    """What a progress callback is told after every candidate."""

    num_done: int
    """Evaluations finished, earlier runs included."""
    num_evaluations: int
    last: Evaluation | None
    """The candidate just evaluated; None if its score was not finite."""
    best: Evaluation | None


def search(
    space: WidthSpace,
    budget: Budget | Limits,
    score_fn: Callable[[Widths], float],
    *,
    prior: Prior | None = None,
    predictor: Predictor | None = None,
    first: Sequence[Widths] = (),
    num_evaluations: int = 200,
    seed: int = 0,
    storage: str | os.PathLike[str] | None = None,
    study_name: str | None = None,
    population_size: int = 16,
    progress: Callable[[SearchProgress], None] | None = None,
    learn: bool = True,
) -> SearchResult:
    """Find the best widths inside a budget.

    Args:
        space: The width space.
        budget: Upper limits; nothing outside them is evaluated.
        score_fn: Scores one setting, higher is better. A score that is not finite marks the candidate as failed.
        prior: Where good widths are likely, as learned from training; None to start from nothing.
        predictor: Chooses which candidates are worth scoring, and learns from those scored; None to do without.
        first: Settings inside the budget to evaluate before all others, such as the uniform one to be beaten.
        num_evaluations: How many evaluations inside the budget to have in the end, those in `storage` included.
        seed: Seed of the proposals.
        storage: None keeps the study in memory; a path keeps it in a journal file; a URL such as
            `sqlite:///study.db` in a database. A search on a storage that has the study goes on with it. Candidates
            that a killed search on this machine left unfinished are evaluated again.
        study_name: Name of the study in the storage; None for `psenet`.
        population_size: Parents are chosen among so many best candidates.
        progress: Called after every candidate.
        learn: Whether the prior learns from the candidates.

    Returns:
        The best evaluation and all others.

    Raises:
        InputError: The budget cannot be met, a number is out of range, the storage cannot be opened, or prior or
            study belong to another space.
        RuntimeError: No candidate had a finite score.

    Whatever `score_fn` raises goes through; finished evaluations stay in the storage and its candidate is tried again
    by the next search on it.
    """
    from psenet.sampler import PriorEvolutionSampler

    limits = resolve_limits(budget, space)
    _check_settings(
        space, prior, predictor, num_evaluations=num_evaluations, population_size=population_size, seed=seed
    )
    outside = [dict(widths) for widths in first if not limits.holds(space, widths)]
    if outside:
        raise InputError(f"what the search shall try first must be inside the budget; outside are: {outside[:3]}")
    sampler = PriorEvolutionSampler(
        space, limits, prior=prior, seed=seed, population_size=population_size, learn=learn, predictor=predictor
    )
    with _quiet_optuna():
        study = _open_study(storage, study_name or "psenet", sampler, space)
        put_back_orphans(study)
        return _Run(space, limits, study, sampler, tuple(first), num_evaluations, progress).until_done(score_fn)


class _Run:
    """One search on an open study."""

    def __init__(
        self,
        space: WidthSpace,
        limits: Limits,
        study: "Study",
        sampler: "PriorEvolutionSampler",
        first: tuple[Widths, ...],
        num_evaluations: int,
        progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        self._space = space
        self._limits = limits
        self._study = study
        self._sampler = sampler
        self._first = first
        self._num_evaluations = num_evaluations
        self._progress = progress
        # By trial number; None for those outside this budget.
        self._known: dict[int, Evaluation | None] = {}

    def until_done(self, score_fn: Callable[[Widths], float]) -> SearchResult:
        """Evaluate candidates until there are enough, or none is left."""
        from psenet.sampler import SpaceExhausted

        while True:
            evaluated, num_failed = self._evaluated(), self._num_failed()
            if not evaluated and num_failed >= min(_PATIENCE, self._num_evaluations):
                raise RuntimeError(f"all {num_failed} candidates failed: the score was never finite; check score_fn")
            # Candidates without a score count once there are as many of them as evaluations asked for.
            if len(evaluated) >= self._num_evaluations or num_failed >= 2 * self._num_evaluations:
                return self._result(evaluated, num_failed, exhausted=False)
            try:
                trial = self._next_trial()
            except SpaceExhausted:
                if not evaluated:
                    raise RuntimeError(
                        f"all {num_failed} candidates inside the budget failed: the score was never finite; "
                        "check score_fn"
                    ) from None
                return self._result(evaluated, num_failed, exhausted=True)
            if trial is not None:
                self._evaluate(trial, score_fn)

    def _next_trial(self) -> "Trial | None":
        """Start a trial: one that waits, else a new proposal; None if another worker is already at it."""
        from optuna.trial import TrialState, create_trial

        trials = self._study.get_trials(deepcopy=False)
        if not any(trial.state == TrialState.WAITING for trial in trials):
            # Added whole and then asked for: one write, where suggesting each group would be one write a group.
            params = [trial.params for trial in trials]
            untried = (widths for widths in self._first if dict(widths) not in params)
            tried = self._sampler.read(trials)
            widths = next(untried, None) or self._sampler.propose(tried)
            predicted = self._sampler.predict(tried, widths)
            self._study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params=dict(widths),
                    distributions=self._sampler.distributions,
                    user_attrs={WORKER: worker_name(), **({} if predicted is None else {_PREDICTED: predicted})},
                )
            )
        trial = self._study.ask(self._sampler.distributions)
        if trial.user_attrs.get(WORKER) != worker_name():
            trial.set_user_attr(WORKER, worker_name())
        # A search of another budget on this storage may have left what is outside this one.
        if not self._limits.holds(self._space, self._widths(trial)) or self._is_taken(trial):
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            return None
        return trial

    def _is_taken(self, trial: "Trial") -> bool:
        """Return whether an earlier trial has the same widths: of workers that propose the same, the first one wins."""
        trials = self._study.get_trials(deepcopy=False)
        superseded = numbers_put_back(trials)
        params = trial.params
        return any(
            other.params == params for other in trials if other.number < trial.number and other.number not in superseded
        )

    def _evaluate(self, trial: "Trial", score_fn: Callable[[Widths], float]) -> None:
        from optuna.trial import TrialState

        try:
            score = float(score_fn(self._widths(trial)))
        except BaseException:
            put_back(self._study, trial.number)
            raise
        if math.isfinite(score):
            self._study.tell(trial, score, skip_if_finished=True)
        else:
            trial.set_user_attr(_BAD_SCORE, str(score))
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        if self._progress is not None:
            evaluated = self._evaluated()
            last = self._known.get(trial.number)
            best = max(evaluated, key=lambda evaluation: evaluation.score, default=None)
            self._progress(SearchProgress(len(evaluated), self._num_evaluations, last, best))

    def _evaluated(self) -> list[Evaluation]:
        from optuna.trial import TrialState

        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        for trial in done:
            if trial.number not in self._known:
                widths = self._widths(trial)
                inside = self._limits.holds(self._space, widths)
                costs = self._space.macs(widths), self._space.params(widths)
                self._known[trial.number] = Evaluation(widths, trial.values[0], *costs) if inside else None
        # By the time of completion: with one worker that is the order of evaluation, retries included.
        done.sort(key=lambda trial: (trial.datetime_complete, trial.number))
        return [evaluation for trial in done if (evaluation := self._known[trial.number]) is not None]

    def _widths(self, trial: "Trial | FrozenTrial") -> Widths:
        # Optuna copies all parameters on each access.
        params = trial.params
        return Widths({group.name: params[group.name] for group in self._space.groups})

    def _num_failed(self) -> int:
        return sum(_BAD_SCORE in trial.user_attrs for trial in self._study.get_trials(deepcopy=False))

    def _result(self, evaluated: list[Evaluation], num_failed: int, *, exhausted: bool) -> SearchResult:
        best = max(evaluated, key=lambda evaluation: evaluation.score)
        return SearchResult(
            best=best,
            evaluated=tuple(evaluated),
            num_failed=num_failed,
            predicted_rank_correlation=self._rank_correlation(),
            exhausted=exhausted,
        )

    def _rank_correlation(self) -> float | None:
        from optuna.trial import TrialState
        from scipy.stats import spearmanr

        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        pairs = [
            (trial.user_attrs[_PREDICTED], trial.values[0])
            for trial in done
            if _PREDICTED in trial.user_attrs and self._known.get(trial.number) is not None
        ]
        predicted, scores = np.array(pairs).reshape(-1, 2).T
        if len(pairs) < _LEAST_PREDICTED or np.ptp(predicted) == 0 or np.ptp(scores) == 0:
            return None
        return float(spearmanr(predicted, scores)[0])  # pyright: ignore[reportArgumentType, reportIndexIssue]


def _open_study(
    storage: str | os.PathLike[str] | None, study_name: str, sampler: "PriorEvolutionSampler", space: WidthSpace
) -> "Study":
    import optuna

    study = optuna.create_study(
        storage=open_storage(storage),
        sampler=sampler,
        study_name=study_name,
        direction="maximize",
        load_if_exists=True,
    )
    digest = study.user_attrs.get(_DIGEST)
    if digest is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_DIGEST, space.digest())
    elif digest != space.digest():
        raise InputError(
            f"study {study_name!r} in {without_password(storage)} belongs to another width space "
            f"({digest}, here {space.digest()}): use another storage or study_name, "
            "or the model and choices it was made with"
        )
    return study


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Silence Optuna's line for each trial, and restore its verbosity after."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _check_settings(space: WidthSpace, prior: Prior | None, predictor: Predictor | None, **numbers: int) -> None:
    least = {"num_evaluations": 1, "population_size": 2, "seed": 0}
    problems = [
        f"{name} must be at least {least[name]}; got {value}" for name, value in numbers.items() if value < least[name]
    ]
    if prior is not None and prior.space.digest() != space.digest():
        problems.append("the prior belongs to another width space: fit it with this one")
    if predictor is not None and predictor.space.digest() != space.digest():
        problems.append("the predictor belongs to another width space: fit it with this one")
    if problems:
        raise InputError("; ".join(problems))
