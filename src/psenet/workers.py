"""Workers: scoring in several processes beside this one.

One process proposes and writes to the study; workers only score. A worker that is killed can thus neither leave the
study locked nor half-written, and no two of them ever get the same widths.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from psenet.errors import InputError, first_line
from psenet.scoring import Outcome, Scored, ScoreHere, ScoreOf, Scorer, scored
from psenet.widths import Widths

_GRACE = 5.0
"""Seconds that a worker has to end before it is killed."""
_UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError)


@contextmanager
def open_scorer(score_fn: ScoreOf, num_workers: int) -> Iterator[Scorer]:
    """Score in this process with one worker, else in so many processes, which end when the context does.

    Args:
        score_fn: Scores one setting; with several workers it must be picklable.
        num_workers: At least 1.

    Raises:
        InputError: The score function cannot be sent to other processes.
    """
    if num_workers == 1:
        yield ScoreHere(score_fn)
        return
    pool = WorkerPool(pickled(score_fn), num_workers)
    try:
        pool.open()
        yield pool
    finally:
        pool.close()


@dataclass
class _Worker:
    process: Any
    """A process of the spawn context."""
    connection: Connection
    key: int | None = None
    begin: float = 0.0


class WorkerPool:
    """Scores in processes of their own; one that dies is reported, and the others go on.

    Args:
        payload: The score function as `pickled` returns it. By value: tensors that are sent otherwise are moved into
            shared memory, which is scarce in containers.
        num_workers: How many processes.
    """

    def __init__(self, payload: bytes, num_workers: int) -> None:
        self._payload = payload
        self._num_started = num_workers
        self._workers: list[_Worker] = []
        self._error: BaseException | None = None

    @property
    def num_workers(self) -> int:
        """How many workers are alive."""
        return len(self._workers)

    @property
    def num_free(self) -> int:
        """How many workers have nothing to do."""
        return sum(worker.key is None for worker in self._workers)

    def open(self) -> None:
        """Start the processes; each gets its share of this process's threads."""
        import torch

        num_threads = max(1, torch.get_num_threads() // self._num_started)
        context = multiprocessing.get_context("spawn")
        with _sigint_blocked():
            for _ in range(self._num_started):
                ours, theirs = context.Pipe()
                arguments = (theirs, self._payload, num_threads)
                process = context.Process(target=_score_on_demand, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))

    def start(self, key: int, widths: Widths, rival: Widths | None = None) -> None:
        """Send a candidate to a worker that has nothing to do."""
        worker = next(worker for worker in self._workers if worker.key is None)
        worker.key, worker.begin = key, time.perf_counter()
        try:
            worker.connection.send((widths, rival))
        except OSError:
            # It died since; `wait` finds that out.
            pass

    def wait(self) -> list[Outcome]:
        """Wait for a worker to end its candidate or to die.

        Raises:
            BaseException: Whatever the score function raised in a worker.
            RuntimeError: All workers died.
        """
        outcomes: list[Outcome] = []
        while not outcomes:
            if self._error is not None:
                # Not before the scores that came at the same time were handed over.
                raise self._error
            wait([item for worker in self._workers for item in (worker.connection, worker.process.sentinel)])
            for worker in list(self._workers):
                outcomes += self._collect(worker)
        return outcomes

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_GRACE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _collect(self, worker: _Worker) -> list[Outcome]:
        """Return the outcome of a worker's candidate if it has ended."""
        try:
            if worker.connection.poll():
                return self._outcome(worker, worker.connection.recv())
        except (EOFError, OSError):
            worker.process.join(_GRACE)
        return [] if worker.process.is_alive() else self._bury(worker)

    def _outcome(self, worker: _Worker, message: tuple[Scored | None, bytes, str]) -> list[Outcome]:
        found, error, trace = message
        if found is None:
            self._error = _unpickled(error, trace)
            self._error.__cause__ = RuntimeError(f"in a worker process:\n{trace}")
            return []
        assert worker.key is not None
        outcome = Outcome(worker.key, found.score, time.perf_counter() - worker.begin, found.share)
        worker.key = None
        return [outcome]

    def _bury(self, worker: _Worker) -> list[Outcome]:
        self._workers.remove(worker)
        worker.connection.close()
        what = f"a worker process of the search died with exit code {worker.process.exitcode}"
        if not self._workers:
            self._error = RuntimeError(
                f"{what}, the last of {self._num_started}: a negative code is the number of a signal (-9: "
                "killed, often for memory); with code 1, see its error above, and make sure that the script starts the "
                "search under `if __name__ == '__main__':`"
            )
            return []
        warnings.warn(f"{what}; the other {len(self._workers)} go on with what it was at", stacklevel=2)
        if worker.key is None:
            return []
        return [Outcome(worker.key, None, time.perf_counter() - worker.begin)]


def pickled(score_fn: ScoreOf) -> bytes:
    """Return a score function as bytes for other processes.

    Raises:
        InputError: It cannot be pickled.
    """
    try:
        return pickle.dumps(score_fn)
    except _UNPICKLABLE as error:
        raise InputError(
            f"with several workers score_fn must be picklable; got {score_fn!r} ({first_line(error)}): give a function "
            "defined at the top of a module, or an object of a class defined there such as psenet.SupernetScore, "
            "not a lambda or a function inside a function; or workers=1"
        ) from error


def _score_on_demand(connection: Connection, payload: bytes, num_threads: int) -> None:
    """Run a worker: answer each candidate with (score, error, traceback) until the other side is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    try:
        score_fn = _loaded(payload)
        for widths, rival in iter(lambda: _received(connection), None):
            connection.send((scored(score_fn, widths, rival), b"", ""))
    except BaseException as error:
        connection.send((None, _as_bytes(error), traceback.format_exc()))


def _received(connection: Connection) -> tuple[Widths, Widths | None] | None:
    try:
        return connection.recv()
    except EOFError:
        return None


def _loaded(payload: bytes) -> ScoreOf:
    try:
        return pickle.loads(payload)
    except (*_UNPICKLABLE, ImportError) as error:
        raise InputError(
            f"score_fn cannot be loaded in a worker process ({first_line(error)}): define it in a module that can be "
            "imported, not in a notebook or in `python -c`; or give workers=1"
        ) from error


def _end_with_parent() -> None:
    """End this worker when the search is killed, even amid a score: a stray one would hold memory and device."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _as_bytes(error: BaseException) -> bytes:
    try:
        return pickle.dumps(error)
    except _UNPICKLABLE:
        return b""


def _unpickled(error: bytes, trace: str) -> BaseException:
    """Return an exception of a worker as it was, or a RuntimeError with its traceback if it cannot be rebuilt."""
    try:
        found = pickle.loads(error)
    except (*_UNPICKLABLE, ImportError, EOFError):
        found = None
    return found if isinstance(found, BaseException) else RuntimeError(f"score_fn failed in a worker:\n{trace}")


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Let processes started here inherit that Ctrl-C is not for them; one that comes meanwhile is kept for us."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
