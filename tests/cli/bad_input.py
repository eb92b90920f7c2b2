"""Mistakes as a table: what a user types among which files, and the words and the exit code that must come of it."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from commandline import Ended, psenet
from PIL import Image

USER_MISTAKE, FAILURE = 2, 1
MAX_LINES = 20
MODEL = "psenet.models:digits_resnet"
START = f"prune --model {MODEL} --data digits --macs 50% --out run"
"""Good options; what is given again behind them wins."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mistake, made in an empty current directory."""

    name: str
    """What is wrong, as a sentence; unlike all others."""
    command: str
    """As typed behind `psenet`."""
    says: tuple[str, ...]
    """Parts of the message: what must hold, what came, where, what to do."""
    code: int = USER_MISTAKE
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Written before, by path."""
    prepare: Callable[[], object] | None = None
    """Does in the directory what plain files cannot."""
    leaves: tuple[str, ...] = ()
    """What of `run` may be there afterwards; by default the mistake is found before anything is written."""


def commit(case: Case) -> Ended:
    """Make the mistake in the current directory."""
    for name, content in case.files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.prepare is not None:
        case.prepare()
    return psenet(*shlex.split(case.command))


def message(ended: Ended) -> str:
    """Return what was said on one line; a message in a frame is broken into lines."""
    return " ".join(ended.err.replace("│", " ").split())


# What mistakes are made of --------------------------------------------------------------------------------------------


def photos(folders: Mapping[str, int], *, root: str = "photos", side: int = 16) -> Callable[[], None]:
    """Return what writes folders with so many PNG images each."""

    def write() -> None:
        for number, (folder, count) in enumerate(folders.items()):
            (Path(root) / folder).mkdir(parents=True)
            for index in range(count):
                pixels_HWC = np.full((side, side, 3), (number * 80 + index) % 256, dtype=np.uint8)
                Image.fromarray(pixels_HWC).save(Path(root) / folder / f"{index}.png")

    return write


def in_turn(*steps: Callable[[], object]) -> Callable[[], None]:
    """Return what does one thing after the other."""

    def do() -> None:
        for step in steps:
            step()

    return do


def recipe(text: str, *more: str) -> dict[str, str]:
    """Return the file of a recipe: what every recipe needs, and a text."""
    return {"recipe.yaml": f"model: {{name: {MODEL}}}\ndata: {{source: digits}}\nbudget: {{macs: 50%}}\n{text}"}
