"""What users get wrong, case by case: one screen that says what to do, the right exit code, and no traceback."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_data import DATA
from bad_input import MAX_LINES, Case, commit, message
from bad_models import MODELS
from bad_options import BUDGETS, COMMANDS, NUMBERS
from bad_recipes import RECIPES
from bad_runs import RUNS
from commandline import psenet

CASES = (*COMMANDS, *NUMBERS, *BUDGETS, *RECIPES, *DATA, *MODELS, *RUNS)
MODULES = ("nets_of_mine", "strange", "broken_nets", "leaving")
"""What cases import from their directory."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory, whose modules are forgotten afterwards."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_explained(case: Case, home: Path):
    ended = commit(case)
    assert ended.code == case.code, ended.err
    said = message(ended)
    for part in case.says:
        assert part in said
    assert "Traceback" not in ended.out + ended.err
    assert len(ended.err.splitlines()) <= MAX_LINES
    run = home / "run"
    left = {path.name for path in run.iterdir()} if run.is_dir() else set()
    assert left <= set(case.leaves)
    assert not (home / "executed").exists()


def test_every_case_is_another_one():
    assert len(CASES) >= 80
    assert sorted({case.name for case in CASES}) == sorted(case.name for case in CASES)


def test_debug_shows_the_traceback_and_keeps_message_and_exit_code(home: Path):
    mistake = ("inspect", "resnet18")
    plain, debug = psenet(*mistake), psenet("--debug", *mistake)
    assert (plain.code, debug.code) == (2, 2)
    assert debug.err.startswith("Traceback (most recent call last):")
    assert "in build_model" in debug.err and debug.err.endswith(plain.err)
