"""The training loop that everything shares: accelerate, timm's optimizers and schedules, checkpoints, progress."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet.errors import InputError, first_line
from psenet.files import write_atomically
from psenet.progress import progress_bar
from psenet.training.config import TrainConfig
from psenet.training.curves import EpochRecord, Recorder

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = Any
Step = Callable[[nn.Module, Batch, int, Callable[[torch.Tensor], None]], torch.Tensor]
"""`step(module, batch, step_number, backward)`: run forward and `backward(loss)` as often as it likes, and return the
loss to show, detached."""

_CHECK_EVERY = 20
_PARTS = frozenset(
    ("epochs_done", "num_steps", "settings", "module", "optimizer", "extras", "rng", "cuda_rng", "loader_rng", "scaler")
)
"""What a checkpoint holds."""


class Stateful(Protocol):
    """Anything that a checkpoint must keep beside weights and optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back."""
        ...


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite."""


def fit(
    module: nn.Module,
    loader: DataLoader,
    *,
    step: Step,
    config: TrainConfig,
    extras: Mapping[str, Stateful] | None = None,
    checkpoint: Path | None = None,
    record: Recorder | None = None,
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
        checkpoint: File to write after every epoch. If it exists, training continues from it.
        record: Told of every epoch that this call finishes; see `psenet.training.curves`.
        description: Shown at the progress bar.
        show_progress: Whether to show one.
        max_steps: Stop after this many steps, for time estimates; the schedule is that of the whole training.

    Raises:
        InputError: An empty loader, a checkpoint of another training, mixed precision that the device lacks.
        TrainingDivergedError: The loss is not finite; the checkpoint of the last good epoch stays.
    """
    if len(loader) == 0:
        raise InputError("the training loader has no batches; lower the batch size or give more images")
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
    from timm.scheduler.cosine_lr import CosineLRScheduler

    accelerator = make_accelerator(config.mixed_precision)
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
        keep = _Checkpoint(checkpoint, accelerator, module, optimizer, loader, dict(extras or {}), config, num_steps)
        first_epoch = keep.load()
        prepared.train()
        with progress_bar(description, total=num_steps, done=first_epoch * len(loader), show=show_progress) as advance:
            for epoch in range(first_epoch, config.epochs):
                batches.set_epoch(epoch)  # accelerate counts from 0, also when a training continues
                number, loss, start = 0, torch.zeros(()), time.perf_counter()
                total = torch.zeros(())  # stays on the device: no step waits for the one before
                for batch_number, batch in enumerate(batches):
                    number = epoch * len(loader) + batch_number
                    if number == max_steps:
                        return
                    scheduler.step_update(number)
                    optimizer.zero_grad()
                    loss = step(prepared, batch, number, accelerator.backward)
                    optimizer.step()
                    total = total + loss.detach()
                    if number % _CHECK_EVERY == 0:
                        _check_finite(loss, number, checkpoint)
                        advance(number + 1, f"loss {float(loss):.3f}")
                _check_finite(loss, number, checkpoint)
                _check_weights(module, number, checkpoint)
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
                keep.save(epoch + 1)
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


def _check_finite(loss: torch.Tensor, number: int, checkpoint: Path | None) -> None:
    if not torch.isfinite(loss).all():
        _diverged(f"the loss is {float(loss)} at step {number}", checkpoint)


def _check_weights(module: nn.Module, number: int, checkpoint: Path | None) -> None:
    """A last update can break the weights after a finite loss; such an epoch must not become the checkpoint."""
    broken = [name for name, parameter in module.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        _diverged(f"{len(broken)} weights are not finite after step {number}, {broken[0]} first", checkpoint)


def _diverged(what: str, checkpoint: Path | None) -> NoReturn:
    kept = (
        f"the last good epoch is kept in {checkpoint}"
        if checkpoint is not None and checkpoint.exists()
        else "no epoch was finished before"
    )
    raise TrainingDivergedError(f"{what}: lower the learning rate or check the data; {kept}")


class _Checkpoint:
    """Everything needed to continue: weights, optimizer, data order, random numbers, and the extras."""

    def __init__(
        self,
        path: Path | None,
        accelerator: "Accelerator",
        module: nn.Module,
        optimizer: Any,
        loader: DataLoader,
        extras: dict[str, Stateful],
        config: TrainConfig,
        num_steps: int,
    ) -> None:
        self._path = path
        self._accelerator = accelerator
        self._module = module
        self._optimizer = optimizer
        self._generators = _generators(loader)
        self._extras = extras
        self._settings = config.as_dict()
        self._num_steps = num_steps

    def save(self, epochs_done: int) -> None:
        if self._path is None or not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        state = {
            "epochs_done": epochs_done,
            "num_steps": self._num_steps,
            "settings": self._settings,
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "extras": {name: extra.state_dict() for name, extra in self._extras.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
            "loader_rng": [generator.get_state() for generator in self._generators],
            "scaler": None if scaler is None else scaler.state_dict(),
        }

        def write(stream: BinaryIO) -> None:
            torch.save(state, stream)

        write_atomically(self._path, write)

    def load(self) -> int:
        """Continue from the checkpoint if there is one; return the epochs done."""
        if self._path is None or not self._path.exists():
            return 0
        state = load_checkpoint(self._path)
        try:
            self._check_same(state)
            return self._take(state)
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{self._path} is damaged; delete it to start this stage again: {first_line(error)}"
            ) from error

    def _take(self, state: Mapping[str, Any]) -> int:
        """Continue from a state; return the epochs done."""
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, extra in self._extras.items():
            extra.load_state_dict(state["extras"][name])
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        for generator, rng in zip(self._generators, state["loader_rng"], strict=True):
            generator.set_state(rng)
        return int(state["epochs_done"])

    def _check_same(self, state: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of another training before anything is taken from it."""
        before, now = state["num_steps"], self._num_steps
        differences = [] if before == now else [f"a training of {before} steps, this one has {now}"]
        differences += [
            f"{name}={state['settings'].get(name)!r}, here {value!r}"
            for name, value in self._settings.items()
            if name != "epochs" and state["settings"].get(name) != value
        ]
        if _shapes(state["module"]) != _shapes(self._module.state_dict()):
            differences.append("a model with other weights")
        if state["extras"].keys() != self._extras.keys() or len(state["loader_rng"]) != len(self._generators):
            differences.append("another kind of training or loader")
        if differences:
            raise InputError(
                f"{self._path} is of {'; '.join(differences)}: "
                "continue with the settings it was started with, or delete it"
            )


def _generators(loader: DataLoader) -> list[torch.Generator]:
    """Return the random generators that decide a loader's order, each once."""
    holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        InputError: The file is damaged or holds something other than tensors and plain values.
    """
    import pickle
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not compare them
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= _PARTS:
            raise ValueError("it is not of a psenet training")
        return state
    except (
        *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AssertionError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    ) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # torch's own words advise to unpickle it all the same.
        holds_objects = isinstance(error, pickle.UnpicklingError)
        reason = "it is damaged, or holds objects, which are never unpickled" if holds_objects else lines[0]
        raise InputError(
            f"{path} cannot be read as a checkpoint; delete it to start this stage again: {reason}"
        ) from error
