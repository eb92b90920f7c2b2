"""Training curves: what a training tells of each of its epochs, and the file that keeps it over interruptions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from psenet.errors import InputError
from psenet.rundir import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One finished epoch of a training."""

    epoch: int
    """Number of the epoch, from 0, over all attempts."""
    step: int
    """Steps finished by then, over the whole training."""
    loss: float
    """Mean of the loss over the epoch's steps, as the step function gave it."""
    learning_rate: float
    """That of the epoch's last step."""
    seconds: float
    """Time the epoch took."""


Recorder = Callable[[EpochRecord], None]
"""Called once an epoch, in the main process, before the checkpoint of that epoch is written. A training that is killed
between the two repeats the epoch when it goes on: a later record of an epoch replaces the earlier one."""


class Curves:
    """The file of a run's training curves: by training, its epochs in order.

    Args:
        path: The JSON file; it need not exist.

    Example:
        >>> curves = Curves(Path("run/stages/curves.json"))  # doctest: +SKIP
        >>> train_model(model, loader, record=curves.recorder("baseline"))  # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, list[EpochRecord]]:
        """Return the epochs recorded so far by training; nothing if there is no file.

        Raises:
            InputError: The file is damaged.
        """
        if not self._path.exists():
            return {}
        remedy = "delete it, and training goes on without the epochs in it"
        content = read_json(self._path, remedy=remedy)
        try:
            return {name: [_record_of(epoch) for epoch in epochs] for name, epochs in content.items()}
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{self._path} is no record of training curves ({type(error).__name__}: {error}); {remedy}"
            ) from error

    def recorder(self, training: str) -> Recorder:
        """Return what adds epochs to the curve of one training.

        Raises:
            InputError: The file is damaged; said now, not after the first epoch.
        """
        self.read()

        def record(epoch: EpochRecord) -> None:
            curves = self.read()
            before = [one for one in curves.get(training, []) if one.epoch < epoch.epoch]
            curves[training] = [*before, epoch]
            write_json(self._path, {name: [asdict(one) for one in epochs] for name, epochs in curves.items()})

        return record


def _record_of(content: dict[str, Any]) -> EpochRecord:
    """Return a record of what JSON says of it."""
    numbers = {field.name: content[field.name] for field in fields(EpochRecord)}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number; got {value!r}")
    return EpochRecord(**numbers)
