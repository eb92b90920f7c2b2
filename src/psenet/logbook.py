"""`run.log`: what happened in a run, when, and on what, so that a stranger can find what went wrong."""

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from psenet.masking import without_passwords
from psenet.result import versions


class Logbook:
    """The log of a run: one line for each event, with its time (UTC) and the process; passwords in URLs are masked.

    Attempts follow one another in one file. A log that cannot be written costs no work: it is left out.

    Args:
        path: The file; None to tell people only.
        say: Gets the lines for people, too.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say

    def say(self, text: str) -> None:
        """Note a line, and tell people."""
        self.note(text)
        self._say(text)

    def note(self, text: str) -> None:
        """Note a line, or several of one event."""
        if self._path is None:
            return
        first, *others = without_passwords(text).splitlines() or [""]
        head = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {os.getpid()} {first}"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n".join([head, *(f"    {line}" for line in others)]) + "\n")
        except OSError:
            pass

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Note what begins, the warnings meanwhile, and how it ends: well, or with which error, traceback included."""
        shown = warnings.showwarning

        def note_and_show(message: Warning | str, category: type[Warning], *place: object, **options: object) -> None:
            self.note(f"{category.__name__}: {message}")
            shown(message, category, *place, **options)  # pyright: ignore[reportArgumentType]

        self.note(f"begin: {what}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
        warnings.showwarning = note_and_show
        try:
            yield
        except BaseException as error:
            self.note(f"stopped by {type(error).__name__}\n{traceback.format_exc()}")
            raise
        else:
            self.note("end")
        finally:
            warnings.showwarning = shown
