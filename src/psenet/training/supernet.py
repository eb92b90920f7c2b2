"""`train_supernet`: many subnets at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet.errors import InputError
from psenet.evaluate import eval_mode
from psenet.history import History
from psenet.inputs import Inputs, as_arguments, num_samples, tensors_in
from psenet.supernet import Supernet
from psenet.training.config import TrainConfig
from psenet.training.loop import Batch, Step, fit
from psenet.training.losses import LossFn, cross_entropy, mixed_loss, soft_cross_entropy
from psenet.training.strategies import Strategy, make_strategy


def train_supernet(
    supernet: Supernet,
    train_loader: DataLoader,
    *,
    num_subnets: int = 8,
    strategy: str | Strategy = "parallel",
    config: TrainConfig | None = None,
    teacher: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    show_progress: bool = True,
    max_steps: int | None = None,
) -> History:
    """Train a supernet in place.

    Args:
        supernet: What to train.
        train_loader: Batches (x, labels).
        num_subnets: Subnets per step of the parallel strategy; fewer in a batch with less than two samples for each.
        strategy: `"parallel"`, `"sandwich"`, or a `Strategy`.
        config: The settings; None for the defaults of `TrainConfig`.
        teacher: For distillation with `config.distill_weight`; the sandwich strategy has its own (the full network).
        loss_fn: (outputs, labels) to one loss per sample, shape (B,); None for cross entropy.
        seed: Of the sequence of subnets.
        checkpoint: File to write after every epoch; if it exists, training continues from it.
        show_progress: Whether to show a progress bar.
        max_steps: Stop after this many steps, for time estimates.

    Returns:
        The loss of every subnet visited.

    Raises:
        InputError: A loss that is not per sample, distillation without a teacher.
        TrainingDivergedError: The loss is not finite.
    """
    config = config or TrainConfig()
    loss_fn = loss_fn or cross_entropy(config.label_smoothing)
    chosen = (
        make_strategy(strategy, supernet.space, num_subnets=num_subnets, seed=seed)
        if isinstance(strategy, str)
        else strategy
    )
    if config.distill_weight > 0 and teacher is None and not chosen.serial:
        raise InputError("distill_weight is above 0, but there is no teacher")
    if config.distill_weight == 0:
        teacher = None
    history = History(supernet.space)
    make_step = _serial_step if chosen.serial else _parallel_step
    fit(
        supernet,
        train_loader,
        step=make_step(chosen, history, config, loss_fn, teacher),
        config=config,
        extras={"strategy": chosen, "history": history},
        checkpoint=checkpoint,
        description="supernet",
        show_progress=show_progress,
        max_steps=max_steps,
    )
    return history


def _parallel_step(
    strategy: Strategy, history: History, config: TrainConfig, loss_fn: LossFn, teacher: nn.Module | None
) -> Step:
    def step(supernet: nn.Module, batch: Batch, number: int, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
        x, labels = batch
        # A last batch may be short, and the statistics of a batch norm want two samples a subnet.
        widths = strategy.next_widths()[: max(1, num_samples(x) // 2)]
        losses_B = mixed_loss(loss_fn, config, supernet(x, widths), labels, teach(teacher, x))
        backward(losses_B.mean())
        losses_B = losses_B.detach()
        history.append(
            number, widths, torch.stack([losses_B[first :: len(widths)].mean() for first in range(len(widths))])
        )
        return losses_B.mean()

    return step


def _serial_step(
    strategy: Strategy, history: History, config: TrainConfig, loss_fn: LossFn, teacher: nn.Module | None
) -> Step:
    def step(supernet: nn.Module, batch: Batch, number: int, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
        x, labels = batch
        widths = strategy.next_widths()
        first, *others = widths
        outputs = supernet(x, first)
        loss = mixed_loss(loss_fn, config, outputs, labels, teach(teacher, x)).mean()
        backward(loss)
        label_losses, soft_targets = [loss.detach()], outputs.detach()
        for setting in others:
            outputs = supernet(x, setting)
            backward(soft_cross_entropy(outputs, soft_targets, temperature=config.distill_temperature).mean())
            label_losses.append(loss_fn(outputs.detach(), labels).mean())
        history.append(number, widths, torch.stack(label_losses))
        return label_losses[0]

    return step


def teach(teacher: nn.Module | None, x: Inputs) -> Any:
    """Return the teacher's outputs on a batch, without gradients; None without a teacher."""
    if teacher is None:
        return None
    with torch.no_grad(), eval_mode(teacher.to(tensors_in(x)[0].device)):
        return teacher(*as_arguments(x))
