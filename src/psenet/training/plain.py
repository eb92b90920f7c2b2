"""`train_model`: one plain module, for the baseline and for fine-tuning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet.errors import InputError
from psenet.inputs import Inputs, as_arguments, num_samples
from psenet.memory_format import ImageLayout, guarded_convolutions
from psenet.training.config import TrainConfig
from psenet.training.curves import Recorder
from psenet.training.loop import Batch, Mean, fit
from psenet.training.losses import LossFn, cross_entropy, mixed_loss
from psenet.training.steps import teach


def train_model(
    model: nn.Module,
    train_loader: DataLoader,
    *,
    config: TrainConfig | None = None,
    teacher: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    checkpoint: Path | None = None,
    record: Recorder | None = None,
    description: str = "training",
    show_progress: bool = True,
    max_steps: int | None = None,
) -> None:
    """Train a plain module in place.

    Args:
        model: What to train.
        train_loader: Batches (x, labels).
        config: The settings; None for the defaults of `TrainConfig`.
        teacher: For distillation with `config.distill_weight`.
        loss_fn: (outputs, labels) to one loss per sample, shape (B,); None for cross entropy.
        checkpoint: File to write every `config.checkpoint_steps` steps and after every epoch; if it exists, training
            continues from it.
        record: Told of every finished epoch; see `psenet.training.curves`.
        description: Shown at the progress bar.
        show_progress: Whether to show one.
        max_steps: Stop after this many steps, for time estimates.

    Raises:
        InputError: A loss that is not per sample, distillation without a teacher, a batch of a single sample where a
            norm has one value per channel.
        TrainingDivergedError: The loss is not finite.
    """
    config = config or TrainConfig()
    loss_fn = loss_fn or cross_entropy(config.label_smoothing)
    if config.distill_weight > 0 and teacher is None:
        raise InputError("distill_weight is above 0, but there is no teacher")
    if config.distill_weight == 0:
        teacher = None

    layout = ImageLayout(model)

    def step(
        module: nn.Module, batch: Batch, number: int, backward: Callable[[torch.Tensor], None], mean: Mean
    ) -> torch.Tensor:
        x, labels = batch
        x = layout(x)
        outputs, taught = _forward(module, x, number), teach(teacher, x)
        loss = mixed_loss(loss_fn, config, outputs, labels, taught, num_samples=num_samples(x)).mean()
        backward(loss)
        return mean(loss.detach())

    with guarded_convolutions(model):
        fit(
            model,
            train_loader,
            step=step,
            config=config,
            checkpoint=checkpoint,
            record=record,
            description=description,
            show_progress=show_progress,
            max_steps=max_steps,
        )


def _forward(module: nn.Module, x: Inputs, number: int) -> Any:
    try:
        return module(*as_arguments(x))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"the batch of step {number} has a single sample, which has no variance where a norm has one value per "
            "channel: give batches of two samples or more (drop_last=True leaves out a short last one)"
        ) from error
