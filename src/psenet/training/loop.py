"""The training loop that everything shares: accelerate, timm's optimizers and schedules, checkpoints, progress.

Started as several processes (`accelerate launch`, torchrun), each trains on its part of every batch, and the gradients
are averaged once a step: a batch of the loader is that of the step, whatever the number of processes.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet import ranks
from psenet.errors import InputError
from psenet.progress import progress_bar
from psenet.training.checkpoint import Checkpoint, Position, Stateful
from psenet.training.config import TrainConfig
from psenet.training.curves import EpochRecord, Recorder
from psenet.training.feed import Batch, Feed, generators_of_samplers
from psenet.training.guard import Guard

if TYPE_CHECKING:
    from accelerate import Accelerator

Mean = Callable[[torch.Tensor], torch.Tensor]
Step = Callable[[nn.Module, Batch, int, Callable[[torch.Tensor], None], Mean], torch.Tensor]
"""`step(module, batch, step_number, backward, mean)`: run forward and `backward(loss)` as often as it likes, and return
the loss to show, detached, as `mean` over the processes that train together."""

_SPLITTING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
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
        loader: Batches; the last one of an epoch may be smaller. Of several processes each takes its part of every
            batch, and a smaller last one is filled up with samples of the first.
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
        InputError: An empty loader, a checkpoint of another training, mixed precision that the device lacks, a batch
            that the processes cannot share.
        TrainingDivergedError: The loss is not finite; the last good checkpoint stays.
    """
    if len(loader) == 0:
        raise InputError("the training loader has no batches; lower the batch size or give more images")
    accelerator = make_accelerator(config.mixed_precision)
    check_shares(loader)
    is_asynchronous = accelerator.device.type != "cpu"
    home = next(module.parameters()).device
    num_steps = max(1, config.epochs * len(loader))
    optimizer, scheduler = _optimizer_and_schedule(module, config, num_steps)
    own_generators = generators_of_samplers(loader)
    try:
        # "Evaluation" leaves torch's DistributedDataParallel out, which wants one backward pass a step that reaches all
        # parameters; here a step has as many as its strategy likes, and `average_gradients` comes after the last.
        prepared = accelerator.prepare_model(_Shell(module), evaluation_mode=True)
        optimizer, batches = accelerator.prepare(optimizer, loader)
        ranks.begin_alike(module)
        ranks.draw_differently()
        ranks.load_differently(batches)
        feed = Feed(loader, batches)
        guard = Guard(
            module,
            lambda batch, number: step(prepared, batch, number, lambda loss: None, lambda losses: losses),
            checkpoint=checkpoint,
            explain=explain,
            is_scaled=accelerator.scaler is not None,
        )
        keep = Checkpoint(checkpoint, accelerator, module, optimizer, feed, dict(extras or {}), config, num_steps)
        begin = keep.load()
        prepared.train()
        done = begin.epoch * len(loader) + begin.batch
        show = show_progress and accelerator.is_main_process
        with progress_bar(description, total=num_steps, done=done, show=show) as advance:
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
                    loss = step(prepared, batch, number, accelerator.backward, ranks.mean)
                    if not is_asynchronous:
                        guard.check_loss(loss, batch, number)
                    ranks.average_gradients(module)
                    optimizer.step()
                    guard.check_skipped(number, is_skipped=optimizer.step_was_skipped)
                    total = total + loss.detach()
                    is_kept = (number + 1) % config.checkpoint_steps == 0 and in_epoch < len(loader)
                    if number % _SHOW_EVERY == 0 or is_kept:
                        guard.check_loss(loss, batch, number)
                        advance(number + 1, f"loss {float(loss):.3f}")
                    if is_kept:
                        guard.check_weights(number)
                        ranks.average_statistics(module)
                        spent = time.perf_counter() - start
                        keep.save(Position(epoch=epoch, batch=in_epoch, loss=total.cpu(), seconds=spent))
                ranks.average_statistics(module)
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
        for sampler, generator in own_generators:  # accelerate lets processes share one where there was none
            sampler.generator = generator


def _optimizer_and_schedule(module: nn.Module, config: TrainConfig, num_steps: int) -> tuple[Any, Any]:
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
    from timm.scheduler.cosine_lr import CosineLRScheduler

    # For AdamW, timm's momentum is the first beta: left at its default.
    options = {"momentum": config.momentum, "nesterov": config.momentum > 0} if config.optimizer == "sgd" else {}
    optimizer = create_optimizer_v2(
        module, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay, **options
    )
    warmup = int(config.warmup_ratio * num_steps)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=num_steps, warmup_t=warmup, warmup_lr_init=config.learning_rate / 100, t_in_epochs=False
    )
    return optimizer, scheduler


def check_shares(loader: DataLoader) -> None:
    """Make sure that the processes can share every batch.

    Raises:
        InputError: They cannot.
    """
    size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    if ranks.num_ranks() > 1 and (not isinstance(size, int) or size % ranks.num_ranks()):
        raise InputError(
            f"the batch size must be a multiple of the number of processes, which share every batch; got {size} and "
            f"{ranks.num_ranks()} processes"
        )


class _Shell(nn.Module):
    """What accelerate prepares in place of the user's module, whose forward it would replace."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def make_accelerator(mixed_precision: Literal["no", "fp16", "bf16"] = "no") -> "Accelerator":
    """Return the accelerator that trains here; its `device` is where. Of several processes the first call joins them.

    Raises:
        InputError: The device does not have this precision, or accelerate is set up to split models.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps the first precision for the whole process; here every training has its own.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    try:
        # Where there is only a CPU accelerate wants to be told so, or its processes do not know of each other.
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        raise InputError(f"mixed_precision={mixed_precision!r} is not possible here: {error}") from error
    if mixed_precision == "fp16" and accelerator.scaler is None:  # accelerate would silently train in float32
        raise InputError(f"mixed_precision='fp16' is not possible on {accelerator.device.type}: take 'bf16' or 'no'")
    if accelerator.distributed_type.value in _SPLITTING:
        raise InputError(
            f"psenet trains whole models, each process on its part of the batch; accelerate is set up for "
            f"{accelerator.distributed_type.value}: launch with --multi_gpu, or by torchrun"
        )
    if ranks.num_ranks() not in (1, accelerator.num_processes):
        raise InputError(
            f"{ranks.num_ranks()} processes were started and accelerate knows of {accelerator.num_processes}: make no "
            "Accelerator before psenet does, or on machines without a GPU with cpu=True"
        )
    accelerator.dataloader_config.split_batches = accelerator.num_processes > 1
    return accelerator
