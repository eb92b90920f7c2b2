"""Time of one training step: the original model, the serial sandwich step, the parallel step. Interleaved.

    python benchmarks/step_time.py [--threads 2] [--rounds 12]

A step is forward and backward of one batch, without the optimizer. `parallel` is the mean over what the strategy draws
(strata and subnets), so every round times several parallel steps and takes their mean; the sandwich step is the full
network, the smallest and two random subnets, each on the whole batch. Ratios are per round, then median and quartiles.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import psenet
from evidence import write_result
from psenet.models import build_model

CASES = (
    ("psenet.models:resnet20", 32, 64),
    ("timm:resnet18", 64, 32),
    ("timm:mobilenetv2_100", 96, 16),
)
PARALLEL_STEPS_A_ROUND = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--subnets", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [measure(spec, size, batch, arguments.rounds, arguments.subnets) for spec, size, batch in CASES]
    path = write_result("step_time", {"subnets": arguments.subnets, "rounds": arguments.rounds, "cases": cases}, seed=0)
    print(f"figures: {path}")


def measure(spec: str, size: int, batch: int, rounds: int, num_subnets: int) -> dict[str, object]:
    """Time the three steps of one model, interleaved."""
    torch.manual_seed(0)
    model = build_model(spec, num_classes=10)
    x, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    space = psenet.trace(model, x[:1])
    supernet = psenet.Supernet(model, space).train()
    model.train()
    parallel = psenet.make_strategy("parallel", space, num_subnets=num_subnets, seed=0)
    sandwich = psenet.make_strategy("sandwich", space, seed=0)

    def plain_step() -> None:
        backward(model, model(x), labels)

    def parallel_step() -> None:
        backward(supernet, supernet(x, parallel.next_widths()), labels)

    def sandwich_step() -> None:
        for widths in sandwich.next_widths():
            backward(supernet, supernet(x, widths), labels)

    for _ in range(12):  # every stratum once or more: kernels are made at the first sight of a shape
        parallel_step()
    plain_step()
    sandwich_step()
    seconds = np.array(
        [
            [
                timed(plain_step),
                np.mean([timed(parallel_step) for _ in range(PARALLEL_STEPS_A_ROUND)]),
                timed(sandwich_step),
            ]
            for _ in range(rounds)
        ]
    )
    plain, par, sand = seconds.T
    figures = {
        "model": spec,
        "image_size": size,
        "batch_size": batch,
        "plain_ms": summary(1000 * plain),
        "parallel_ms": summary(1000 * par),
        "sandwich_ms": summary(1000 * sand),
        "parallel_over_plain": summary(par / plain),
        "parallel_over_sandwich": summary(par / sand),
    }
    print(
        f"{spec} {size}px batch {batch}: plain {figures['plain_ms']['median']} ms, parallel/plain "
        f"{figures['parallel_over_plain']}, parallel/sandwich {figures['parallel_over_sandwich']}"
    )
    return figures


def backward(module: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Run the backward pass of a plain cross entropy."""
    module.zero_grad()
    F.cross_entropy(logits, labels).backward()


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def summary(values: np.ndarray) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 3), "q1": round(float(low), 3), "q3": round(float(high), 3)}


if __name__ == "__main__":
    main()
