"""Writing files so that a kill at any moment leaves either the old content or the new, never half of it."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from psenet.errors import InputError

_UNFINISHED = ".part"


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], *, keep: Path | None = None
) -> None:
    """Write a file beside its place, flush it to disk and rename it into place.

    Args:
        path: Where the file shall be; missing parent folders are made.
        write: Writes the whole content into the open binary file it is given.
        keep: Where in the same folder the old content goes, if there is some; a kill in between leaves it there alone.

    Raises:
        OSError: The folder cannot be made or written to, or the disk is full; names the file. Whatever else `write`
            raises goes through. In both cases an existing file at `path` is untouched and nothing is left beside it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_UNFINISHED, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give this one the permissions an ordinary write would have.
        os.chmod(beside, 0o666 & ~_umask())
        if keep is not None and target.exists():
            os.replace(target, keep)
        os.replace(beside, target)
    except BaseException as error:
        os.unlink(beside)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(target)
        raise
    _sync_folder(target.parent)


def remove_unfinished(folder: Path) -> None:
    """Delete what writes that were killed have left in a folder and below; nobody may be writing there."""
    for path in folder.rglob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder meanwhile; the lock ends with the process, however that ends.

    Where the system or the file system has no locks, nothing is kept out.

    Raises:
        InputError: Another process is in there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is at work in {folder}: wait for its end, or end it; two would write over each other"
            ) from error
        except OSError:
            pass  # some network file systems
        yield
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file in one step."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_atomically(path, write)


def check_can_be_written(path: Path) -> None:
    """Make sure that a file can be written, before what shall stand in it is worked out; nothing is changed.

    Raises:
        InputError: It is a folder, one of its parents is a file, or writing is not permitted there.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path} must be a file to write; it is a folder: give a name inside it")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; give another path") from error
    if not folder.is_dir():
        raise InputError(f"{path} cannot be written: {folder} is a file; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: writing in {folder} is not permitted; give another path")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its folder is; Windows cannot open folders and needs no such call.
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
