"""Where a study is kept, and how what a killed search left unfinished is found and put back.

A trial names the process that works at it. A trial that runs in a process that is gone is an orphan: it is marked as
failed and its widths are queued again.
"""

import json
import os
import re
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from psenet.errors import InputError
from psenet.space import WidthSpace

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

WORKER = "psenet_worker"
"""Trial attribute: the process that works at it."""
_RETRY_OF = "psenet_retry_of"
_DIGEST = "psenet_space"
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
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if storage is None:
        return None
    try:
        if isinstance(storage, str) and "://" in storage:
            return RDBStorage(storage)
        path = Path(storage)
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_journal(path)
        return JournalStorage(JournalFileBackend(str(path)))
    except (OSError, ValueError, ImportError, KeyError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise InputError(
            f"the storage {without_password(storage)!r} cannot be opened; "
            f"give a file path or a URL such as sqlite:///study.db: {error}"
        ) from error


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
        content = path.read_bytes()
        whole, newline, rest = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            record = json.loads(line)
            if not isinstance(record, dict) or "op_code" not in record:
                raise ValueError(f"line {number} is no record of an Optuna journal")
        start = b'{"op_code"'
        if rest and not rest.startswith(start[: len(rest)]):
            raise ValueError("its last line is no record of an Optuna journal")
        if rest:
            os.truncate(path, len(content) - len(rest))
    finally:
        lock.release()


def without_password(storage: str | os.PathLike[str] | None) -> str:
    """Return a storage's path or URL for a message."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", str(storage))


def put_back_orphans(study: "Study") -> None:
    """Put back what a killed search on this machine left running."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_alive(str(trial.user_attrs.get(WORKER, ""))):
            put_back(study, trial.number)


def put_back(study: "Study", number: int) -> None:
    """Mark a running trial as failed and queue its widths again; a kill in between is made good by the next call."""
    from optuna.trial import TrialState, create_trial

    trials = study.get_trials(deepcopy=False)
    trial = next(trial for trial in trials if trial.number == number)
    if trial.state.is_finished():
        return
    if number not in numbers_put_back(trials) and trial.params:
        study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={WORKER: worker_name(), _RETRY_OF: number},
            )
        )
    study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def numbers_put_back(trials: "list[FrozenTrial]") -> set[int]:
    """Return the numbers of the trials whose widths were queued again."""
    return {trial.user_attrs[_RETRY_OF] for trial in trials if _RETRY_OF in trial.user_attrs}


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
