"""Checkpoints: all that a training needs to go on as if it had never stopped, and the one before in reserve.

Of several processes that train together rank 0 writes and reads them, with the random states of all.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import torch
from torch import nn

from psenet import ranks
from psenet.errors import InputError, first_line
from psenet.files import write_atomically
from psenet.training.config import TrainConfig
from psenet.training.feed import Feed, random_state, set_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator

_PARTS = frozenset(
    (
        *("position", "num_steps", "settings", "module", "optimizer", "extras"),
        *("ranks", "scaler"),
    )
)
"""What a checkpoint holds."""
_MAY_CHANGE = frozenset(("epochs", "checkpoint_steps"))
"""Settings that do not tell trainings apart; how many steps there are does."""


class Stateful(Protocol):
    """Anything that a checkpoint must keep beside weights and optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Take the state back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a training is."""

    epoch: int = 0
    """The epoch that is going on, or begins."""
    batch: int = 0
    """Its batches that are done."""
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum of the loss over these, shape ()."""
    seconds: float = 0.0
    """Time these took."""


class Checkpoint:
    """The checkpoint file of one training, and beside it, as NAME.previous.pt, the one before.

    Args:
        path: The file; None to keep nothing.
        accelerator: What prepared the training.
        module: Whose weights to keep.
        optimizer: As prepared.
        feed: The batches.
        extras: More state to keep, by name.
        config: The settings, which must be the same when the training goes on.
        num_steps: Steps of the whole training, for the same purpose.
    """

    def __init__(
        self,
        path: Path | None,
        accelerator: "Accelerator",
        module: nn.Module,
        optimizer: Any,
        feed: Feed,
        extras: Mapping[str, Stateful],
        config: TrainConfig,
        num_steps: int,
    ) -> None:
        self._path = path
        self._accelerator = accelerator
        self._module = module
        self._parts: dict[str, Stateful] = {"module": module, "optimizer": optimizer}
        self._feed = feed
        self._extras = extras
        self._settings = config.as_dict()
        self._num_steps = num_steps
        self._num_ranks = ranks.num_ranks()
        self._is_damaged = False

    def save(self, position: Position) -> None:
        """Write the state; what was written before stays as the previous checkpoint.

        Raises:
            OSError: The disk is full or the folder cannot be written to; nothing that was written before is lost.
        """
        path = self._path
        if path is None:
            return
        of_ranks = ranks.gather(self._of_rank())
        ranks.in_main(lambda: self._write(path, self._state(position, of_ranks)))

    def _of_rank(self) -> dict[str, Any]:
        """Return what every rank has of its own."""
        device = self._accelerator.device
        return {
            "random": random_state(),
            "cuda_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "feed": self._feed.state_dict(),
        }

    def _state(self, position: Position, of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        scaler = self._accelerator.scaler
        return {
            **{name: part.state_dict() for name, part in self._parts.items()},
            "position": vars(position),
            "num_steps": self._num_steps,
            "settings": self._settings,
            "extras": {name: extra.state_dict() for name, extra in self._extras.items()},
            "ranks": of_ranks,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        def write(stream: BinaryIO) -> None:
            try:
                torch.save(state, stream)
            except RuntimeError as error:
                # Of a full disk torch says that a position is unexpected.
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

        write_atomically(path, write, keep=None if self._is_damaged else previous_of(path))
        self._is_damaged = False

    def load(self) -> Position:
        """Take the state of the last checkpoint that can be read, if there is one, and return how far it was.

        Raises:
            InputError: No checkpoint can be read, or they are of another training; nothing has changed then.
        """
        state = ranks.from_main(self._read_checked)
        if state is None:
            self._begin_alike()
            return Position()
        with self._naming_what_is_damaged():
            return self._take(state)

    def _take(self, state: Mapping[str, Any]) -> Position:
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        for name, extra in self._extras.items():
            extra.load_state_dict(state["extras"][name])
        own = state["ranks"][ranks.rank()]
        self._feed.load_state_dict(own["feed"])
        set_random_state(own["random"])
        if own["cuda_random"] is not None and self._accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_random"], self._accelerator.device)
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        return Position(**state["position"])

    def _begin_alike(self) -> None:
        """Let all ranks begin with the extra state of rank 0, such as its strategy's; they have its weights already."""
        extras = ranks.from_main(lambda: {name: extra.state_dict() for name, extra in self._extras.items()})
        if not ranks.is_main():
            for name, extra in self._extras.items():
                extra.load_state_dict(extras[name])

    def _read_checked(self) -> dict[str, Any] | None:
        state = self._read()
        if state is not None:
            with self._naming_what_is_damaged():
                self._check_same(state)
        return state

    @contextmanager
    def _naming_what_is_damaged(self) -> Iterator[None]:
        """Say of a state that can be read and has not what it must have that it is damaged."""
        try:
            yield
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            names = " and ".join(map(str, self._there()))
            raise InputError(
                f"{self._there()[0]} is damaged: {first_line(error)}; delete {names} to start this stage again"
            ) from error

    def _read(self) -> dict[str, Any] | None:
        """Return the newest state that is whole; None if there is no file."""
        there = self._there()
        for older in there[1:]:
            try:
                return load_checkpoint(there[0])
            except InputError as error:
                state = _load_in_place(older, error)
                self._is_damaged = True
                warnings.warn(f"{error}; going on from the one before, {older}", stacklevel=4)
                return state
        return load_checkpoint(there[0]) if there else None

    def _there(self) -> list[Path]:
        """Return the files that exist, the newer first."""
        paths = [] if self._path is None else [self._path, previous_of(self._path)]
        return [path for path in paths if path.exists()]

    def _check_same(self, state: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of another training before anything is taken from it."""
        before, now = state["num_steps"], self._num_steps
        differences = [] if before == now else [f"a training of {before} steps, this one has {now}"]
        differences += [
            f"{name}={state['settings'].get(name)!r}, here {value!r}"
            for name, value in self._settings.items()
            if name not in _MAY_CHANGE and state["settings"].get(name) != value
        ]
        if _shapes(state["module"]) != _shapes(self._module.state_dict()):
            differences.append("a model with other weights")
        num_ranks, num_generators = len(state["ranks"]), len(self._feed.state_dict()["generators"])
        if num_ranks != self._num_ranks:
            differences.append(f"a training by {num_ranks} processes, this one has {self._num_ranks}")
        if state["extras"].keys() != self._extras.keys() or any(
            len(own["feed"]["generators"]) != num_generators for own in state["ranks"]
        ):
            differences.append("another kind of training or loader")
        if differences:
            raise InputError(
                f"{self._there()[0]} is of {'; '.join(differences)}: "
                f"continue with the settings it was started with, or delete {' and '.join(map(str, self._there()))}"
            )


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return path.with_suffix(f".previous{path.suffix}")


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
            raise ValueError("it is not of a psenet training, or of another version")
        return state
    except (
        *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AssertionError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    ) as error:
        # torch's own words advise to unpickle it all the same.
        holds_objects = isinstance(error, pickle.UnpicklingError)
        reason = "it is damaged, or holds objects, which are never unpickled" if holds_objects else first_line(error)
        raise InputError(
            f"{path} cannot be read as a checkpoint; delete it to start this stage again: {reason}"
        ) from error


def _load_in_place(older: Path, of_newer: InputError) -> dict[str, Any]:
    """Return the older state in place of a damaged newer one.

    Raises:
        InputError: It is damaged, too.
    """
    try:
        return load_checkpoint(older)
    except InputError as error:
        raise InputError(f"{of_newer}; and the one before: {error}") from error


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
