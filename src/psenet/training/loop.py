"""The training loop that everything shares: accelerate, timm's optimizers and schedules, checkpoints, progress."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet.errors import InputError
from psenet.progress import progress_bar
from psenet.training.checkpoint import Checkpoint, Position, Stateful
from psenet.training.config import TrainConfig
from psenet.training.curves import EpochRecord, Recorder
from psenet.training.feed import Batch, Feed
from psenet.training.guard import Guard

if TYPE_CHECKING:
    from accelerate import Accelerator

Step = Callable[[nn.Module, Batch, int, Callable[[torch.Tensor], None]], torch.Tensor]
"""`step(module, batch, step_number, backward)`: run forward and `backward(loss)` as often as it likes, and return the
loss to show, detached."""

_SHOW_EVERY = 20
"""Steps after which the loss is read and shown; every step would wait for an accelerator."""


def fit(
    module: nn.Module,
    loader: DataLoader,
    *,
    step: Step,
    config: TrainConfig,
    extras: Mapping[str, Stateful] | None = None,
    checkpoint: Path | None = None,
    record: Recorder | None = None,
    explain: Callable[[], str] | None = None,
    description: str = "training",
    show_progress: bool = True,
    max_steps: int | None = None,
) -> None:
    """Train a module in place, on the device that accelerate chooses.

    Args:
        module: What to train; however this ends, it is then where it came from.
        loader: Batches; the last one of an epoch may be smaller.
        step: One optimizer step's forward and backward passes.
        config: The settings.
        extras: More state to keep in checkpoints, by name.
        checkpoint: File to write after every epoch and every `config.checkpoint_steps` steps; the one before stays
            beside it. If it exists, training continues from it, to the same weights as without the break.
        record: Told of every epoch that this call finishes; see `psenet.training.curves`.
        explain: Says more about a loss that is not finite; see `psenet.training.guard`.
        description: Shown at the progress bar.
        show_progress: Whether to show one.
        max_steps: Stop after this many steps, for time estimates; the schedule is that of the whole training.

    Raises:
        InputError: An empty loader, a checkpoint of another training, mixed precision that the device lacks.
        TrainingDivergedError: The loss is not finite; the last good checkpoint stays.
    """
    if len(loader) == 0:
        raise InputError("the training loader has no batches; lower the batch size or give more images")
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
    from timm.scheduler.cosine_lr import CosineLRScheduler

    accelerator = make_accelerator(config.mixed_precision)
    is_asynchronous = accelerator.device.type != "cpu"
    home = next(module.parameters()).device
    # For AdamW, timm's momentum is the first beta: left at its default.
    options = {"momentum": config.momentum, "nesterov": config.momentum > 0} if config.optimizer == "sgd" else {}
    optimizer = create_optimizer_v2(
        module, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay, **options
    )
    num_steps = max(1, config.epochs * len(loader))
    warmup = int(config.warmup_ratio * num_steps)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=num_steps, warmup_t=warmup, warmup_lr_init=config.learning_rate / 100, t_in_epochs=False
    )
    try:
        prepared, optimizer, batches = accelerator.prepare(_Shell(module), optimizer, loader)
        feed = Feed(loader, batches)
        guard = Guard(
            module,
            lambda batch, number: step(prepared, batch, number, lambda loss: None),
            checkpoint=checkpoint,
            explain=explain,
            is_scaled=accelerator.scaler is not None,
        )
        keep = Checkpoint(checkpoint, accelerator, module, optimizer, feed, dict(extras or {}), config, num_steps)
        begin = keep.load()
        prepared.train()
        done = begin.epoch * len(loader) + begin.batch
        with progress_bar(description, total=num_steps, done=done, show=show_progress) as advance:
            for epoch in range(begin.epoch, config.epochs):
                start = time.perf_counter() - begin.seconds
                total = loss = begin.loss  # goes to the device and stays: no step waits for the one before
                number, batch = 0, None
                for in_epoch, batch in enumerate(feed.epoch(epoch, skip=begin.batch), begin.batch + 1):
                    number = epoch * len(loader) + in_epoch - 1
                    if number == max_steps:
                        return
                    scheduler.step_update(number)
                    optimizer.zero_grad()
                    loss = step(prepared, batch, number, accelerator.backward)
                    if not is_asynchronous:
                        guard.check_loss(loss, batch, number)
                    optimizer.step()
                    guard.check_skipped(number, is_skipped=optimizer.step_was_skipped)
                    total = total + loss.detach()
                    is_kept = (number + 1) % config.checkpoint_steps == 0 and in_epoch < len(loader)
                    if number % _SHOW_EVERY == 0 or is_kept:
                        guard.check_loss(loss, batch, number)
                        advance(number + 1, f"loss {float(loss):.3f}")
                    if is_kept:
                        guard.check_weights(number)
                        spent = time.perf_counter() - start
                        keep.save(Position(epoch=epoch, batch=in_epoch, loss=total.cpu(), seconds=spent))
                begin = Position(epoch=epoch + 1)
                guard.check_loss(loss, batch, number)
                guard.check_weights(number)
                advance(number + 1, f"loss {float(loss):.3f}")
                if record is not None and accelerator.is_main_process:
                    record(
                        EpochRecord(
                            epoch=epoch,
                            step=number + 1,
                            loss=float(total) / len(loader),
                            learning_rate=optimizer.param_groups[0]["lr"],
                            seconds=round(time.perf_counter() - start, 3),
                        )
                    )
                keep.save(begin)
    finally:
        module.to(home)


class _Shell(nn.Module):
    """What accelerate prepares in place of the user's module, whose forward it would replace."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def make_accelerator(mixed_precision: Literal["no", "fp16", "bf16"] = "no") -> "Accelerator":
    """Return the accelerator that trains here; its `device` is where.

    Raises:
        InputError: The device does not have this precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps the first precision for the whole process; here every training has its own.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, step_scheduler_with_optimizer=False)
    except ValueError as error:
        raise InputError(f"mixed_precision={mixed_precision!r} is not possible here: {error}") from error
    if mixed_precision == "fp16" and accelerator.scaler is None:  # accelerate would silently train in float32
        raise InputError(f"mixed_precision='fp16' is not possible on {accelerator.device.type}: take 'bf16' or 'no'")
    return accelerator
