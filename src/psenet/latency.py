"""Measure how long modules take, side by side."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import nn

from psenet.errors import InputError
from psenet.evaluate import eval_mode
from psenet.inputs import as_arguments

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
    example_input: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    num_runs: int = 30,
    warmup: int = 5,
    num_threads: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Latency]:
    """Measure the forward pass of several modules, interleaved so that a slow moment of the machine hits them alike.

    Every round measures each module once, and the order rotates from round to round. A pass shorter than 1 ms is
    repeated inside each measurement until that lasts about 2 ms or more; the time of one pass is reported. Modules run
    in eval mode without gradients, and get their training flags back.

    Args:
        modules: What to measure, by name; on `device`.
        example_input: The input, batch included, or a tuple of inputs; copied to `device`.
        num_runs: Measurements of each module, at least 3.
        warmup: Passes of each module before measuring, at least 1.
        num_threads: CPU threads of one pass; by default what torch is set to. Put back afterwards.
        device: `"cpu"` or a CUDA device.

    Returns:
        The latency of each module, by name.

    Raises:
        InputError: The device is unavailable, a module is elsewhere, there is nothing to measure, or a number is too
            small.
    """
    place = _available(device)
    _check(modules, place, num_runs=num_runs, warmup=warmup, num_threads=num_threads)
    inputs = tuple(value.to(place) for value in as_arguments(example_input))
    time_ms = _time_on_cpu_ms if place.type == "cpu" else _time_on_cuda_ms
    names = list(modules)
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        stack.enter_context(_threads(num_threads))
        stack.enter_context(torch.inference_mode())
        for module in modules.values():
            stack.enter_context(eval_mode(module))
        repeats = {
            name: _num_repeats(min(time_ms(module, inputs, 1) for _ in range(warmup)))
            for name, module in modules.items()
        }
        for round_number in range(num_runs):
            shift = round_number % len(names)
            for name in names[shift:] + names[:shift]:
                times_ms[name].append(time_ms(modules[name], inputs, repeats[name]) / repeats[name])
    return {name: _summary(measured) for name, measured in times_ms.items()}


def _available(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be 'cpu' or a CUDA device; got {device!r}: {error}") from None
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device must be 'cpu' or a CUDA device; got {device!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {str(place)!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices; use 'cpu'"
        )
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def _check(
    modules: Mapping[str, nn.Module], place: torch.device, *, num_runs: int, warmup: int, num_threads: int | None
) -> None:
    if not modules:
        raise InputError("latency needs at least one module to measure; got none")
    least = [("num_runs", num_runs, 3), ("warmup", warmup, 1)]
    least += [] if num_threads is None else [("num_threads", num_threads, 1)]
    problems = [f"{name} must be at least {bound}; got {value}" for name, value, bound in least if value < bound]
    for name, module in modules.items():
        tensors = [*module.parameters(), *module.buffers()]
        elsewhere = sorted({str(tensor.device) for tensor in tensors if tensor.device != place})
        if elsewhere:
            problems.append(f"module {name!r} must be on {place}; it is on {', '.join(elsewhere)}: move it first")
    if problems:
        raise InputError("; ".join(problems))


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _num_repeats(shortest_ms: float) -> int:
    if shortest_ms >= _SHORT_MS:
        return 1
    # A clock too coarse to see one pass still ends: no pass takes less than a microsecond.
    return math.ceil(_LEAST_MEASUREMENT_MS / max(shortest_ms, 1e-3))


def _time_on_cpu_ms(module: Callable[..., object], inputs: tuple[torch.Tensor, ...], num_passes: int) -> float:
    start = perf_counter()
    for _ in range(num_passes):
        module(*inputs)
    return (perf_counter() - start) * 1e3


def _time_on_cuda_ms(module: Callable[..., object], inputs: tuple[torch.Tensor, ...], num_passes: int) -> float:
    with torch.cuda.device(inputs[0].device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(num_passes):
            module(*inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def _summary(times_ms: list[float]) -> Latency:
    q1_ms, median_ms, q3_ms = np.percentile(times_ms, [25, 50, 75]).tolist()
    return Latency(median_ms=median_ms, q1_ms=q1_ms, q3_ms=q3_ms, num_runs=len(times_ms))
