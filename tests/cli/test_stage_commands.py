"""`psenet train`, `search`, `finetune`, `export`, `init`, and `prune` by a recipe: the same run, stage by stage."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from commandline import Ended, psenet
from safetensors.torch import load_file

QUICK = {
    "model.name": "psenet.models:digits_resnet",
    "data.source": "digits",
    "data.max_train_images": 128,
    "budget.macs": "50%",
    **{f"{training}.epochs": 1 for training in ("baseline", "supernet", "finetune")},
    "num_evaluations": 4,
}


def _sets(values: dict[str, Any]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def _done(ended: Ended) -> str:
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def _refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.out + ended.err
    for part in words:
        assert part in ended.err
    assert "Traceback" not in ended.err


def _repeatable(run: Path) -> dict[str, Any]:
    """Return what a run found, without what a clock decides."""
    record = json.loads((run / "result.json").read_text())
    nets = {
        net: {k: v for k, v in record[net].items() if "latency" not in k} for net in ("baseline", "pruned", "uniform")
    }
    return nets | {name: record[name] for name in ("widths", "uniform_widths", "search", "settings", "budget")}


def _same_weights(one: Path, other: Path) -> bool:
    left, right = (load_file(run / "model/weights.safetensors") for run in (one, other))
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by one command."""
    run = tmp_path_factory.mktemp("whole") / "run"
    _done(psenet("prune", *_sets(QUICK), "--out", run))
    return run


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stage by stage, from a recipe that `init` wrote."""
    folder = tmp_path_factory.mktemp("staged")
    rest = {key: value for key, value in QUICK.items() if key not in ("model.name", "data.source", "budget.macs")}
    chosen = ("--model", QUICK["model.name"], "--data", "digits", "--macs", "50%", "--template", "full")
    learned = {"finetune.distill_weight": 0, "num_front_evaluations": 24}
    out = _done(psenet("init", folder / "recipe.yaml", *chosen, *_sets({**rest, **learned})))
    assert f"psenet prune --recipe {folder / 'recipe.yaml'} --dry-run" in out
    run = folder / "run"
    assert "training the supernet" in _done(psenet("train", run, "--recipe", folder / "recipe.yaml"))
    assert not (run / "stages/search.json").exists()
    assert "winner: score" in _done(psenet("search", run))
    assert not (run / "stages/searched.safetensors").exists()
    assert "fine-tuning the searched net" in _done(psenet("finetune", run))
    assert not (run / "result.json").exists()
    assert "accuracy on test data" in _done(psenet("export", run))
    return run


def test_stage_by_stage_gives_what_one_command_gives(whole: Path, staged: Path):
    assert _repeatable(whole) == _repeatable(staged)
    assert _same_weights(whole, staged)


def test_a_stage_that_is_finished_is_not_done_again(staged: Path):
    def times() -> dict[Path, int]:
        files = (path for path in staged.rglob("*") if path.is_file() and path.name != "run.log")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    for stage in ("train", "search", "finetune", "export"):
        assert f"the stage '{stage}' of this run is finished" in _done(psenet(stage, staged))
    assert times() == before


def test_the_resolved_recipe_in_a_run_repeats_it(whole: Path, tmp_path: Path):
    _done(psenet("prune", "--recipe", whole / "recipe.yaml", "--out", tmp_path / "again"))
    assert _repeatable(whole) == _repeatable(tmp_path / "again")
    assert (whole / "recipe.yaml").read_text() == (tmp_path / "again/recipe.yaml").read_text()


def test_another_budget_takes_the_supernet_over_and_gives_what_a_whole_run_gives(whole: Path, tmp_path: Path):
    out = _done(psenet("search", whole, "--macs", "30%", "--out", tmp_path / "a"))
    assert "training" not in out
    _done(psenet("finetune", tmp_path / "a"))
    _done(psenet("export", tmp_path / "a"))
    out = _done(psenet("prune", "--from", whole, "--macs", "30%", "--out", tmp_path / "b"))
    assert "training the" not in out
    _done(psenet("prune", *_sets({**QUICK, "budget.macs": "30%"}), "--out", tmp_path / "c"))
    expected = _repeatable(tmp_path / "c")
    assert expected["pruned"]["macs"] <= 0.3 * expected["baseline"]["macs"]
    for name in "ab":
        assert _repeatable(tmp_path / name) == expected
        assert _same_weights(tmp_path / name, tmp_path / "c")
        # What training took stays known.
        before, after = (json.loads((run / "stages.json").read_text()) for run in (whole, tmp_path / name))
        assert before["supernet"] == after["supernet"]


def test_what_is_taken_over_costs_no_time(whole: Path):
    out = " ".join(_done(psenet("prune", "--from", whole, "--macs", "30%", "--dry-run")).split())
    (stages,) = re.findall(r"expected time: about .*? \((.*?)\)", out)
    assert "baseline" not in stages and "supernet" not in stages
    assert "search" in stages and "finetune" in stages


@pytest.mark.parametrize("command", ["prune", "init", "train", "search", "finetune", "export", "report", "bench"])
def test_help_has_no_emoji(command: str):
    # Rich reads a word between colons as one: my.module:factory: in a help text.
    assert all(ord(letter) < 0x1F000 for letter in _done(psenet(command, "--help")))


def test_a_new_budget_stands_alone(whole: Path, tmp_path: Path):
    _done(psenet("search", whole, "--params", "60%", "--out", tmp_path / "run"))
    assert json.loads((tmp_path / "run/recipe.json").read_text())["budget"] == {"params": "60%"}


def test_a_dry_run_says_how_long_it_takes_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    out = _done(psenet("prune", *_sets(QUICK), "--out", tmp_path / "run", "--dry-run"))
    assert "expected time: about" in out and "training the baseline" not in out and "cost" not in out
    priced = _sets({**QUICK, "report.price_per_hour": 3600, "report.currency": "EUR"})
    out = _done(psenet("prune", *priced, "--dry-run"))
    assert "EUR, at 3600 an hour" in out  # a second costs one
    assert list(tmp_path.iterdir()) == []


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_stage_before_its_turn_is_refused(tmp_path: Path):
    run = tmp_path / "run"
    _done(psenet("train", run, *_sets(QUICK)))
    _refused(psenet("export", run), "has not finished its stage 'search', which comes before 'export': psenet search")
    _refused(psenet("finetune", run), "has not finished its stage 'search'")


def test_training_with_other_settings_has_another_supernet(whole: Path, tmp_path: Path):
    ended = psenet("search", whole, "--macs", "30%", "--set", "supernet.epochs=2", "--out", tmp_path / "run")
    _refused(ended, f"the supernet in {whole} was trained with other settings: settings.supernet.epochs was 1, now 2")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_trained_gives_no_supernet(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "half")
    (tmp_path / "half/stages/supernet.safetensors").unlink()
    ended = psenet("search", tmp_path / "half", "--macs", "30%", "--out", tmp_path / "run")
    _refused(ended, "has no trained supernet yet (stages/supernet.safetensors is missing)")


def test_another_budget_without_a_folder_is_refused(whole: Path):
    _refused(psenet("search", whole, "--macs", "30%"), "--out RUN")


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    for stage in ("search", "finetune", "export"):
        _refused(psenet(stage, tmp_path), f"{tmp_path} must be a run directory made by psenet")
    _refused(psenet("train", tmp_path), f"there is no run in {tmp_path}; start one: psenet train")


def test_a_run_that_is_there_keeps_its_recipe(whole: Path):
    _refused(psenet("train", whole, "--template", "pilot"), "already holds a run, with its own recipe")


def test_a_run_from_python_goes_on_from_python(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/recipe.yaml").unlink()
    _refused(psenet("search", tmp_path / "run"), "runs that were started from Python go on from Python")


def test_a_factory_that_only_a_recipe_in_a_run_names_is_not_imported(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(whole, tmp_path / "run")
    recipe = tmp_path / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("psenet.models:digits_resnet", "strange_nets:make"))
    (tmp_path / "strange_nets.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    monkeypatch.chdir(tmp_path)
    for stage in ("train", "search", "finetune", "export"):
        _refused(psenet(stage, tmp_path / "run"), "not trusted to import", "--factory strange_nets:make")
    _refused(psenet("prune", "--from", tmp_path / "run", "--out", tmp_path / "b"), "not trusted to import")
    assert not (tmp_path / "imported").exists()


def test_a_setting_without_a_value_is_named(tmp_path: Path):
    _refused(psenet("prune", "--set", "seed", "--out", tmp_path / "run"), "--set must be KEY=VALUE", "got 'seed'")
    _refused(psenet("prune", "--set", "seed=[1", "--out", tmp_path / "run"), "'[1' is no YAML value")


def test_an_option_is_named_when_its_value_is_wrong(tmp_path: Path):
    good = ("--model", "timm:resnet18", "--data", "digits", "--macs", "50%", "--out", tmp_path / "run")
    _refused(
        psenet("prune", *good, "--set", "supernet.epoch=3"), "--set supernet.epoch: there is no 'epoch'", "epochs?"
    )
    _refused(psenet("prune", *good, "--latency-engine", "tpu"), "engine must be one of eager, compile, onnxruntime")


def test_files_that_are_missing_are_all_named_before_anything_runs(tmp_path: Path):
    given = ("--model", "timm:resnet18", "--weights", tmp_path / "w.pth", "--data", tmp_path / "写真", "--macs", "50%")
    ended = psenet("prune", *given, "--out", tmp_path / "run")
    _refused(ended, f"there is no weights file {tmp_path / 'w.pth'}", f"there is no data folder '{tmp_path / '写真'}'")


def test_init_does_not_write_over_a_file(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    _refused(psenet("init", path), f"{path} is there already")
    assert path.read_text() == "mine"
    assert _done(psenet("init", path, "--force", "--latency-ms", "4ms"))
    assert "latency_ms: 4ms" in path.read_text() and "\n  macs:" not in path.read_text()


def test_init_checks_what_it_writes(tmp_path: Path):
    _refused(psenet("init", tmp_path / "r.yaml", "--macs", "none"), "the budget's macs must be a positive number")
    assert not (tmp_path / "r.yaml").exists()


def test_the_ranking_is_verified_where_asked(whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    out = _done(psenet("report", run, "--verify-ranking", "4"))
    assert "training subnet 4 of 4 alone" in out and "Kendall's tau with the accuracy of 4 subnets" in out
    ranking = json.loads((run / "stages/ranking.json").read_text())
    assert len(ranking["subnets"]) == 4
    assert "Does the supernet rank subnets rightly?" in (run / "report.md").read_text()


def test_the_report_keeps_what_the_recipe_says(tmp_path: Path):
    chosen = {**QUICK, "num_front_evaluations": 0, "report.language": "ja", "report.price_per_hour": 2.5}
    run = tmp_path / "run"
    _done(psenet("prune", *_sets(chosen), "--set", "report.currency=円", "--out", run))
    first = (run / "report.ja.md").read_text()
    assert "2.5" in first and "円" in first
    assert _done(psenet("report", run, "--requests-per-day", "1000")).count("report.ja") == 2
    assert "1,000" in (run / "report.ja.md").read_text() and "円" in (run / "report.ja.md").read_text()
