"""What a search returns, and what it tells while it runs."""

from collections.abc import Iterable
from dataclasses import dataclass

from psenet.widths import Widths


@dataclass(frozen=True)
class Evaluation:
    """One candidate and its score."""

    widths: Widths
    score: float
    """What the score function returned; higher is better."""
    macs: int
    params: int
    share: float = 1.0
    """Share of the validation samples that its score is from; below 1 the score is an estimate, because it was
    hopeless."""

    @property
    def is_estimate(self) -> bool:
        """Whether it was stopped early."""
        return self.share < 1


@dataclass(frozen=True)
class SearchResult:
    """What a search found inside one budget."""

    best: Evaluation
    """The evaluation with the highest score, estimates left out; the earliest of equals."""
    evaluated: tuple[Evaluation, ...]
    """Every evaluation with a finite score, in order, those of earlier runs on the same storage first."""
    num_failed: int
    """Candidates whose score was not finite."""
    exhausted: bool
    """Whether nothing inside the budget was left to evaluate."""
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
    """The best so far, of several budgets that of all together; estimates left out."""
    seconds_left: float | None = None
    """Guessed from the median time of this call's evaluations, shared by its workers; None before the first."""


def best_of(evaluated: Iterable[Evaluation]) -> Evaluation | None:
    """Return the evaluation with the highest score, the earliest of equals; None of none. Estimates are left out."""
    whole = (evaluation for evaluation in evaluated if not evaluation.is_estimate)
    return max(whole, key=lambda evaluation: evaluation.score, default=None)
