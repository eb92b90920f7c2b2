"""Kill real runs at random moments, fill the disk under them, resume them, and compare with an undisturbed run.

    python benchmarks/soak_runs.py                       thirty kills and ten full disks, twenty minutes on one core
    python benchmarks/soak_runs.py --kills 4 --disks 0 --seed 7

Every run is `psenet prune --resume` on the digits in a process of its own, with a checkpoint every three steps. SIGKILL
falls at a moment drawn evenly from the time that the undisturbed run took after its start; every second run that goes
on is killed once more. For a full disk a run is given a tmpfs that is too small, which grows before the run goes on;
that needs the right to mount. Whatever a run leaves behind must in the end equal the undisturbed run's, bit by bit: the
weights of every stage, the checkpoints (weights, optimizer, random numbers, order of the data), the history, every
scored candidate in order, the training curves and the figures. Only times, and files that hold times, may differ.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evidence import write_result
from psenet.training.checkpoint import load_checkpoint

BASE = (
    *("prune", "--data", "digits", "--model", "psenet.models:digits_resnet", "--macs", "50%", "--resume"),
    *(word for stage in ("baseline", "supernet", "finetune") for word in ("--set", f"{stage}.checkpoint_steps=3")),
)
COMMAND = (
    *BASE,
    *("--baseline-epochs", "4", "--supernet-epochs", "4", "--finetune-epochs", "3"),
    *("--evaluations", "30", "--front-evaluations", "6"),
)
_STAGES = {
    "recipe.json": "start",
    "stages/baseline.safetensors": "baseline",
    "stages/supernet.safetensors": "supernet",
    "stages/search.json": "search",
    "stages/uniform.safetensors": "fine-tuning",
    "result.json": "test and export",
    "report.html": "report",
}
"""What a run lacks while it is at a stage, in their order."""
FINISHED = "finished"
_MAY_DIFFER = ("seconds", "latency", "finished_at", "export", "command")
"""Beginnings of the names of figures that hold times or the folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--disks", type=int, default=10, help="how many disks to fill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder), arguments.kills, arguments.disks, np.random.default_rng(arguments.seed))
    print(json.dumps(figures, indent=2))
    print(f"figures: {write_result('soak_runs', figures, seed=arguments.seed)}")
    if figures["runs_that_differ"]:
        sys.exit(1)


def soak(folder: Path, num_kills: int, num_disks: int, rng: np.random.Generator) -> dict[str, Any]:
    """Disturb so many runs, and return how that ended."""
    begin = time.perf_counter()
    undisturbed, again = folder / "undisturbed", folder / "again"
    assert run(undisturbed)
    whole_seconds = time.perf_counter() - begin
    # Of the time before, in which libraries are imported, there is nothing to lose.
    first_second = max(0.1, whole_seconds - (time.time() - (undisturbed / "recipe.json").stat().st_mtime))
    assert run(again)
    found = {"undisturbed": differences(again, undisturbed)}
    kills, disks = Counter[str](), Counter[str]()
    while kills.total() < num_kills:
        ours = folder / f"killed{len(found)}"
        for _ in range(1 + len(found) % 2):
            moment = float(rng.uniform(first_second, whole_seconds))
            if kills.total() < num_kills and run(ours, kill_after=moment) is None:
                stage = stage_of(ours)
                if stage != FINISHED:  # there is nothing to lose
                    kills[stage] += 1
        found[ours.name] = _compared(ours, undisturbed, ours.name)
    size = sum(file.stat().st_size for file in undisturbed.rglob("*") if file.is_file())
    for number in range(num_disks):
        with small_disk(folder / f"disk{number}", int(size * float(rng.uniform(0.02, 0.98)))) as disk:
            ours = disk / "run"
            if run(ours) is not False:
                continue  # it holds less at any time than at the end
            disks[stage_of(ours)] += 1
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", os.fspath(disk)], check=True)
            found[disk.name] = _compared(ours, undisturbed, disk.name)
    return {
        "command_of_a_run": " ".join(("psenet", *COMMAND)),
        "kills": kills.total(),
        "kills_by_stage": _in_order(kills),
        "killed_runs": sum(name.startswith("killed") for name in found),
        "full_disks": disks.total(),
        "full_disks_by_stage": _in_order(disks),
        "undisturbed_runs_are_the_same": not found["undisturbed"],
        "runs_that_differ": {name: what for name, what in found.items() if what},
        "seconds_of_the_undisturbed_run": round(whole_seconds, 1),
        "seconds": round(time.perf_counter() - begin),
    }


def _compared(ours: Path, undisturbed: Path, name: str) -> list[str]:
    """Let a run go on to its end, and return what differs."""
    found = differences(ours, undisturbed) if run(ours) else [f"it stops while at: {stage_of(ours)}"]
    print(json.dumps({name: found or "the same"}), flush=True)
    shutil.rmtree(ours)
    return found


def _in_order(stages: Counter[str]) -> dict[str, int]:
    return {stage: stages[stage] for stage in _STAGES.values() if stages[stage]}


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes; needs the right to.

    Raises:
        OSError: It cannot be mounted.
    """
    place.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", os.fspath(place)], check=True, capture_output=True
        )
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise OSError(f"a small file system cannot be mounted here: {error}") from error
    try:
        yield place
    finally:
        subprocess.run(["umount", os.fspath(place)], check=True)


def run(out: Path, *, command: Sequence[str] = COMMAND, kill_after: float | None = None) -> bool | None:
    """Start or resume a run; return whether it ended well, None if it was killed, False with its last words shown."""
    arguments = [sys.executable, "-m", "psenet", *command, "--out", os.fspath(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        log.seek(0)
        if code != 0:
            print(log.read()[-500:], file=sys.stderr)
        return code == 0


def stage_of(out: Path) -> str:
    """Return the stage that a run has not finished."""
    return next((stage for name, stage in _STAGES.items() if not (out / name).exists()), FINISHED)


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return the files that differ in more than times."""
    names, other_names = (
        {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} for out in (ours, theirs)
    )
    changed = [name for name in sorted(names & other_names) if _content(ours / name) != _content(theirs / name)]
    return [f"{name} is on one side only" for name in sorted(names ^ other_names)] + changed


def _content(path: Path) -> Any:
    """Return what of a file must be the same."""
    if path.suffix == ".json":
        return _lasting(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    if path.suffix == ".pt":
        return _plain(_lasting(load_checkpoint(path)))
    # The study's journal holds times and identifiers; evaluated.json has its content. Reports and programs hold times.
    return path.read_bytes() if path.suffix in (".safetensors", ".yaml") else None


def _lasting(value: Any) -> Any:
    """Return nested containers without what may differ."""
    if isinstance(value, Mapping):
        return {name: _lasting(one) for name, one in value.items() if not str(name).startswith(_MAY_DIFFER)}
    return [_lasting(one) for one in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """Return nested containers with tensors as bytes, to be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
