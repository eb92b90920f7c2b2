"""Search: the best widths inside a budget, or inside several, by evaluating as few as possible."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from psenet.budget import Budget, Limits, resolve_limits
from psenet.errors import InputError
from psenet.found import Evaluation, SearchProgress, SearchResult
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.space import WidthSpace
from psenet.storage import open_study, put_back_orphans
from psenet.study import StudyRun
from psenet.widths import Widths
from psenet.workers import open_scorer

__all__ = ["Evaluation", "SearchProgress", "SearchResult", "search", "search_each"]


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
    early_stopping: bool = True,
    workers: int = 1,
) -> SearchResult:
    """Find the best widths inside a budget.

    With one worker the same seed gives the same search, in parts or in one go. With several, or where several searches
    share a storage, a proposal depends on which scores are there in time, and no two searches need be the same.

    Args:
        space: The width space.
        budget: Upper limits; nothing outside them is evaluated.
        score_fn: Scores one setting, higher is better. A score that is not finite marks the candidate as failed.
            With several workers it must be picklable; each worker has a copy of its own.
        prior: Where good widths are likely, as learned from training; None to start from nothing.
        predictor: Chooses which candidates are worth scoring, and learns from those scored; None to do without.
        first: Settings inside the budget to evaluate before all others, such as the uniform one to be beaten.
        num_evaluations: How many evaluations inside the budget to have in the end, those in `storage` included.
        seed: Seed of the proposals.
        storage: None keeps the study in memory; a path keeps it in a journal file; a URL such as
            `sqlite:///study.db` or `postgresql://user@host/name` in a database. A search on a storage that has the
            study goes on with it, and joins in where another search, on any machine, is still at it. Candidates that
            a killed search on this machine left unfinished are evaluated again.
        study_name: Name of the study in the storage; None for `psenet`.
        population_size: Parents are chosen among so many best candidates.
        progress: Called in this process after every candidate that this search scored.
        learn: Whether the prior learns from the candidates.
        early_stopping: Score a candidate only until it is hopeless to beat the best so far, where `score_fn` is a
            `SupernetScore` that can, or has an `against` of its own; see `psenet.SupernetScore.against`. Not before
            there are `population_size` evaluations, and never one of `first`. What was stopped has an estimate for a
            score, from which the search learns as from any other.
        workers: Score in so many processes, which share this one's threads; 1 to score in this process. One that is
            killed is warned of, and the others score its candidate again.

    Returns:
        The best evaluation and all others.

    Raises:
        InputError: The budget cannot be met, a number is out of range, the storage cannot be opened, prior or
            study belong to another space, or the score function cannot be sent to workers.
        RuntimeError: No candidate had a finite score, or all workers died.

    Whatever `score_fn` raises goes through; finished evaluations stay in the storage and its candidate is tried again
    by the next search on it.
    """
    (found,) = search_each(
        space,
        [budget],
        score_fn,
        prior=prior,
        predictor=predictor,
        first=first,
        num_evaluations=num_evaluations,
        seed=seed,
        storage=storage,
        study_name=study_name,
        population_size=population_size,
        progress=progress,
        learn=learn,
        early_stopping=early_stopping,
        workers=workers,
    )
    return found


def search_each(
    space: WidthSpace,
    budgets: Sequence[Budget | Limits],
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
    early_stopping: bool = True,
    keep_front: bool = False,
    workers: int = 1,
) -> list[SearchResult]:
    """Find the best widths inside each of several budgets, in one search that shares all evaluations.

    The budgets take turns to propose a candidate; a candidate counts for every budget that it keeps. A budget with
    nothing left to evaluate gives its turns to the others.

    Args:
        space: The width space.
        budgets: At least one; nothing outside all of them is evaluated.
        score_fn: See `search`, as for all that is not explained here.
        prior: One for all budgets.
        predictor: One for all budgets.
        first: Settings to evaluate before all others, each inside at least one budget, such as the uniform ones.
        num_evaluations: How many evaluations to have in the end over all budgets together; more only where a budget
            would have none.
        seed: Seed of the proposals.
        storage: Where the study is kept.
        study_name: Name of the study in the storage.
        population_size: Parents are chosen among so many best candidates inside the budget whose turn it is.
        progress: Called after every candidate.
        learn: Whether the prior learns from the candidates.
        early_stopping: Score a candidate only until it is hopeless to be the best inside any of its budgets.
        keep_front: Stop a candidate only where it is hopeless beside what costs no more, so that no evaluation of the
            Pareto front is lost.
        workers: Score in so many processes.

    Returns:
        One result for each budget, in their order; an evaluation is in the result of every budget that it keeps.

    Raises:
        InputError: As `search`; or there is no budget.
        RuntimeError: As `search`, for any of the budgets.
    """
    from psenet.sampler import PriorEvolutionSampler

    limits = _resolved(space, budgets)
    numbers = {"num_evaluations": num_evaluations, "population_size": population_size, "seed": seed}
    _check_settings(space, prior, predictor, workers=workers, **numbers)
    _check_first(space, limits, first)
    sampler = PriorEvolutionSampler(
        space, limits[0], prior=prior, seed=seed, population_size=population_size, learn=learn, predictor=predictor
    )
    with _quiet_optuna(), open_scorer(score_fn, workers) as scorer:
        study = open_study(storage, study_name or "psenet", sampler, space)
        put_back_orphans(study)
        run = StudyRun(
            space,
            limits,
            study,
            sampler,
            first=first,
            num_evaluations=num_evaluations,
            least_rivals=population_size if early_stopping else None,
            keep_front=keep_front,
            progress=progress,
        )
        return run.until_done(scorer)


def _resolved(space: WidthSpace, budgets: Sequence[Budget | Limits]) -> list[Limits]:
    if not budgets:
        raise InputError("a search needs at least one budget; got none: give for example [Budget(macs='50%')]")
    return [resolve_limits(budget, space) for budget in budgets]


def _check_first(space: WidthSpace, budgets: Sequence[Limits], first: Sequence[Widths]) -> None:
    outside = [dict(widths) for widths in first if not any(limits.holds(space, widths) for limits in budgets)]
    if outside:
        which = "the budget" if len(budgets) == 1 else "at least one of the budgets"
        raise InputError(f"what the search shall try first must be inside {which}; outside are: {outside[:3]}")


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
    least = {"num_evaluations": 1, "population_size": 2, "seed": 0, "workers": 1}
    problems = [
        f"{name} must be at least {least[name]}; got {value}" for name, value in numbers.items() if value < least[name]
    ]
    if prior is not None and prior.space.digest() != space.digest():
        problems.append("the prior belongs to another width space: fit it with this one")
    if predictor is not None and predictor.space.digest() != space.digest():
        problems.append("the predictor belongs to another width space: fit it with this one")
    if problems:
        raise InputError("; ".join(problems))
