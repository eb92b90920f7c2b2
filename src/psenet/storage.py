"""Where a study is kept, and how what a killed search left unfinished is found and put back.

A trial names the process that works at it. A trial that runs in a process that is gone is an orphan: it is marked as
failed and its widths are tried again by a new trial. Two processes never take over one and the same trial, which on
SQLite both could: each adds a trial of its own, and the one with the lower number wins.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from psenet.errors import InputError, first_line
from psenet.masking import told_without, without_password
from psenet.space import WidthSpace

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

WORKER = "psenet_worker"
"""Trial attribute: the process that works at it."""
_PUT_BACK = "psenet_put_back"
RETRY_OF = "psenet_retry_of"
"""Trial attribute: the number of the trial whose widths it tries again."""
_DIGEST = "psenet_space"
_OPENINGS = 4
"""How often to try to open a database."""
_PROCESS = uuid.uuid4().hex[:12]


def open_study(
    storage: str | os.PathLike[str] | None, study_name: str, sampler: "BaseSampler", space: WidthSpace
) -> "Study":
    """Open a study, or begin it if the storage does not have it.

    Raises:
        InputError: The storage cannot be opened, or the study belongs to another space.
    """
    import optuna

    study = optuna.create_study(
        storage=open_storage(storage),
        sampler=sampler,
        study_name=study_name,
        direction="maximize",
        load_if_exists=True,
    )
    # Read first: another search that begins the study at the same time names the space before it adds a trial.
    is_new = not study.get_trials(deepcopy=False)
    digest = study.user_attrs.get(_DIGEST)
    if digest is None and is_new:
        study.set_user_attr(_DIGEST, space.digest())
    elif digest != space.digest():
        raise InputError(
            f"study {study_name!r} in {without_password(storage)} belongs to another width space "
            f"({digest}, here {space.digest()}): use another storage or study_name, "
            "or the model and choices it was made with"
        )
    return study


def open_storage(storage: str | os.PathLike[str] | None) -> "BaseStorage | None":
    """Open a path as a journal file and a URL as a database.

    Raises:
        InputError: It cannot be opened.
    """
    import sqlalchemy.exc
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if storage is None:
        return None
    if isinstance(storage, str) and "://" in storage:
        try:
            return _open_database(storage)
        except (OSError, ValueError, ImportError, KeyError, sqlalchemy.exc.SQLAlchemyError) as error:
            # Not chained: a traceback would show the URL with its password.
            raise InputError(
                f"the storage {without_password(storage)!r} cannot be opened; give a file path or a URL such as "
                f"sqlite:///study.db: {told_without(storage, error)}"
            ) from None
    path = Path(storage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_journal(path)
        return JournalStorage(JournalFileBackend(str(path)))
    # What optuna raises at records that it did not write.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            f"the storage {str(storage)!r} cannot be opened ({first_line(error)}): give another path, or delete it to "
            "start its study again"
        ) from error


def _open_database(url: str) -> "BaseStorage":
    """Open a database; of searches that make its tables at the same moment, all but one fail at first."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for _ in range(_OPENINGS - 1):
        try:
            return RDBStorage(url)
        except (IntegrityError, OperationalError, ProgrammingError):
            time.sleep(0.3)
    return RDBStorage(url)


def _mend_journal(path: Path) -> None:
    """Make sure that a file is a journal, and cut off a last record that a crash left half-written.

    Optuna checks neither: it would append to any file, and would glue its next record to the half one.

    Raises:
        ValueError: The file is no journal.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.exists():
        return
    # Under the writers' lock nothing that is half-written is still being written.
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        rest = b""
        with path.open("rb") as file:  # line by line: a journal may be larger than the memory
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    _check_record(line, number)
                else:
                    rest = line
        start = b'{"op_code"'
        if rest and not rest.startswith(start[: len(rest)]):
            raise ValueError("its last line is no record of an Optuna journal")
        if rest:
            os.truncate(path, path.stat().st_size - len(rest))
    finally:
        lock.release()


def _check_record(line: bytes, number: int) -> None:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "op_code" not in record:
        raise ValueError(f"line {number} is no record of an Optuna journal")


def put_back_orphans(study: "Study") -> None:
    """Put back what a killed search on this machine left running."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_alive(str(trial.user_attrs.get(WORKER, ""))):
            put_back(study, trial.number)


def put_back(study: "Study", number: int) -> None:
    """Mark a running trial as failed, its widths to be tried again; a kill in between is made good by the next call."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import Trial, TrialState

    trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
    if trial.state.is_finished():
        return
    try:
        Trial(study, trial._trial_id).set_user_attr(_PUT_BACK, True)
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
    except UpdateFinishedTrialError:
        # Another search has put it back meanwhile.
        return


def is_to_be_tried(trial: "FrozenTrial") -> bool:
    """Return whether the widths of a trial are to be tried: it was put back, or somebody queued it by hand.

    One that was put back no more, once another trial tries them again.
    """
    from optuna.trial import TrialState

    return trial.state == TrialState.WAITING or (trial.state == TrialState.FAIL and _PUT_BACK in trial.user_attrs)


class Changes:
    """Tells which trials of a study may have changed since it was asked last; those that are finished never do."""

    def __init__(self) -> None:
        self._num_seen = 0
        self._unfinished: list[int] = []

    def among(self, trials: "Sequence[FrozenTrial]") -> "list[FrozenTrial]":
        """Return the trials that are new, or were unfinished when last asked.

        Args:
            trials: All of the study, the n-th with the number n.
        """
        changed = [*(trials[number] for number in self._unfinished), *trials[self._num_seen :]]
        self._unfinished = [trial.number for trial in changed if not trial.state.is_finished()]
        self._num_seen = len(trials)
        return changed


def worker_name() -> str:
    """Return the name of this process, unlike that of any other on any machine."""
    return f"{socket.gethostname()}/{os.getpid()}/{_PROCESS}"


def _is_alive(worker: str) -> bool:
    """Return whether a worker may still be at its trial; one on another machine always may."""
    parts = worker.split("/")
    if len(parts) != 3:
        return False
    if parts[0] != socket.gethostname():
        return True
    pid = int(parts[1])
    if pid == os.getpid():
        return worker == worker_name()
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
