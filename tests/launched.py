"""Programs started as several processes on this machine, by torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

needs_gloo = pytest.mark.skipif(
    os.name != "posix" or not torch.distributed.is_gloo_available(), reason="needs gloo and the signals of POSIX"
)


def launch(*arguments: str | Path, processes: int = 2) -> "subprocess.Popen[str]":
    """Start several processes, on a port that the launcher finds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def finish(process: "subprocess.Popen[str]", *, timeout: float = 200) -> tuple[int, str]:
    """Return how it ended and what it printed; no process is left behind."""
    try:
        printed = process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends those it has started
            process.communicate()
    return process.returncode, printed


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill a launcher and all that it has started, at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)
    process.communicate()
