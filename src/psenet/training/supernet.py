"""`train_supernet`: many subnets at once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet.budget import Budget, Limits
from psenet.errors import InputError
from psenet.history import History
from psenet.space import WidthSpace
from psenet.supernet import Supernet
from psenet.training.config import TrainConfig
from psenet.training.curves import Recorder
from psenet.training.loop import Batch, Mean, fit
from psenet.training.losses import LossFn, cross_entropy
from psenet.training.steps import Objective, train_distilled
from psenet.training.strategies import LearningStrategy, Strategy, make_strategy

_MOST_SHOWN = 12
"""Widths named in an error."""


def train_supernet(
    supernet: Supernet,
    train_loader: DataLoader,
    *,
    num_subnets: int = 8,
    strategy: str | Strategy = "parallel",
    focus: Budget | Limits | None = None,
    config: TrainConfig | None = None,
    teacher: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    record: Recorder | None = None,
    show_progress: bool = True,
    max_steps: int | None = None,
) -> History:
    """Train a supernet in place.

    Args:
        supernet: What to train.
        train_loader: Batches (x, labels).
        num_subnets: Subnets per step of the parallel strategy; fewer in a batch with less than two samples for each.
        strategy: `"parallel"`, `"steered"`, `"sandwich"`, `"bilateral"`, `"single-path"`, or a `Strategy`.
        focus: Train mostly subnets that cost about as much as this allows; for the parallel strategy.
        config: The settings; None for the defaults of `TrainConfig`.
        teacher: For distillation with `config.distill_weight`; the sandwich strategy has its own (the full network).
        loss_fn: (outputs, labels) to one loss per sample, shape (B,); None for cross entropy.
        seed: Of the sequence of subnets.
        checkpoint: File to write every `config.checkpoint_steps` steps and after every epoch; if it exists, training
            continues from it.
        record: Told of every finished epoch; see `psenet.training.curves`.
        show_progress: Whether to show a progress bar.
        max_steps: Stop after this many steps, for time estimates.

    Returns:
        The loss of every subnet visited.

    Raises:
        InputError: A loss that is not per sample, distillation without a teacher, a focus that cannot be reached or
            that the strategy has not.
        TrainingDivergedError: The loss is not finite.
    """
    if focus is not None and not isinstance(strategy, str):
        raise InputError("a strategy object has its own focus: give one of them")
    config = config or TrainConfig()
    loss_fn = loss_fn or cross_entropy(config.label_smoothing)
    chosen = (
        make_strategy(strategy, supernet.space, num_subnets=num_subnets, seed=seed, focus=focus)
        if isinstance(strategy, str)
        else strategy
    )
    if config.distill_weight > 0 and teacher is None and chosen.train is not train_distilled:
        raise InputError("distill_weight is above 0, but there is no teacher")
    if config.distill_weight == 0:
        teacher = None
    history = History(supernet.space)
    objective = Objective(loss_fn, config, teacher)

    def step(
        module: nn.Module, batch: Batch, number: int, backward: Callable[[torch.Tensor], None], mean: Mean
    ) -> torch.Tensor:
        x, labels = batch
        if isinstance(chosen, LearningStrategy) and number and number % chosen.learns_every == 0:
            chosen.learn(history)
        widths = chosen.next_widths()
        losses = mean(chosen.train(module, x, labels, widths, objective, backward))
        history.append(number, widths[: len(losses)], losses)
        return losses.mean()

    fit(
        supernet,
        train_loader,
        step=step,
        config=config,
        extras={"strategy": chosen, "history": history},
        checkpoint=checkpoint,
        record=record,
        explain=lambda: _first_not_finite(history, supernet.space),
        description="supernet",
        show_progress=show_progress,
        max_steps=max_steps,
    )
    return history


def _first_not_finite(history: History, space: WidthSpace) -> str:
    """Return which subnet was the first whose loss was not finite, for an error; nothing if none was."""
    bad_N = np.flatnonzero(~np.isfinite(history.losses))
    if not len(bad_N):
        return ""
    visit = int(bad_N[0])
    widths = space.from_array(history.widths[visit : visit + 1])[0]
    share = space.macs(widths) / space.macs(space.full())
    shown = ", ".join(f"{name} {width}" for name, width in list(widths.items())[:_MOST_SHOWN])
    rest = f" and {len(widths) - _MOST_SHOWN} groups more" if len(widths) > _MOST_SHOWN else ""
    return (
        f", first {history.losses[visit]} at step {history.steps[visit]} in the subnet with "
        f"{share:.0%} of the MACs, widths {shown}{rest}"
    )
