"""Runs in processes of their own that are killed or refused disk space; `make soak` does the same at length."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soak_runs import BASE, differences, run, stage_of

COMMAND = (
    *BASE,
    *("--baseline-epochs", "2", "--supernet-epochs", "2", "--finetune-epochs", "1"),
    *("--evaluations", "12", "--front-evaluations", "2"),
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(out, command=COMMAND)
    return out


def _kill_when(out: Path, file: str) -> None:
    """Start or resume a run and kill it once it has written a file."""
    process = subprocess.Popen(
        [sys.executable, "-m", "psenet", *COMMAND, "--out", os.fspath(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        while process.poll() is None and not (out / file).exists():
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_was_killed_twice_ends_like_one_that_was_not(undisturbed: Path, tmp_path: Path):
    out = tmp_path / "run"
    stages = []
    for file in ("checkpoints/supernet.pt", "stages/study.journal"):
        _kill_when(out, file)
        stages.append(stage_of(out))
    assert stages == ["supernet", "search"]
    assert run(out, command=COMMAND)
    assert differences(out, undisturbed) == []


def test_a_run_that_may_not_write_large_files_says_so_and_goes_on_when_it_may(undisturbed: Path, tmp_path: Path):
    out = tmp_path / "run"
    limit = (undisturbed / "checkpoints/baseline.pt").stat().st_size - 1

    def forbid() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    refused = subprocess.run(
        [sys.executable, "-m", "psenet", *COMMAND, "--out", os.fspath(out)],
        preexec_fn=forbid,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert refused.returncode == 1
    assert "psenet: OSError: [Errno 27] File too large: " in refused.stderr
    assert "baseline.pt" in refused.stderr and "Traceback" not in refused.stderr
    assert "what is finished is kept; once that is mended, --resume continues" in refused.stderr
    assert list((out / "checkpoints").iterdir()) == []
    assert run(out, command=COMMAND)
    assert differences(out, undisturbed) == []
