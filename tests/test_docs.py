"""The documentation says what is there: its code runs, its commands and links are real, the reference is complete."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from markdown.extensions.toc import slugify

import psenet
from psenet import slicing
from psenet.cli.main import app
from psenet.cli.opening import read_overrides
from psenet.models import digits_resnet
from psenet.recipe import Override, read_recipe
from psenet.tracing.rules import RULES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
READMES = [ROOT / "README.md", ROOT / "README.ja.md", ROOT / "examples" / "README.md"]
PAGES = [*READMES, *sorted(DOCS.rglob("*.md"))]
CLI: Any = typer.main.get_command(app)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def fenced(page: Path, language: str = "") -> list[str]:
    """Return the blocks of a language; those of none are what a terminal shows."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for head, code in blocks if head.partition(" ")[0] == language]


def spoken(page: Path) -> list[str]:
    """Return the code inside sentences."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(lines: list[str]) -> Iterator[list[str]]:
    """Yield the arguments of every `psenet ...` in lines of a shell."""
    for line in lines:
        for part in re.split(r"&&|\|\|", re.sub(r"\s#.*", "", line)):
            if part.strip().startswith("psenet "):
                yield shlex.split(part)[1:]


def option_names(arguments: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in arguments if word.startswith("--")}


def known_options(command: Any) -> set[str]:
    names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return names | {"--help"}


def subcommand(arguments: list[str]) -> tuple[Any, list[str]]:
    """Return what a command line calls and gives to it; global options come first and must be there."""
    while arguments and arguments[0].startswith("--"):
        assert arguments[0] in known_options(CLI), f"psenet has no option {arguments[0]}"
        arguments = arguments[1:]
    assert arguments, "no subcommand"
    if arguments[0].isupper():  # any: `psenet --debug COMMAND`
        return CLI, []
    assert arguments[0] in CLI.commands, f"psenet has no subcommand {arguments[0]!r}"
    return CLI.commands[arguments[0]], arguments[1:]


# Commands -------------------------------------------------------------------------------------------------------------


@each_page
def test_every_command_of_a_page_is_taken_by_the_command_line(page: Path):
    lines = [line for block in fenced(page) for line in block.splitlines()]
    for arguments in commands(lines):
        command, given = subcommand(arguments)
        unknown = option_names(given) - known_options(command)
        assert not unknown, f"{shlex.join(arguments)}: no option {', '.join(unknown)}"
        if "..." not in given:
            command.make_context(command.name, list(given)).close()  # what is missing or out of range is refused


@each_page
def test_every_command_in_a_sentence_has_its_options(page: Path):
    for arguments in commands([code for code in spoken(page) if code.startswith("psenet ")]):
        command, given = subcommand(arguments)
        unknown = option_names(given) - known_options(command)
        assert not unknown, f"{shlex.join(arguments)}: no option {', '.join(unknown)}"


@each_page
def test_every_option_in_a_sentence_is_one_of_a_command(page: Path):
    names = {code.split()[0].partition("=")[0] for code in spoken(page) if re.match(r"--[a-z]", code)}
    ours = set().union(*(known_options(command) for command in CLI.commands.values()), known_options(CLI))
    scripts = "".join(path.read_text() for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")])
    assert not {name for name in names - ours if f'"{name}"' not in scripts and name != "--logdir"}


@each_page
def test_every_value_that_a_command_sets_is_one_of_a_recipe(page: Path):
    lines = [line for block in fenced(page) for line in block.splitlines()]
    for arguments in commands([*lines, *(code for code in spoken(page) if code.startswith("psenet "))]):
        values = [after for word, after in zip(arguments, arguments[1:], strict=False) if word == "--set"]
        least = {"model.name": "timm:resnet18", "data.source": "photos", "budget.macs": "50%"}
        overrides = [Override(tuple(key.split(".")), value, "") for key, value in least.items()]
        read_recipe(overrides=[*overrides, *read_overrides(values)])


@each_page
def test_every_script_and_make_target_of_a_page_is_there(page: Path):
    code = "\n".join([*fenced(page), *spoken(page)])
    for script in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", code):
        assert (ROOT / script).is_file(), script
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", code, re.MULTILINE)) <= targets


@each_page
def test_every_test_that_a_page_names_is_there(page: Path):
    for file, _, name in (code.partition("::") for code in spoken(page) if code.startswith("tests/")):
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
    for script in (code for code in spoken(page) if re.fullmatch(r"(benchmarks|tools)/\S+", code)):
        assert (ROOT / script).exists(), script


def test_a_command_that_is_not_there_would_be_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("Say `psenet prune --mac 5`.\n\n```\npsenet prune --out runs/1 --no-such  # it\npsenet prun\n```\n")
    shown = list(commands([line for block in fenced(page) for line in block.splitlines()]))
    assert shown == [["prune", "--out", "runs/1", "--no-such"], ["prun"]]
    command, given = subcommand(shown[0])
    assert option_names(given) - known_options(command) == {"--no-such"}
    with pytest.raises(AssertionError, match="no subcommand 'prun'"):
        subcommand(shown[1])
    with pytest.raises(AssertionError, match="psenet prune --mac 5|--mac"):
        test_every_command_in_a_sentence_has_its_options(page)


def test_the_japanese_readme_has_the_figures_and_commands_of_the_english_one():
    english, japanese = ROOT / "README.md", ROOT / "README.ja.md"
    assert figures(japanese) == figures(english)
    shown = [list(commands("\n".join(fenced(page)).splitlines())) for page in (english, japanese)]
    assert shown[0] == shown[1]
    assert len(shown[0]) > 10


def figures(page: Path) -> list[list[str]]:
    """Return the numbers in cells of tables that begin with one, row by row, without the first column."""
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return [re.findall(r"[\d.]+", " ".join(cell for cell in row[2:] if re.match(r" \d", cell))) for row in rows]


# Links ----------------------------------------------------------------------------------------------------------------


@each_page
def test_every_internal_link_leads_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target}: there is no {place}"
        if anchor:
            assert anchor in headings(place), f"{target}: no such heading"


def headings(page: Path) -> set[str]:
    return {slugify(text, "-") for text in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)}


def test_every_page_of_the_documentation_is_in_its_table_of_contents():
    # Read as text: it is what a person edits, and the build is what checks the rest.
    named = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


# The API --------------------------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name_and_no_other():
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    named = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    assert len(named) == len(set(named))
    for name in named:
        module, _, attribute = name.rpartition(".")
        __import__(module)
        assert hasattr(sys.modules[module], attribute), name
    modules = {"training"}  # a page of its own
    covered = {name.rpartition(".")[2] for name in named}
    public = {*psenet.__all__, *psenet.training.__all__} - modules
    assert not public - covered


# Python ---------------------------------------------------------------------------------------------------------------


@each_page
def test_every_python_block_compiles(page: Path):
    for block in fenced(page, "python"):
        compile(block, str(page), "exec")


def run(page: str, namespace: dict[str, object]) -> None:
    for block in fenced(DOCS / page, "python"):
        exec(compile(block, page, "exec"), namespace)


def test_the_page_on_own_layers_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slicing, "_RESIZERS", dict(slicing._RESIZERS))
    rules = dict(RULES)
    assert len(fenced(DOCS / "own_layers.md", "python")) == 3
    try:
        run("own_layers.md", {"__name__": "own_layers"})
    finally:
        RULES.clear()
        RULES.update(rules)


def test_the_page_on_supernets_runs():
    run("concepts/supernet.md", {})


def test_the_page_on_tasks_runs():
    namespace: dict[str, Any] = {}
    run("howto/task.md", namespace)
    batches = [(torch.ones(2, 3), torch.zeros(2, 3))]
    assert namespace["task"].score(torch.nn.Identity(), batches) == -1


def test_the_programs_of_the_page_on_export_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    net, example = digits_resnet().eval(), torch.zeros(1, 1, 8, 8)
    widths = psenet.trace(net, example).full()
    psenet.export_model(net, example, tmp_path / "model", widths=widths)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["on_device.py", os.fspath(tmp_path / "model" / "model.onnx")])
    run("howto/export.md", {"__name__": "__main__"})
    with np.load("held_out.npz") as held_out, torch.no_grad():
        right = net(torch.from_numpy(held_out["images"])).argmax(1).numpy() == held_out["labels"]
    assert f"accuracy: {100 * right.mean():.2f} % of 600 images" in capsys.readouterr().out
