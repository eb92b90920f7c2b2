"""The whole way by two processes, as torchrun starts them; `training/test_several_processes.py` has the trainings."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import psenet
from launched import finish, kill, launch, needs_gloo
from psenet.models import digits_resnet
from soak_runs import BASE, differences, run, stage_of

COMMAND = (
    *BASE,
    *("--baseline-epochs", "2", "--supernet-epochs", "2", "--finetune-epochs", "1"),
    *("--evaluations", "8", "--front-evaluations", "2"),
)

pytestmark = [pytest.mark.slow, needs_gloo]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run by two processes and what they printed."""
    out = tmp_path_factory.mktemp("by_two") / "run"
    code, printed = finish(launch("-m", "psenet", *COMMAND, "--out", out))
    assert code == 0, printed
    return out, printed


def test_a_run_by_two_processes_leaves_the_files_and_visits_the_subnets_of_one_by_one(
    by_two: tuple[Path, str], tmp_path: Path
):
    (ours, printed), alone = by_two, tmp_path / "alone"
    assert run(alone, command=COMMAND)
    files = [{path.relative_to(out) for path in out.rglob("*") if path.is_file()} for out in (ours, alone)]
    assert files[0] == files[1]
    assert printed.count("training the supernet") == printed.count("accuracy on test data") == 1
    with np.load(ours / "stages/history.npz") as mine, np.load(alone / "stages/history.npz") as other:
        for name in ("steps", "widths"):
            assert np.array_equal(mine[name], other[name])
        assert np.isfinite(mine["losses"]).all()
    curves = [json.loads((out / "stages/curves.json").read_text()) for out in (ours, alone)]
    steps = [{name: [epoch["step"] for epoch in epochs] for name, epochs in one.items()} for one in curves]
    assert steps[0] == steps[1]
    record = json.loads((ours / "result.json").read_text())
    model = psenet.load(ours, digits_resnet)
    assert sum(parameter.numel() for parameter in model.parameters()) == record["pruned"]["params"]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_run_by_two_that_was_killed_twice_ends_like_one_that_was_not(by_two: tuple[Path, str], tmp_path: Path):
    out, stages = tmp_path / "run", []
    for file in ("checkpoints/supernet.pt", "stages/study.journal"):
        process, end = launch("-m", "psenet", *COMMAND, "--out", out), time.monotonic() + 120
        try:
            while not (out / file).exists():
                assert time.monotonic() < end and process.poll() is None, f"no {file}"
                time.sleep(0.005)
        finally:
            kill(process)
        stages.append(stage_of(out))
    assert stages == ["supernet", "search"]
    code, printed = finish(launch("-m", "psenet", *COMMAND, "--out", out))
    assert code == 0, printed
    assert differences(out, by_two[0]) == []


def test_stages_that_two_processes_have_not_done_can_be_done_by_one(by_two: tuple[Path, str], tmp_path: Path):
    shutil.copytree(by_two[0], out := tmp_path / "run")
    for name in ("result.json", "stages/search.json", "stages/study.journal", "stages/front.journal"):
        (out / name).unlink()
    assert run(out, command=COMMAND)
    assert differences(out, by_two[0]) == []


def test_a_mistake_is_said_once_and_ends_all(tmp_path: Path):
    (tmp_path / "other.txt").touch()
    code, printed = finish(launch("-m", "psenet", *COMMAND, "--out", tmp_path), timeout=100)
    assert code != 0
    assert printed.count("holds files that are not of a psenet run; give an empty one") == 1
