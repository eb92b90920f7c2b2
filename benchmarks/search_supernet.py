"""How many evaluations, and how much time, search needs on a real supernet.

    python benchmarks/search_supernet.py digits                         a minute on one core
    python benchmarks/search_supernet.py cifar10 --data FOLDER          twenty minutes on one core

A net is trained, its supernet after it, as `psenet prune` would; then every method searches the same supernet for the
best net of one budget, with several seeds. *guided* is what `psenet prune` does: prior and predictor from training's
history, both learning from scores. *unguided* is the same evolution without either, *random* draws inside the budget.
A score is what `psenet prune` takes, the mean probability of the true class on validation images with the supernet's
weights; each widths' score is computed once and shared by all searches. Time beside scoring is processor-bound and
measured in the same process: proposals, prior, predictor and study.

Then guided search again on all validation images, nothing shared and timed: to the end of every score and *stopping
early*, seed by seed in turns. What was stopped is scored to the end afterwards: a stop was wrong if that is above the
best score at that time.

Trained weights stay in runs/search_supernet/CASE, so that a second call searches at once; prior.html there shows what
the prior learned (docs/prior.png).
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import psenet
from evidence import write_result
from psenet.budget import Limits, uniform_widths
from psenet.charts import prior_chart
from psenet.data import DataSplits, load_data, make_loader
from psenet.evaluate import SupernetScore, soft_accuracy
from psenet.evolution import SearchResult
from psenet.history import History
from psenet.importance import order_channels
from psenet.models import digits_resnet
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.scoring import Scored
from psenet.space import WidthSpace
from psenet.training import TrainConfig, train_model, train_supernet
from psenet.widths import Widths
from ranking import WIDTHS, Net

RUNS = Path("runs/search_supernet")
METHODS = ("guided", "unguided", "random")
SHOWN = (5, 10, 20, 30, 50, 75, 100)
"""Evaluations at which the best score so far is reported."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained and searched."""

    make: Any
    divisor: int
    images: int | None
    epochs: int
    validation: int | None


CASES = {
    "digits": Case(make=digits_resnet, divisor=4, images=None, epochs=30, validation=None),
    "cifar10": Case(make=lambda: Net(WIDTHS), divisor=4, images=10_000, epochs=10, validation=2_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", help="CIFAR-10 as an image folder")
    parser.add_argument("--macs", default="30%", help="the budget")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case != "digits" and arguments.data is None:
        parser.error(f"{arguments.case} needs --data FOLDER, with train/<class> and test/<class>")
    case = CASES[arguments.case]
    data = load_data(arguments.data or "digits", max_train_images=case.images)
    trained = train(case, data, RUNS / arguments.case)
    limits = psenet.Budget(macs=arguments.macs).resolve(trained.space)
    score = _CachedScore(trained, data, case.validation)
    searches: dict[str, list[Search]] = {}
    for method in METHODS:
        seeds = range(arguments.seeds)
        searches[method] = [trained.search(method, limits, score, arguments.evaluations, seed) for seed in seeds]
        print(json.dumps({method: summary(searches[method])}), flush=True)
    stopping = compare_stopping(trained, data, limits, arguments.evaluations, arguments.seeds)
    figures = {
        "budget": arguments.macs,
        "settings_of_the_space": trained.space.num_settings(),
        "evaluations": arguments.evaluations,
        "seeds": arguments.seeds,
        "uniform": round(score(uniform_widths(trained.space, limits)), 3),
        "seconds_to_score_one": round(score.median_seconds(), 3),
        "methods": {method: summary(found) for method, found in searches.items()},
        "guided_reaches_the_end_of": {
            rival: evaluations_to_reach(searches["guided"], searches[rival]) for rival in METHODS[1:]
        },
        "stopping_early": stopping,
    }
    print(json.dumps(figures, indent=2))
    chart = RUNS / arguments.case / "prior.html"
    prior_chart(Prior.fit(trained.history, trained.space), history=trained.history).write_html(chart)
    print(f"prior: {chart}")
    print(f"figures: {write_result(f'search_supernet_{arguments.case}', figures)}")


@dataclass(frozen=True)
class Trained:
    """A trained supernet and what its training saw."""

    supernet: psenet.Supernet
    history: History

    @property
    def space(self) -> WidthSpace:
        """The width space."""
        return self.supernet.space

    def scorer(self, data: DataSplits, num_validation: int | None = None) -> SupernetScore:
        """Return the score of this supernet's subnets, on the first or on all validation images."""
        validation = data.validation
        if num_validation is not None:
            validation = torch.utils.data.Subset(validation, range(num_validation))
        return SupernetScore(
            self.supernet,
            make_loader(data.calibration, batch_size=256, shuffle=False),
            make_loader(validation, batch_size=256, shuffle=False),
            score_fn=soft_accuracy,
        )

    def search(self, method: str, limits: Limits, score: "_CachedScore", number: int, seed: int) -> "Search":
        """Search once and note what was scored, in order, and the time beside scoring."""
        scored: list[float] = []

        def noted(widths: Widths) -> float:
            scored.append(score(widths))
            return scored[-1]

        start, before = time.perf_counter(), score.spent
        if method == "random":
            for widths in Prior.uniform(self.space).sample(limits, number, np.random.default_rng(seed)):
                noted(widths)
        else:
            self.evolve(method, limits, noted, number, seed)
        overhead = time.perf_counter() - start - (score.spent - before)
        return Search(np.maximum.accumulate(scored), overhead / len(scored))

    def evolve(
        self, method: str, limits: Limits, score: Any, number: int, seed: int, *, early_stopping: bool = False
    ) -> SearchResult:
        """Search by evolution, guided or not."""
        is_guided = method == "guided"
        return psenet.search(
            self.space,
            limits,
            score,
            prior=Prior.fit(self.history, self.space) if is_guided else None,
            predictor=Predictor.fit(self.history, self.space) if is_guided else None,
            learn=is_guided,
            num_evaluations=number,
            seed=seed,
            early_stopping=early_stopping,
        )


@dataclass(frozen=True)
class Search:
    """One search: the best score after each evaluation, and the time beside scoring."""

    best: np.ndarray
    overhead_seconds: float
    """For each candidate, beside scoring."""


def train(case: Case, data: DataSplits, folder: Path) -> Trained:
    """Train a net and its supernet, or read what an earlier call trained."""
    torch.manual_seed(0)
    model: nn.Module = case.make()
    example = torch.zeros(1, *data.input_shape)
    space = psenet.trace(model, example, divisor=case.divisor)
    weights, history_path = folder / "supernet.safetensors", folder / "history.npz"
    if weights.exists() and history_path.exists():
        model.load_state_dict(load_file(weights))
        return Trained(psenet.Supernet(model, space), History.load(history_path, space))
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(epochs=case.epochs, weight_decay=5e-4)
    loader = make_loader(data.train, batch_size=128, shuffle=True, seed=0)
    train_model(model, loader, config=config)
    supernet = psenet.Supernet(order_channels(model, space), space)
    history = train_supernet(supernet, loader, config=replace(config, learning_rate=0.05), seed=0)
    history.save(history_path)
    save_file({name: tensor.contiguous() for name, tensor in supernet.model.state_dict().items()}, weights)
    return Trained(supernet, history)


class _CachedScore:
    """Scores widths once, and remembers how long that took."""

    def __init__(self, trained: Trained, data: DataSplits, num_validation: int | None) -> None:
        self._score = trained.scorer(data, num_validation)
        self._scores: dict[Widths, float] = {}
        self._seconds: list[float] = []

    def __call__(self, widths: Widths) -> float:
        if widths not in self._scores:
            start = time.perf_counter()
            self._scores[widths] = self._score(widths)
            self._seconds.append(time.perf_counter() - start)
        return self._scores[widths]

    @property
    def spent(self) -> float:
        return sum(self._seconds)

    def median_seconds(self) -> float:
        return float(np.median(self._seconds))


class _TimedScore:
    """Scores as a search asks, and remembers how long that took and how many images were looked at."""

    def __init__(self, score: SupernetScore) -> None:
        self._score = score
        self.seconds = 0.0
        self.shares: list[float] = []

    def __call__(self, widths: Widths) -> float:
        return self._timed(lambda: Scored(self._score(widths))).score

    def against(self, widths: Widths, rival: Widths) -> Scored:
        return self._timed(lambda: self._score.against(widths, rival))

    def _timed(self, score: Callable[[], Scored]) -> Scored:
        start = time.perf_counter()
        found = score()
        self.seconds += time.perf_counter() - start
        self.shares.append(found.share)
        return found


def compare_stopping(trained: Trained, data: DataSplits, limits: Limits, number: int, num_seeds: int) -> dict[str, Any]:
    """Search to the end of every score and stopping early, seed by seed; return what the latter spares and loses."""
    rows: list[dict[str, Any]] = []
    judge = trained.scorer(data)
    for seed in range(num_seeds):
        found: dict[bool, tuple[SearchResult, _TimedScore]] = {}
        for stops in (seed % 2 == 0, seed % 2 == 1):
            score = _TimedScore(trained.scorer(data))
            found[stops] = trained.evolve("guided", limits, score, number, seed, early_stopping=stops), score
        (stopping, spared), (whole, all_of_it) = found[True], found[False]
        rows.append(
            {
                "best": round(whole.best.score, 3),
                "best_stopping_early": round(stopping.best.score, 3),
                "stopped": sum(one.is_estimate for one in stopping.evaluated),
                "wrongly": wrong_stops(stopping, judge),
                "share_of_images": round(float(np.mean(spared.shares)), 3),
                "seconds_scoring": round(all_of_it.seconds, 1),
                "seconds_scoring_stopping_early": round(spared.seconds, 1),
                "share_of_scoring_time": round(spared.seconds / all_of_it.seconds, 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {
        "images": {name: len(getattr(data, name)) for name in ("calibration", "validation")},
        "share_of_images": _median([row["share_of_images"] for row in rows]),
        "share_of_scoring_time": _median([row["share_of_scoring_time"] for row in rows]),
        "seeds": rows,
    }


def wrong_stops(found: SearchResult, score: SupernetScore) -> int:
    """Return how many candidates were stopped that are better, on all images, than the best that was known then."""
    best, wrong = -np.inf, 0
    for one in found.evaluated:
        if one.is_estimate:
            wrong += score(one.widths) > best
        else:
            best = max(best, one.score)
    return wrong


def summary(searches: Sequence[Search]) -> dict[str, Any]:
    """Return the best score after some evaluations, median and range over the seeds, and the time beside scoring."""
    most = min(len(search.best) for search in searches)
    best_SN = np.stack([search.best[:most] for search in searches])
    return {
        "best_after": {
            str(number): {
                "median": round(float(np.median(best_SN[:, number - 1])), 3),
                "least": round(float(best_SN[:, number - 1].min()), 3),
                "most": round(float(best_SN[:, number - 1].max()), 3),
            }
            for number in SHOWN
            if number <= most
        },
        "overhead_ms_a_candidate": round(1000 * float(np.median([search.overhead_seconds for search in searches])), 1),
    }


def evaluations_to_reach(searches: Sequence[Search], rivals: Sequence[Search]) -> dict[str, Any]:
    """Return when each search has what the rival of the same seed has at its end."""
    counts = [_first(search.best, rival.best[-1]) for search, rival in zip(searches, rivals, strict=True)]
    return {
        "evaluations": counts,
        "median_share_of_evaluations": _median(
            [np.inf if count is None else count / len(rival.best) for count, rival in zip(counts, rivals, strict=True)]
        ),
    }


def _first(best: np.ndarray, target: float) -> int | None:
    reached = np.flatnonzero(best >= target)
    return int(reached[0]) + 1 if len(reached) else None


def _median(values: Sequence[float]) -> float | None:
    middle = float(np.median(values))
    return round(middle, 3) if np.isfinite(middle) else None


if __name__ == "__main__":
    main()
