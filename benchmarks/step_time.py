"""Time and memory of one training step: plain training of the original model, and each strategy. Interleaved.

    python benchmarks/step_time.py                        about 12 minutes on two cores
    python benchmarks/step_time.py --device cuda --compiled

A step is forward and backward of one batch, without the optimizer and without loading data. Every round times every
kind of step once, so that a busy machine slows all of them; ratios are taken within a round, then median and quartiles
over the rounds. `parallel` is the mean over the strata as training draws them; the time of each stratum stands beside.
`sandwich` is the full network, the smallest and two random subnets, `bilateral` a subnet and its complement on both
sides, `single-path` one random subnet, each on the whole batch. Memory is what one step adds at its peak to the memory
of the process (Linux; on a GPU: to the allocated memory), each in a process of its own.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import psenet
from evidence import write_result
from psenet.models import build_model
from psenet.space import WidthSpace
from psenet.training.config import TrainConfig
from psenet.training.losses import cross_entropy
from psenet.training.steps import Objective, train_together
from psenet.training.strategies import ParallelStrategy, Strategy, make_strategy
from psenet.widths import Widths

Model = tuple[str, int, int]
"""Name, pixels, samples a batch."""
CASES: tuple[Model, ...] = (
    ("timm:resnet18", 64, 64),
    ("timm:mobilenetv2_100", 96, 64),
    ("timm:resnet50", 224, 16),
    ("timm:mobilenetv2_100", 224, 16),
)
SERIAL = ("sandwich", "bilateral", "single-path")
LEAST_ROUNDS, MOST_ROUNDS = 3, 30
NUMBERS, BATCH_SIZES = (1, 2, 4, 8, 16, 32), (32, 64, 128, 256)
TASK = Objective(cross_entropy(), TrainConfig())
Step = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60, help="time for the rounds of one model")
    parser.add_argument("--subnets", type=int, default=8)
    parser.add_argument("--compiled", action="store_true", help="time compiled steps, too: minutes more for each model")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="numbers of the models")
    parser.add_argument("--memory-of", nargs=4, metavar=("MODEL", "PIXELS", "BATCH", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        spec, size, batch, kind = arguments.memory_of
        print(peak_of_step(Bench((spec, int(size), int(batch)), arguments.device, arguments.subnets), kind))
        return
    cases = []
    for number in arguments.cases:
        bench = Bench(CASES[number], arguments.device, arguments.subnets)
        cases.append(case(bench, arguments.seconds, compiled=arguments.compiled))
        print(json.dumps(cases[-1]["ratios"], indent=2), flush=True)
    first = CASES[0]
    growth = {
        "by_subnets": by_subnets(Bench(first, arguments.device, arguments.subnets), arguments.seconds / 4),
        "by_batch_size": by_batch_size(first, arguments.device, arguments.subnets, arguments.seconds / 10),
    }
    print(json.dumps(growth, indent=2))
    settings = {"device": arguments.device, "subnets": arguments.subnets, "seconds": arguments.seconds}
    name = "step_time" if arguments.device == "cpu" else "step_time_gpu"
    print(f"figures: {write_result(name, {**settings, 'cases': cases, **growth}, seed=0)}")


class Bench:
    """One model with its supernet, a batch, and the steps to time."""

    def __init__(self, model: Model, device: str, num_subnets: int) -> None:
        torch.manual_seed(0)
        spec, size, batch_size = model
        self.spec, self.size, self.batch_size, self.num_subnets = spec, size, batch_size, num_subnets
        self.device = torch.device(device)
        self.model = build_model(spec, num_classes=10).to(self.device).train()
        self.x = torch.randn(batch_size, 3, size, size, device=self.device)
        self.labels = torch.randint(0, 10, (batch_size,), device=self.device)
        self.space: WidthSpace = psenet.trace(self.model, self.x[:1])
        self.rng = np.random.default_rng(0)

    def plain(self, *, channels_last: bool, compiled: bool = False) -> Step:
        """Return a step of the original model."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = self.x.contiguous(memory_format=layout)
        run: Any = torch.compile(self.model, dynamic=False) if compiled else self.model

        def step() -> None:
            self.model.zero_grad()
            F.cross_entropy(run(x), self.labels).backward()

        return step

    def supernet(self, *, channels_last: bool | None = None, compiled: bool = False) -> psenet.Supernet:
        """Return a supernet in training mode."""
        return psenet.Supernet(self.model, self.space, channels_last=channels_last, compiled=compiled).train()

    def serial(self, name: str, supernet: psenet.Supernet) -> Step:
        """Return a step of a strategy that draws at random."""
        strategy: Strategy = make_strategy(name, self.space, num_subnets=self.num_subnets, seed=0)

        def step() -> None:
            supernet.zero_grad()
            strategy.train(supernet, self.x, self.labels, strategy.next_widths(), TASK, torch.Tensor.backward)

        return step

    def parallel(self, supernet: psenet.Supernet, ceiling: Widths, num_subnets: int | None = None) -> Step:
        """Return a parallel step at one ceiling, which one of its subnets reaches."""

        def step() -> None:
            others = range((num_subnets or self.num_subnets) - 1)
            widths = [ceiling, *(self.space.sample(self.rng, ceiling) for _ in others)]
            supernet.zero_grad()
            train_together(supernet, self.x, self.labels, widths, TASK, torch.Tensor.backward)

        return step

    def rounds(self, steps: dict[str, Step], seconds: float) -> dict[str, np.ndarray]:
        """Return the time of every step in every round, after one round that does not count.

        Rounds go on for so many seconds, but there are never fewer than three nor more than thirty.
        """
        found: dict[str, list[float]] = {name: [] for name in steps}
        began = time.perf_counter()
        for number in range(MOST_ROUNDS + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    found[name].append(time.perf_counter() - start)
            if number >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
                break
        return {name: np.array(values) for name, values in found.items()}


def case(bench: Bench, seconds: float, *, compiled: bool) -> dict[str, Any]:
    """Time all steps of one model."""
    strategy = ParallelStrategy(bench.space, bench.num_subnets, bench.rng)
    supernet, contiguous = bench.supernet(), bench.supernet(channels_last=False)
    steps = {
        "plain": bench.plain(channels_last=True),
        "plain, contiguous": bench.plain(channels_last=False),
        **{name: bench.serial(name, supernet) for name in SERIAL},
    }
    variants = {"": supernet, ", contiguous": contiguous}
    if compiled:
        steps["plain, compiled"] = bench.plain(channels_last=True, compiled=True)
        variants[", compiled"] = bench.supernet(compiled=True)
    for label, net in variants.items():
        for number, ceiling in enumerate(strategy.ceilings):
            steps[f"stratum {number}{label}"] = bench.parallel(net, ceiling)
    times = bench.rounds(steps, seconds)
    for label in variants:
        strata = [times[f"stratum {number}{label}"] for number in range(len(strategy.ceilings))]
        times[f"parallel{label}"] = np.average(strata, axis=0, weights=strategy.shares)
        times[f"mean over strata{label}"] = np.mean(strata, axis=0)
    best = min("plain", "plain, contiguous", key=lambda name: np.median(times[name]))
    ratios = {
        **{f"{name} / {best}": summary(values / times[best]) for name, values in times.items() if name != best},
        **{f"parallel / {name}": summary(times["parallel"] / times[name]) for name in SERIAL},
    }
    memory = {kind: _memory_in_own_process(bench, kind) for kind in ("plain", "parallel")}
    full = bench.space.macs(bench.space.full())
    return {
        "model": bench.spec,
        "image_size": bench.size,
        "batch_size": bench.batch_size,
        "rounds": len(times["plain"]),
        "milliseconds": {name: summary(1000 * values) for name, values in times.items()},
        "ratios": ratios,
        "strata": [
            {"macs_share": round(bench.space.macs(ceiling) / full, 3), "share_of_steps": share}
            for ceiling, share in zip(strategy.ceilings, strategy.shares, strict=True)
        ],
        "peak_memory_mb": memory,
        "peak_memory_ratio": round(memory["parallel"] / memory["plain"], 3),
    }


def by_subnets(bench: Bench, seconds: float) -> dict[str, Any]:
    """Time the full ceiling with more and more subnets, against one."""
    supernet, full = bench.supernet(), bench.space.full()
    numbers = [number for number in NUMBERS if 2 * number <= bench.batch_size]
    steps = {str(number): bench.parallel(supernet, full, number) for number in numbers}
    times = bench.rounds(steps, seconds)
    return {name: summary(values / times["1"]) for name, values in times.items()}


def by_batch_size(model: Model, device: str, num_subnets: int, seconds: float) -> dict[str, Any]:
    """Time the full ceiling against the plain step at several batch sizes."""
    found = {}
    for batch_size in BATCH_SIZES:
        bench = Bench((*model[:2], batch_size), device, num_subnets)
        steps = {
            "plain": bench.plain(channels_last=True),
            "full ceiling": bench.parallel(bench.supernet(), bench.space.full()),
        }
        times = bench.rounds(steps, seconds)
        found[str(batch_size)] = summary(times["full ceiling"] / times["plain"])
    return found


def peak_of_step(bench: Bench, kind: str) -> float:
    """Return by how many megabytes the second step of its kind raises the peak over what was held before it."""
    net = bench.supernet() if kind == "parallel" else bench.model
    is_supernet = isinstance(net, psenet.Supernet)
    step = bench.parallel(net, bench.space.full()) if is_supernet else bench.plain(channels_last=True)
    if bench.device.type == "cuda":
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    step()
    net.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)  # give back what the allocator keeps, or the step would seem to need less
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1e3


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _memory_in_own_process(bench: Bench, kind: str) -> float:
    case = [bench.spec, str(bench.size), str(bench.batch_size), kind]
    command = [sys.executable, __file__, "--device", bench.device.type, "--subnets", str(bench.num_subnets)]
    command += ["--threads", str(torch.get_num_threads()), "--memory-of", *case]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(float(run.stdout.split()[-1]), 1)


def summary(values: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(middle), 3), "q1": round(float(low), 3), "q3": round(float(high), 3)}


if __name__ == "__main__":
    main()
