"""How long a run will take: a few real steps, before any hour is spent."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from psenet.budget import Limits
from psenet.devices import to_device
from psenet.inputs import Inputs, as_arguments, num_samples
from psenet.supernet import Supernet
from psenet.training.config import TrainConfig
from psenet.training.losses import LossFn
from psenet.training.steps import Objective
from psenet.training.strategies import make_strategy

_WARMUP, _MEASURED = 1, 4


def estimate_seconds(
    model: nn.Module,
    supernet: Supernet,
    batch: tuple[Inputs, Any],
    *,
    loss_fn: LossFn,
    steps: Mapping[str, int],
    num_subnets: int,
    strategy: str,
    focus: Limits | None = None,
    num_calibration: int,
    num_validation: int,
    num_evaluations: int,
    keep_ratio: float,
    device: torch.device,
) -> dict[str, float]:
    """Return the expected seconds of each stage, from timing a few steps on copies.

    Args:
        model: The full model.
        supernet: Its supernet.
        batch: A training batch (x, labels).
        loss_fn: (outputs, labels) to one loss per sample.
        steps: Optimizer steps of `baseline`, `supernet` and `finetune` (the last counts both nets).
        num_subnets: Subnets per parallel step.
        strategy: The training strategy.
        focus: What it focuses on.
        num_calibration: Images used to recalibrate a candidate.
        num_validation: Images a candidate is scored on.
        num_evaluations: Candidates.
        keep_ratio: MACs of the nets to fine-tune as a share of the full model's.
        device: Where the run will train.
    """
    x, labels = to_device(batch, device)
    size = num_samples(x)
    plain = copy.deepcopy(model).to(device).train()
    plain_seconds = _median_seconds(lambda: _step(plain, plain(*as_arguments(x)), labels, loss_fn))
    elastic = copy.deepcopy(supernet).to(device).train()
    chosen = make_strategy(strategy, supernet.space, num_subnets=num_subnets, seed=0, focus=focus)
    objective = Objective(loss_fn, TrainConfig())

    def supernet_step() -> None:
        elastic.zero_grad()
        chosen.train(elastic, x, labels, chosen.next_widths(), objective, torch.Tensor.backward)

    supernet_seconds = _median_seconds(supernet_step)
    with torch.no_grad():
        forward_seconds = _median_seconds(lambda: plain(*as_arguments(x))) / size
    scoring = forward_seconds * (num_calibration + num_validation) * (0.3 + 0.7 * keep_ratio)
    return {
        "baseline": plain_seconds * steps["baseline"],
        "supernet": supernet_seconds * steps["supernet"],
        "search": scoring * num_evaluations,
        # Narrow layers run less efficiently than their MACs say.
        "finetune": plain_seconds * (0.3 + 0.7 * keep_ratio) * steps["finetune"],
    }


def say_duration(seconds: float) -> str:
    """Return a duration for a person: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _step(module: nn.Module, outputs: Any, labels: Any, loss_fn: LossFn) -> None:
    module.zero_grad()
    loss_fn(outputs, labels).mean().backward()


def _median_seconds(run: Callable[[], Any]) -> float:
    seconds: list[float] = []
    for _ in range(_WARMUP + _MEASURED):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():  # work is queued there, and this is the end of the queue
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[_WARMUP:]))
