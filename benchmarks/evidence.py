"""What every benchmark writes beside its figures: command, commit, versions, hardware."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from psenet.result import hardware, versions
from psenet.rundir import write_json

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any], *, seed: int | None = None) -> Path:
    """Write one result file and return its path."""
    path = RESULTS / f"{name}.json"
    write_json(
        path,
        {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "seed": seed,
            "versions": versions(),
            "hardware": hardware(),
            **figures,
        },
    )
    return path


def commit() -> str:
    """Return the short name of the commit that is checked out."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"
