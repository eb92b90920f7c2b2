"""Score functions that can be sent to worker processes, each misbehaving in its own way."""

import os
import signal
import time
from pathlib import Path

import torch

from psenet.space import WidthSpace
from psenet.widths import Widths
from synthetic import Additive


class Noted:
    """Scores, and notes in a folder what was scored by whom; slow, so that every worker gets its share."""

    def __init__(self, space: WidthSpace, folder: Path, seconds: float = 0.02) -> None:
        self.score = Additive(space)
        self.folder = folder
        self.seconds = seconds

    def __call__(self, widths: Widths) -> float:
        time.sleep(self.seconds)
        with (self.folder / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{tuple(widths.values())} {torch.get_num_threads()}\n")
        return self.score.of(widths)

    def lines(self) -> dict[str, list[str]]:
        """Return what each process noted."""
        return {path.stem: path.read_text().splitlines() for path in self.folder.glob("*.txt")}


class DiesOnce(Noted):
    """Kills the process that scores the fifth candidate, the first time."""

    def __call__(self, widths: Widths) -> float:
        mark = self.folder / "died"
        if sum(map(len, self.lines().values())) >= 4 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(widths)


class Dies(Noted):
    """Kills every process that scores."""

    def __call__(self, widths: Widths) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0


class Refusal(Exception):  # noqa: N818 - an exception of the user's own
    """An exception with more than a message."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Refuses(Noted):
    """Raises at the fifth candidate, while others take long."""

    def __call__(self, widths: Widths) -> float:
        if sum(map(len, self.lines().values())) < 4:
            return super().__call__(widths)
        mark = self.folder / "refused"
        if mark.exists():
            time.sleep(60)
        mark.touch()
        raise Refusal(7)


class NotANumber(Noted):
    """Gives every third width of the first group no finite score."""

    def __call__(self, widths: Widths) -> float:
        value = super().__call__(widths)
        return float("nan") if next(iter(widths.values())) == 4 else value
