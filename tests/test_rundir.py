import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from psenet import rundir
from psenet.errors import InputError
from psenet.rundir import RunDirectory, read_json, write_json

_RECIPE = {"model": "resnet20", "epochs": 3, "budget": {"macs": "50%", "params": None}, "input_shape": (3, 8, 8)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the last number of a list."""
    now = [100.0]
    monkeypatch.setattr(rundir.time, "perf_counter", lambda: now[-1])
    return now


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Starting and continuing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_starts_in_an_empty_folder_with_its_recipe(tmp_path: Path, exists: bool, resume: bool):
    folder = tmp_path / "runs" / "first"
    if exists:
        folder.mkdir(parents=True)
    run = RunDirectory(folder, _RECIPE, resume=resume)
    assert run.path == folder
    assert json.loads((folder / "recipe.json").read_text()) == {**_RECIPE, "input_shape": [3, 8, 8]}
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]
    assert run.seconds() == {}


def test_a_run_is_continued_only_when_asked_to(tmp_path: Path):
    RunDirectory(tmp_path / "run", _RECIPE)
    before = _content(tmp_path)
    RunDirectory(tmp_path / "run", _RECIPE, resume=True)
    with pytest.raises(InputError, match=r"output folder .*run already holds a run; continue it with --resume or give"):
        RunDirectory(tmp_path / "run", _RECIPE)
    assert _content(tmp_path) == before


def test_a_run_of_other_settings_is_refused_and_they_are_named(tmp_path: Path):
    RunDirectory(tmp_path / "run", _RECIPE)
    before = _content(tmp_path)
    changed = {**_RECIPE, "epochs": 5, "budget": {"macs": "40%", "params": None}, "seed": 1}
    del changed["model"]
    with pytest.raises(InputError) as caught:
        RunDirectory(tmp_path / "run", changed, resume=True)
    words = str(caught.value)
    assert words.startswith(f"the run in {tmp_path / 'run'} was started with other settings: ")
    assert "model was 'resnet20', now None" in words
    assert "epochs was 3, now 5" in words
    assert "seed was None, now 1" in words
    assert "macs" in words and "'50%'" in words and "'40%'" in words
    assert "input_shape" not in words
    assert words.endswith("; give another folder")
    assert _content(tmp_path) == before


def test_a_folder_of_other_files_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(
            InputError, match=r"output folder .* holds files that are not of a psenet run; give an empt"
        ):
            RunDirectory(tmp_path, _RECIPE, resume=resume)
    assert _content(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("content", [b"flour, eggs", b"", b'{"epochs": ', b"\xff\xfe"])
def test_a_recipe_that_is_no_json_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(InputError, match=r"recipe.json cannot be read as JSON: "):
        RunDirectory(tmp_path, _RECIPE, resume=True)
    assert _content(tmp_path) == {"recipe.json": content}


@pytest.mark.parametrize("content", ["[1, 2]", "null", '"flour"'])
def test_a_recipe_of_something_else_is_refused(tmp_path: Path, content: str):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(InputError, match=r"recipe.json is not the recipe of a psenet run; give another folder"):
        RunDirectory(tmp_path, _RECIPE, resume=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match=r"the output folder .*run is a file; give another path"):
        RunDirectory(tmp_path / "run", _RECIPE)
    with pytest.raises(InputError, match=r"the output folder .*below cannot be written: "):
        RunDirectory(tmp_path / "run" / "below", _RECIPE)
    assert _content(tmp_path) == {"run": b"mine"}


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_get_their_folders(tmp_path: Path):
    run = RunDirectory(tmp_path / "run", _RECIPE)
    target = run.file("stages/deep/weights.safetensors")
    assert target == tmp_path / "run/stages/deep/weights.safetensors" and target.parent.is_dir()
    assert run.checkpoint("supernet") == tmp_path / "run/checkpoints/supernet.pt"
    run.checkpoint("supernet").write_bytes(b"")


def test_json_is_written_as_a_person_reads_it_and_read_back(tmp_path: Path):
    content: dict[str, Any] = {"b": [1, None], "a": {"名前": 0.1}}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": [\n    1,\n    null\n  ],\n  "a": {\n    "名前": 0.1\n  }\n}\n'
    assert read_json(tmp_path / "x.json") == content


def test_content_that_is_no_json_leaves_the_old_file(tmp_path: Path):
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"weights": object()})
    assert read_json(tmp_path / "x.json") == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere.json cannot be read as JSON"):
        read_json(tmp_path / "nowhere.json")


# Seconds --------------------------------------------------------------------------------------------------------------


def test_seconds_add_up_over_stages_and_attempts(tmp_path: Path, clock: list[float]):
    run = RunDirectory(tmp_path / "run", _RECIPE)
    with run.stage("baseline"):
        clock.append(103.5)
    with pytest.raises(KeyboardInterrupt), run.stage("supernet"):
        clock.append(110.0)
        raise KeyboardInterrupt
    assert run.seconds() == {"baseline": 3.5, "supernet": 6.5}

    clock.append(5.0)  # another process, whose clock starts elsewhere
    again = RunDirectory(tmp_path / "run", _RECIPE, resume=True)
    assert again.seconds() == {"baseline": 3.5, "supernet": 6.5}
    with again.stage("supernet"):
        clock.append(7.25)
    assert again.seconds() == {"baseline": 3.5, "supernet": 8.75}


def test_of_an_attempt_that_was_killed_the_time_until_its_last_file_counts(tmp_path: Path):
    script = f"""
import os, signal
from pathlib import Path
from psenet.rundir import RunDirectory, write_json
run = RunDirectory(Path({str(tmp_path / "run")!r}), {{}})
with run.at_work(), run.stage("supernet"):
    write_json(run.file("stages/history.json"), [])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run_script = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert run_script.returncode == -signal.SIGKILL
    begun = read_json(tmp_path / "run" / "stages.json")["supernet"]["since"]
    os.utime(tmp_path / "run" / "stages" / "history.json", (begun + 40, begun + 40))
    os.utime(tmp_path / "run" / "recipe.json", (begun + 900, begun + 900))  # the next attempt comes much later

    again = RunDirectory(tmp_path / "run", {}, resume=True)
    for _ in range(2):
        with again.at_work():
            assert again.seconds() == {"supernet": 40.0}


def test_another_run_s_seconds_are_taken_over_but_not_that_it_is_at_work(tmp_path: Path, clock: list[float]):
    source, run = RunDirectory(tmp_path / "source", _RECIPE), RunDirectory(tmp_path / "run", _RECIPE)
    with source.stage("baseline"):
        clock.append(clock[-1] + 3)
    with run.stage("search"):
        clock.append(clock[-1] + 1)
    with source.stage("search"), source.stage("supernet"):
        run.take_seconds(source.path, ("baseline", "supernet", "search"))
    assert read_json(run.path / "stages.json") == {
        "search": {"seconds": 1.0},
        "baseline": {"seconds": 3.0},
        "supernet": {"seconds": 0.0},
    }


def test_the_time_between_the_stages_belongs_to_none(tmp_path: Path, clock: list[float]):
    run = RunDirectory(tmp_path / "run", _RECIPE)
    for start in (200.0, 300.0):
        clock.append(start)
        with run.stage("finetune"):
            clock.append(start + 1)
    assert run.seconds() == {"finetune": 2.0}


# One process at a time ------------------------------------------------------------------------------------------------


def test_two_processes_are_not_at_work_in_one_folder(tmp_path: Path):
    script = f"""
from pathlib import Path
from psenet.rundir import RunDirectory
with RunDirectory(Path({str(tmp_path / "run")!r}), {{}}, resume=True).at_work():
    print("at work", flush=True)
    input()
"""
    folder = RunDirectory(tmp_path / "run", {})
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "at work\n"
        with pytest.raises(InputError, match="another process is at work in .*run: wait for its end, or end it"):
            with folder.at_work():
                pass
        other.kill()
    with folder.at_work():  # the lock of a killed process is gone
        pass
    with folder.at_work():
        pass


def test_what_killed_processes_left_half_written_is_cleared_away(tmp_path: Path):
    folder = RunDirectory(tmp_path / "run", {})
    left = folder.file("checkpoints/.baseline.pt.x1.part")
    left.write_bytes(b"half")
    with folder.at_work():
        assert not left.exists() and left.parent.exists()
