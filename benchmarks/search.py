"""How few evaluations search needs, and how often the prior's samples meet a budget.

    python benchmarks/search.py tabular --channel-bench FILE     six minutes on one core
    python benchmarks/search.py acceptance                       half a minute on one core

*tabular*: the 16,384 nets of Channel-Bench-Macro (Su et al. 2022; json.gz), each trained alone three times. A score is
the accuracy of one run, drawn once for each net and seed; a search is done when it has scored a net whose mean accuracy
is within 0.2 points of the best inside the budget. History, for prior and predictor: one noisy loss each of 4,000 nets
drawn at random, whose noise is ten times the spread of what the widths do to it, as it is in training, where a loss is
that of a few samples. Optuna's own samplers know the budget as a constraint; what they propose outside it is told to
them and costs them nothing here.

*acceptance*: of settings drawn from the prior that knows nothing but a budget, and of settings drawn uniformly, the
share that keeps the budget, and that which also uses 90 % of it; and settings inside the budget a second.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

import psenet
from evidence import write_result
from psenet.budget import Limits
from psenet.evolution import SearchResult
from psenet.history import History
from psenet.models import build_model
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.sampler import width_distributions
from psenet.space import WidthSpace
from ranking import make_space, read_bench

NEAR = 0.2
"""Points below the best at which a search is done."""
NUM_VISITS, NOISE = 4_000, 10.0
MOST_EVALUATIONS = 200
SHARES, ACCEPTED_SHARES = (0.2, 0.3, 0.5, 0.7), (0.15, 0.25, 0.4, 0.6)
MODELS = ("timm:mobilenetv2_100", "timm:resnet50", "torchvision:vgg16")
METHODS = ("prior and predictor", "prior", "predictor without history", "no prior", "NSGA-II", "TPE", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tabular", "acceptance"))
    parser.add_argument("--channel-bench", type=Path, help="the published ground truth (json.gz)")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if arguments.part == "acceptance":
        figures: dict[str, Any] = {"models": [acceptance(name) for name in MODELS]}
    elif arguments.channel_bench is None:
        parser.exit(message="skipped: the tabular part needs --channel-bench, the published accuracies\n")
    else:
        figures = {"near": NEAR, "visits": NUM_VISITS, "noise": NOISE, "seeds": arguments.seeds}
        figures["budgets"] = tabular(Table(arguments.channel_bench), arguments.seeds, arguments.methods)
    print(f"figures: {write_result(f'search_{arguments.part}', figures)}")


# Search on known accuracies -------------------------------------------------------------------------------------------


class Table:
    """The nets of the file: their widths, costs and accuracies."""

    def __init__(self, path: Path) -> None:
        bench = read_bench(path)
        self.space: WidthSpace = make_space(bench["widths"])
        sizes = np.array([group.size for group in self.space.groups])
        digits_NG = np.array([[int(digit) for digit in arch] for arch in bench["archs"]])
        self.widths_NG = digits_NG * sizes // 4
        self.runs_NR = np.array([record["acc"] for record in bench["archs"].values()])
        self.accuracy_N = self.runs_NR.mean(axis=1)
        self.macs_N = self.space.macs(self.widths_NG)
        self.row_of = {widths.tobytes(): row for row, widths in enumerate(self.widths_NG)}

    def history(self, rng: np.random.Generator) -> History:
        """Return noisy losses of some nets, as training would have seen them."""
        rows_V = rng.choice(len(self.widths_NG), NUM_VISITS)
        loss_V = 0.05 * (100 - self.accuracy_N[rows_V])
        loss_V = loss_V + NOISE * loss_V.std() * rng.normal(size=NUM_VISITS)
        history = History(self.space)
        for step, first in enumerate(range(0, NUM_VISITS, 8)):
            part = slice(first, first + 8)
            trend = 2 * np.exp(-6 * first / NUM_VISITS)
            visited = self.space.from_array(self.widths_NG[rows_V[part]])
            history.append(step, visited, torch.from_numpy(loss_V[part] + trend))
        return history


def tabular(table: Table, num_seeds: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return the evaluations that each method needs, for each budget."""
    found = []
    for share in SHARES:
        limit = int(share * table.macs_N.max())
        limits = Limits(macs=limit)
        inside_N = table.macs_N <= limit
        best = table.accuracy_N[inside_N].max()
        record: dict[str, Any] = {"macs_share": share, "nets": int(inside_N.sum()), "best": round(float(best), 2)}
        for method in methods:
            start = time.process_time()
            counts = [_count(table, limits, best, method, seed) for seed in range(num_seeds)]
            low, middle, high = np.percentile(counts, [25, 50, 75])
            record[method] = {
                "median": float(middle),
                "q1": float(low),
                "q3": float(high),
                "milliseconds_a_search": round(1000 * (time.process_time() - start) / num_seeds, 1),
            }
        if "prior and predictor" in methods:
            record["rank_correlation_of_predictions"] = _rank_correlation(table, limits)
        print(json.dumps(record, indent=2), flush=True)
        found.append(record)
    return found


def _count(table: Table, limits: Limits, best: float, method: str, seed: int) -> int:
    """Return how many evaluations one search needs, at most so many."""
    rng = np.random.default_rng([seed, 7])
    run_N = rng.integers(table.runs_NR.shape[1], size=len(table.runs_NR))
    num_scored = 0

    def score(widths: psenet.Widths) -> float:
        nonlocal num_scored
        row = table.row_of[table.space.to_array([widths])[0].tobytes()]
        num_scored += 1
        if table.accuracy_N[row] >= best - NEAR:
            raise _Done
        return float(table.runs_NR[row, run_N[row]])

    search = _random if method == "random" else _optuna if method in ("NSGA-II", "TPE") else _ours
    try:
        search(table, limits, score, method, seed)
    except _Done:
        return num_scored
    return MOST_EVALUATIONS


class _Done(Exception):  # noqa: N818 - says what happened
    """A net near the best was scored."""


def _random(table: Table, limits: Limits, score: Callable[[psenet.Widths], float], _: str, seed: int) -> None:
    rows = np.flatnonzero(table.macs_N <= limits.macs)
    chosen = np.random.default_rng(seed).permutation(rows)[:MOST_EVALUATIONS]
    for widths in table.space.from_array(table.widths_NG[chosen]):
        score(widths)


def _rank_correlation(table: Table, limits: Limits, num_seeds: int = 5) -> float:
    """Return how well predictions rank candidates before they are scored, median of some whole searches."""
    found = []
    for seed in range(num_seeds):
        run = np.random.default_rng([seed, 7]).integers(table.runs_NR.shape[1])

        def score(widths: psenet.Widths, run: int = run) -> float:
            return float(table.runs_NR[table.row_of[table.space.to_array([widths])[0].tobytes()], run])

        result = _ours(table, limits, score, "prior and predictor", seed, num_evaluations=100)
        found.append(result.predicted_rank_correlation)
    return round(float(np.median(found)), 2)


def _ours(
    table: Table,
    limits: Limits,
    score: Callable[[psenet.Widths], float],
    method: str,
    seed: int,
    num_evaluations: int = MOST_EVALUATIONS,
) -> SearchResult:
    history = table.history(np.random.default_rng([seed, 3]))
    predictor = {
        "prior and predictor": lambda: Predictor.fit(history, table.space),
        "predictor without history": lambda: Predictor.untrained(table.space),
    }.get(method, lambda: None)()
    prior = Prior.fit(history, table.space) if method in ("prior", "prior and predictor") else None
    return psenet.search(
        table.space,
        limits,
        score,
        prior=prior,
        predictor=predictor,
        learn=method != "no prior",
        num_evaluations=num_evaluations,
        seed=seed,
    )


def _optuna(table: Table, limits: Limits, score: Callable[[psenet.Widths], float], method: str, seed: int) -> None:
    assert limits.macs is not None

    def over(trial: optuna.trial.FrozenTrial) -> Sequence[float]:
        return trial.user_attrs["over"]

    sampler = (
        optuna.samplers.NSGAIISampler(population_size=16, constraints_func=over, seed=seed)
        if method == "NSGA-II"
        else optuna.samplers.TPESampler(constraints_func=over, multivariate=True, seed=seed)
    )
    study = optuna.create_study(sampler=sampler, direction="maximize")
    distributions, scored = width_distributions(table.space), {}
    for _ in range(20 * MOST_EVALUATIONS):
        trial = study.ask(distributions)
        widths = psenet.Widths({group.name: trial.params[group.name] for group in table.space.groups})
        over_by = float(table.space.macs(widths) / limits.macs - 1)
        trial.set_user_attr("over", [over_by])
        if over_by <= 0 and widths not in scored:
            scored[widths] = score(widths)
        study.tell(trial, scored.get(widths, 0.0))
        if len(scored) >= MOST_EVALUATIONS:
            return


# Samples inside a budget ----------------------------------------------------------------------------------------------


def acceptance(name: str, num: int = 20_000) -> dict[str, Any]:
    """Return how many settings keep a budget, drawn from the prior and uniformly."""
    space = psenet.trace(build_model(name, num_classes=10).eval(), torch.zeros(1, 3, 64, 64))
    rng = np.random.default_rng(0)
    prior, full = Prior.uniform(space), space.macs(space.full())
    uniform_NG = np.stack([rng.choice(group.choices, num) for group in space.groups], axis=1)
    uniform_shares = space.macs(uniform_NG) / full
    record: dict[str, Any] = {"model": name, "groups": len(space.groups), "budgets": []}
    for share in ACCEPTED_SHARES:
        budget = psenet.Budget(macs=f"{100 * share:g}%")
        try:
            proposal = prior.proposal(budget.resolve(space))
        except psenet.InputError as error:
            record["budgets"].append({"macs_share": share, "unreachable": str(error)})
            continue
        drawn = space.macs(proposal.levels.widths(proposal.draw(num, rng))) / full
        start = time.process_time()
        kept = prior.sample(budget, num, rng)
        seconds = time.process_time() - start
        record["budgets"].append(
            {
                "macs_share": share,
                "prior": round(float((drawn <= share).mean()), 4),
                "prior_near": round(float(((drawn <= share) & (drawn >= 0.9 * share)).mean()), 4),
                "uniform": round(float((uniform_shares <= share).mean()), 5),
                "uniform_near": round(float(((uniform_shares <= share) & (uniform_shares >= 0.9 * share)).mean()), 5),
                "valid_samples_a_second": round(len(kept) / seconds),
            }
        )
    print(json.dumps(record, indent=2), flush=True)
    return record


if __name__ == "__main__":
    main()
