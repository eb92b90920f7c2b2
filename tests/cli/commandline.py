"""The command line run in this process, and what came of it."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from psenet.cli.main import main


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    out: str
    err: str


def psenet(*arguments: str | Path, columns: int = 160) -> Ended:
    """Run the command line on a terminal, a wide one, and, as its nets here are small, on one thread."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            patch.setenv("COLUMNS", str(columns))
            main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
    assert isinstance(ended.value.code, int)
    return Ended(code=ended.value.code, out=out.getvalue(), err=err.getvalue())


def row(printed: str, title: str) -> list[str]:
    """Return the cells of the one table row that has this title."""
    lines = [line.strip("│┃") for line in printed.splitlines() if line.startswith(("│", "┃"))]
    rows = [[cell.strip() for cell in line.replace("┃", "│").split("│")] for line in lines]
    (found,) = [cells for cells in rows if cells[0] == title]
    return found[1:]
