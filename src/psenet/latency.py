"""Measure how long modules take, side by side."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import nn

from psenet.errors import InputError
from psenet.inputs import Inputs
from psenet.runners import EAGER, Pass, Runner

_SHORT_MS = 1.0
_LEAST_MEASUREMENT_MS = 2.0


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass: the median of all measurements and the quartiles around it."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    num_runs: int
    """How many measurements the median is of."""


def measure_latency(
    modules: Mapping[str, nn.Module],
    example_input: Inputs,
    *,
    runner: Runner = EAGER,
    num_runs: int = 30,
    warmup: int = 5,
) -> dict[str, Latency]:
    """Measure the forward pass of several modules, interleaved so that a slow moment of the machine hits them alike.

    Modules run in eval mode without gradients, and get their training flags back. See `time_passes` for how the time
    is taken.

    Args:
        modules: What to measure, by name; on `runner.place`.
        example_input: The input, shape (B, ...), or a tuple of inputs; its first sample is repeated to the runner's
            batch size.
        runner: The engine, device, threads and batch size.
        num_runs: Measurements of each module, at least 3.
        warmup: Passes of each module before measuring, at least 1.

    Returns:
        The latency of each module, by name.

    Raises:
        InputError: The device is unavailable, a module is elsewhere or cannot be run by the engine, there is nothing
            to measure, or a number is too small.
    """
    _check(modules, num_runs=num_runs, warmup=warmup)
    with ExitStack() as stack:
        passes = {}
        for name, module in modules.items():
            try:
                passes[name] = stack.enter_context(runner.prepare(module, example_input))
            except InputError as error:
                raise InputError(f"module {name!r} cannot be measured: {error}") from error
        return time_passes(passes, runner, num_runs=num_runs, warmup=warmup)


def time_passes(passes: Mapping[str, Pass], runner: Runner, *, num_runs: int, warmup: int) -> dict[str, Latency]:
    """Time passes that a runner has prepared, side by side.

    Every round measures each pass once, and the order rotates from round to round. A pass shorter than 1 ms is
    repeated inside each measurement until that lasts about 2 ms or more; the time of one pass is reported.

    Args:
        passes: What to time, by name.
        runner: What prepared them.
        num_runs: Measurements of each pass.
        warmup: Passes of each before measuring.

    Returns:
        The latency of each pass, by name.
    """
    _check(passes, num_runs=num_runs, warmup=warmup)
    # ONNX Runtime returns when its outputs are there, on a GPU as well; torch has to be waited for.
    time_ms = _time_on_cpu_ms if runner.place.type == "cpu" else partial(_time_on_cuda_ms, runner.place)
    names = list(passes)
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    repeats = {name: _num_repeats(min(time_ms(run, 1) for _ in range(warmup))) for name, run in passes.items()}
    for round_number in range(num_runs):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            times_ms[name].append(time_ms(passes[name], repeats[name]) / repeats[name])
    return {name: _summary(measured) for name, measured in times_ms.items()}


def _check(measured: Mapping[str, object], *, num_runs: int, warmup: int) -> None:
    if not measured:
        raise InputError("latency needs at least one module to measure; got none")
    least = [("num_runs", num_runs, 3), ("warmup", warmup, 1)]
    problems = [f"{name} must be at least {bound}; got {value}" for name, value, bound in least if value < bound]
    if problems:
        raise InputError("; ".join(problems))


def _num_repeats(shortest_ms: float) -> int:
    if shortest_ms >= _SHORT_MS:
        return 1
    # A clock too coarse to see one pass still ends: no pass takes less than a microsecond.
    return math.ceil(_LEAST_MEASUREMENT_MS / max(shortest_ms, 1e-3))


def _time_on_cpu_ms(run: Pass, num_passes: int) -> float:
    start = perf_counter()
    for _ in range(num_passes):
        run()
    return (perf_counter() - start) * 1e3


def _time_on_cuda_ms(place: torch.device, run: Pass, num_passes: int) -> float:
    with torch.cuda.device(place):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(num_passes):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def _summary(times_ms: list[float]) -> Latency:
    q1_ms, median_ms, q3_ms = np.percentile(times_ms, [25, 50, 75]).tolist()
    return Latency(median_ms=median_ms, q1_ms=q1_ms, q3_ms=q3_ms, num_runs=len(times_ms))
