"""The search stage: the best candidate inside the budget, measured where the budget is on latency."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psenet import ranks
from psenet.budget import Limits, uniform_widths
from psenet.charts import prior_record
from psenet.devices import on_device
from psenet.errors import InputError
from psenet.estimate import say_duration
from psenet.evaluate import SupernetScore
from psenet.evolution import search
from psenet.finalists import Measured, measure_beside_full, search_measured
from psenet.found import Evaluation, SearchProgress, SearchResult
from psenet.front import search_front
from psenet.history import History
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.progress import progress_bar
from psenet.rundir import read_json, write_json
from psenet.space import WidthSpace
from psenet.stages.run import Run
from psenet.supernet import Supernet
from psenet.widths import Widths

_LONG_SECONDS = 30.0
_FRONT_BUDGETS = 6


SEARCHED = "stages/search.json"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the search found."""

    widths: Widths
    """The best candidate."""
    limits: Limits
    """What it was found within: the budget, or tighter limits where predicted latency promised too much."""
    record: Mapping[str, Any]
    """What `result.json` says of the search."""


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    found: SearchResult
    best: Evaluation
    limits: Limits
    measured: Measured | None = None
    """With a budget on latency."""

    def record(self, num_visits: int) -> dict[str, Any]:
        record: dict[str, Any] = {
            "num_evaluations": len(self.found.evaluated),
            "best_score": self.best.score,
            "history": num_visits,
        }
        if self.measured is not None:
            record["latency"] = {
                "searched_within_ms": self.limits.latency_ms,
                "predicted_ms": round(self.measured.predicted_ms, 4),
                "measured_ms": round(self.measured.measured_ms, 4),
                "keeps_budget": self.measured.keeps_budget,
                "rounds": self.measured.num_rounds,
            }
        return record


def search_best(run: Run, *, supernet: Supernet, history: History) -> Search:
    """Return the best candidate; a study that is there already goes on, and a finished search is read again.

    Of several processes that train together the main one searches, with its workers.
    """

    def find() -> Search:
        path = run.folder.file(SEARCHED)
        if not path.exists():
            chosen = _search(run, supernet, history)
            content = {"widths": dict(chosen.best.widths), "limits": vars(chosen.limits)}
            write_json(path, {**content, "record": chosen.record(len(history))})
        return read_search(run)

    return ranks.from_main(find)


def read_search(run: Run) -> Search:
    """Return what a finished search found.

    Raises:
        InputError: Its file is missing or damaged.
    """
    path = run.folder.file(SEARCHED)
    content = read_json(path, remedy="delete it and resume to search again")
    try:
        widths, limits = Widths(content["widths"]), Limits(**content["limits"])
        run.space.check(widths)
        return Search(widths=widths, limits=limits, record=dict(content["record"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged; delete it and resume to search again: {error}") from error


def _search(run: Run, supernet: Supernet, history: History) -> _Chosen:
    run.say(f"searching, {run.config.num_evaluations} candidates")
    run.seed(3)
    with run.folder.stage("search"), on_device(supernet, run.device):
        score = SupernetScore(supernet, run.loaders.calibration, run.loaders.validation, score_fn=run.task.search_score)
        searcher = _Searcher(run, score, Prior.fit(history, run.space), Predictor.fit(history, run.space))
        if run.limits.latency_ms is None:
            found = searcher(run.limits)
            chosen = _Chosen(found=found, best=found.best, limits=run.limits)
        else:
            chosen = _search_measured(run, searcher, supernet)
        others = searcher.over_all_costs(first=chosen.best.widths)
    best, found = chosen.best, chosen.found
    evaluated: dict[Widths, Evaluation] = {}
    for one in (*others, *found.evaluated):
        if one.widths not in evaluated or not one.is_estimate:
            evaluated[one.widths] = one
    write_json(
        run.folder.file("stages/evaluated.json"), {"candidates": _candidates(run.space, list(evaluated.values()))}
    )
    write_json(run.folder.file("stages/prior.json"), prior_record(searcher.prior, history=history))
    run.say(
        f"winner: score {best.score:.2f} at {best.macs / 1e6:.1f}M MACs, best of {len(found.evaluated)}; "
        f"the score is the {run.task.search_score_name} on validation data"
    )
    num_stopped = sum(one.is_estimate for one in found.evaluated)
    if num_stopped:
        seen = sum(one.share for one in found.evaluated) / len(found.evaluated)
        run.say(f"{num_stopped} candidates were stopped early as hopeless, so {seen:.0%} of all scoring was done")
    if found.predicted_rank_correlation is not None:
        run.say(
            f"candidates were chosen by predicted score; predictions before scoring rank like the scores with rho "
            f"{found.predicted_rank_correlation:.2f}"
        )
    return chosen


def _candidates(space: WidthSpace, evaluated: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Return every scored candidate with its costs, in the order in which they were scored."""
    widths = [one.widths for one in evaluated]
    costs: dict[str, list[Any]] = {"memory": space.memory(widths).tolist()}
    if space.costs.latency_ms is not None:
        costs["latency_ms"] = space.latency_ms(widths).round(4).tolist()
    return [
        {
            "widths": dict(one.widths),
            "score": one.score,
            "macs": one.macs,
            "params": one.params,
            "share": round(one.share, 4),
            **{name: values[number] for name, values in costs.items()},
        }
        for number, one in enumerate(evaluated)
    ]


@dataclass(frozen=True)
class _Searcher:
    """Searches the run's study inside limits."""

    run: Run
    score: SupernetScore
    prior: Prior
    predictor: Predictor

    def __call__(self, limits: Limits) -> SearchResult:
        run, total = self.run, self.run.config.num_evaluations
        with progress_bar("search", total=total, show=run.show_progress) as advance:

            def progress(state: SearchProgress) -> None:
                run.logs.candidate(state)
                advance(state.num_done, f"best {state.best.score:.2f}" if state.best else "")
                if not run.show_progress:
                    _say_at_quarters(run, state)

            return search(
                run.space,
                limits,
                self.score,
                prior=self.prior,
                predictor=self.predictor,
                first=[uniform_widths(run.space, limits)],
                num_evaluations=total,
                seed=run.config.seed,
                storage=run.folder.file("stages/study.journal"),
                progress=progress,
                early_stopping=run.config.early_stopping,
                workers=run.workers,
            )

    def over_all_costs(self, *, first: Widths) -> tuple[Evaluation, ...]:
        """Score candidates from the smallest to the full net: what other budgets would give."""
        run, total = self.run, self.run.config.num_front_evaluations
        if total == 0:
            return ()
        space = run.space
        run.say(f"scoring {total} candidates over all costs, for the Pareto front")
        with progress_bar("front", total=total, show=run.show_progress) as advance:
            found = search_front(
                space,
                Limits(macs=space.macs(space.smallest())),
                Limits(macs=space.macs(space.full())),
                self.score,
                num_budgets=_FRONT_BUDGETS,
                prior=self.prior,
                predictor=self.predictor,
                first=[space.full(), first],
                num_evaluations=total,
                seed=run.config.seed,
                storage=run.folder.file("stages/front.journal"),
                progress=lambda state: advance(state.num_done, ""),
                early_stopping=run.config.early_stopping,
                workers=run.workers,
            )
        return found.evaluated


def _say_at_quarters(run: Run, state: SearchProgress) -> None:
    """Tell a log how far a long search is."""
    quarter = max(1, state.num_evaluations // 4)
    is_long = (state.seconds_left or 0) > _LONG_SECONDS
    if is_long and state.best is not None and state.num_done % quarter == 0:
        run.say(
            f"{state.num_done} of {state.num_evaluations} candidates, best score {state.best.score:.2f}, "
            f"about {say_duration(state.seconds_left or 0)} left"
        )


def _search_measured(run: Run, searcher: _Searcher, supernet: Supernet) -> _Chosen:
    """Search with a budget on latency: the winner keeps it when measured, or the run says by how much it fails."""

    def measure_ms(widths: Sequence[Widths]) -> list[float]:
        run.say(f"measuring the {len(widths)} best")
        return measure_beside_full(run.space, supernet, widths, run.example, runner=run.config.latency)

    measured = search_measured(run.space, run.limits, searcher, measure_ms)
    goal_ms = run.limits.latency_ms
    assert goal_ms is not None
    excess = measured.measured_ms / goal_ms - 1
    verdict = "inside" if excess <= 0 else f"{excess:.1%} above"
    allowed = ", within the error of measuring" if measured.keeps_budget and excess > 0 else ""
    run.say(
        f"latency of the winner: measured {measured.measured_ms:.3g} ms, {verdict} the budget of {goal_ms:.3g} ms"
        f"{allowed}; predicted {measured.predicted_ms:.3g} ms"
    )
    return _Chosen(found=measured.found, best=measured.best, limits=measured.limits, measured=measured)
