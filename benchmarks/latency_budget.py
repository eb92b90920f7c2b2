"""Does a net that is searched for half of the latency take half of it, and how well is latency predicted?

    python benchmarks/latency_budget.py            fifteen minutes on two cores
    python benchmarks/latency_budget.py --device cuda

For each model and engine: the cross-validated error of the latency model, the time to make it, and the net with most
MACs that is predicted to keep the budget, measured in turns with the full model. Most MACs stand in for the best score,
which would need a training; they make it harder, since the search looks for whatever the prediction takes for cheap.
Shares are of the full model's latency beside it. *Verified* is what `psenet prune` does: the best candidates are
measured, and the search goes on inside a tighter budget while none keeps it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import psenet
from evidence import write_result
from psenet.budget import Limits
from psenet.finalists import measure_beside_full, search_measured
from psenet.found import SearchResult
from psenet.models import build_model
from psenet.runners import Runner
from psenet.space import WidthSpace
from psenet.widths import Widths

CASES = (("timm:resnet18", 64), ("timm:mobilenetv2_100", 96), ("timm:resnet50", 128))
ENGINES = ("eager", "onnxruntime")
NUM_EVALUATIONS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="numbers of the models")
    parser.add_argument("--share", default="50%", help="the budget")
    arguments = parser.parse_args()
    name = "latency_budget" if arguments.device == "cpu" else "latency_budget_gpu"
    records = []
    for number in arguments.cases:
        for engine in arguments.engines:
            runner = Runner(engine=engine, device=arguments.device, num_threads=arguments.threads)
            spec, size = CASES[number]
            records.append(case(spec, size, runner, arguments.share))
            print(json.dumps(records[-1], indent=2), flush=True)
            # After every case, as an interruption would cost minutes of measuring.
            print(f"figures: {write_result(name, {'budget': arguments.share, 'cases': records}, seed=0)}")


def case(spec: str, size: int, runner: Runner, share: str) -> dict[str, Any]:
    """Make a latency model, search inside the budget and measure what was found."""
    torch.manual_seed(0)
    model = build_model(spec, num_classes=10).eval()
    example = torch.randn(1, 3, size, size)
    space = psenet.trace(model, example)
    start = time.perf_counter()
    latency = psenet.LatencyModel.measure(model, space, example, runner=runner)
    seconds = time.perf_counter() - start
    record: dict[str, Any] = {
        "model": spec,
        "image_size": size,
        "engine": runner.engine,
        "device": runner.device,
        "threads": runner.num_threads,
        "subnets": len(latency.latency_N),
        "seconds_to_measure": round(seconds, 1),
        "features": latency.features,
        "cv_median_error": round(latency.cv_error, 4),
        "cv_largest_error": round(latency.cv_max_error, 4),
    }
    space = space.with_latency(latency)
    try:
        limits = psenet.Budget(latency_ms=share).resolve(space)
    except psenet.InputError as error:
        return {**record, "unreachable": str(error)}
    return record | _searched(space, limits, model, example, runner)


def _searched(
    space: WidthSpace, limits: Limits, model: nn.Module, example: torch.Tensor, runner: Runner
) -> dict[str, Any]:
    supernet, full_ms = psenet.Supernet(model, space), space.latency_ms(space.full())

    def search_within(within: Limits) -> SearchResult:
        return psenet.search(
            space,
            within,
            lambda widths: float(space.macs(widths)),
            predictor=psenet.Predictor.untrained(space),
            num_evaluations=NUM_EVALUATIONS,
        )

    def measure_ms(widths: Sequence[Widths]) -> list[float]:
        return measure_beside_full(space, supernet, widths, example, runner=runner)

    first = search_within(limits).best.widths
    (first_ms,) = measure_ms([first])
    verified = search_measured(space, limits, search_within, measure_ms)
    (verified_ms,) = measure_ms([verified.best.widths])  # again: the finalists' own measurements chose it
    return {
        "full_ms": round(full_ms, 3),
        "budget_share": round(limits.latency_ms / full_ms, 4) if limits.latency_ms else None,
        "unverified_share": round(first_ms / full_ms, 4),
        "unverified_macs_share": round(space.macs(first) / space.macs(space.full()), 4),
        "verified_share": round(verified_ms / full_ms, 4),
        "verified_macs_share": round(space.macs(verified.best.widths) / space.macs(space.full()), 4),
        "rounds": verified.num_rounds,
        "keeps_budget": verified.keeps_budget,
    }


if __name__ == "__main__":
    main()
