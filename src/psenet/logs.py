"""TensorBoard logs of a run, in `RUN/logs`: a folder each for every training, the search, and the supernet's subnets.

A log is opened when the first thing is told. What earlier attempts have told of that step and later ones is then
hidden: a run that goes on repeats what it had not kept, and no step is shown twice.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from psenet.errors import InputError, first_line
from psenet.found import SearchProgress
from psenet.history import History
from psenet.training.curves import EpochRecord, Recorder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_SEARCH, _SUBNETS = "search", "subnets"


def check_tensorboard() -> None:
    """Make sure that logs can be written.

    Raises:
        InputError: The package tensorboard is missing or too old.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"TensorBoard logs need the package tensorboard ({first_line(error)}): install it with "
            "pip install 'psenet[tensorboard]', or leave the logs out"
        ) from error


class Logs:
    """The logs of one run. Files are opened when something is told; `close` closes them.

    Args:
        folder: Where they go; None to write nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}
        self._num_told = 0

    def recorder(self, training: str, *, num_samples: int | None) -> Recorder:
        """Return what writes the epochs of a training, numbered from 1.

        Args:
            training: Its name, and that of its folder.
            num_samples: Samples in an epoch; None where nobody knows.
        """

        def record(epoch: EpochRecord) -> None:
            scalars = {"loss": epoch.loss, "learning rate": epoch.learning_rate, "seconds": epoch.seconds}
            if num_samples is not None and epoch.seconds > 0:
                scalars["samples per second"] = num_samples / epoch.seconds
            self._write(training, epoch.epoch + 1, {f"epoch/{name}": value for name, value in scalars.items()})

        return record

    def candidate(self, state: SearchProgress) -> None:
        """Write the candidate that a search has just scored; nothing of one without a score.

        The number of a candidate never falls. That of those inside the budget does, where a budget on latency is
        searched again, more tightly.
        """
        if state.last is None or state.best is None:
            return
        self._num_told = max(state.num_done, self._num_told + 1)
        scalars = {"score": state.last.score, "best score": state.best.score, "MACs": float(state.last.macs)}
        self._write(_SEARCH, self._num_told, {f"candidate/{name}": value for name, value in scalars.items()})

    def subnets(self, history: History, *, steps_per_epoch: int) -> None:
        """Write how the losses of the subnets that a training visited spread, epoch by epoch."""
        if self._folder is None:
            return
        epochs_N = history.steps // steps_per_epoch
        for epoch in np.unique(epochs_N).tolist():
            low, middle, high = np.quantile(history.losses[epochs_N == epoch], [0.1, 0.5, 0.9])
            scalars = {"10 % are below": low, "median": middle, "10 % are above": high}
            self._write(_SUBNETS, epoch + 1, {f"loss of a subnet/{name}": value for name, value in scalars.items()})

    def close(self) -> None:
        """Write what is left, and close the files."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _write(self, name: str, step: int, scalars: dict[str, float]) -> None:
        if self._folder is None:
            return
        if name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            _wait_for_a_later_name(self._folder / name)
            self._writers[name] = SummaryWriter(str(self._folder / name), purge_step=step)
        for tag, value in scalars.items():
            self._writers[name].add_scalar(tag, value, step)
        self._writers[name].flush()  # so that it is seen while the run goes on


def _wait_for_a_later_name(folder: Path) -> None:
    """Make sure that a log opened now is read after those that are there.

    TensorBoard reads logs in the order of their names, in which the second of opening decides.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*.*")]
    latest = max((int(second) for second in seconds if second.isdigit()), default=0)
    time.sleep(min(1.0, max(0.0, latest + 1 - time.time())))
