"""`psenet.prune` interrupted, resumed, diverged and refused."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from colours import (
    BATCH_SIZE,
    NUM_STEPS,
    NUM_TRAIN,
    SHORT,
    Colours,
    assert_same_run,
    export_weights_only,
    one_thread,
    prune_net,
    short_config,
    train_images,
)
from psenet import Budget, InputError
from psenet.training import TrainingDivergedError

NOTHING = DataLoader(Colours(0, seed=0))

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psenet.pipeline.export_model", export_weights_only)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psenet.pipeline.export_model", export_weights_only)
        prune_net(run)
    return run


# Interruption and resuming --------------------------------------------------------------------------------------------


@contextmanager
def _interrupted_at(place: str, call: int) -> Iterator[None]:
    """Raise KeyboardInterrupt in place of the `call`-th call of a function, named by its path."""
    left = itertools.count(1)
    module_name, _, name = place.rpartition(".")
    original = getattr(sys.modules[module_name], name)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if next(left) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module_name}.{name}", interrupt)
        yield


_PLACES = {
    # In the middle of a training's second epoch.
    "baseline": ("psenet.training.plain.mixed_loss", 5),
    "supernet": ("psenet.training.steps.mixed_loss", 5),
    "fine-tuning of the searched net": ("psenet.training.plain.mixed_loss", NUM_STEPS + 5),
    "fine-tuning of the uniform net": ("psenet.training.plain.mixed_loss", 2 * NUM_STEPS + 5),
    # In the first epoch, before there is a checkpoint.
    "start of the baseline": ("psenet.training.plain.mixed_loss", 2),
    "start of the supernet": ("psenet.training.steps.mixed_loss", 2),
    # One score is asked for each candidate.
    "search": ("psenet.scoring.scored", 4),
    "choice": ("psenet.task.paired_difference", 1),
    # Between a stage's work and its result.
    "writing the baseline": ("psenet.rundir.write_weights", 1),
    "writing the supernet": ("psenet.rundir.write_weights", 2),
    "writing the searched net": ("psenet.rundir.write_weights", 3),
    "writing the winner": ("psenet.stages.search.write_json", 1),
    "latency": ("psenet.stages.figures.measure_latency", 1),
    "test": ("psenet.stages.figures.net_record", 2),
    "export": ("psenet.pipeline.export_model", 1),
    "writing the result": ("psenet.pipeline.write_json", 1),
}


@pytest.mark.parametrize("stage", _PLACES)
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(
    stage: str, undisturbed: Path, tmp_path: Path, quick_export: None
):
    run = tmp_path / "run"
    with _interrupted_at(*_PLACES[stage]), pytest.raises(KeyboardInterrupt):
        prune_net(run)
    assert not (run / "result.json").exists()
    torch.manual_seed(99)  # a new program has another random state
    prune_net(run, resume=True)
    assert_same_run(run, undisturbed)


def test_a_run_that_was_interrupted_again_and_again_ends_as_if_it_had_not_been(
    undisturbed: Path, tmp_path: Path, quick_export: None
):
    run = tmp_path / "run"
    for place, call in (
        ("psenet.training.plain.mixed_loss", 4),
        ("psenet.training.plain.mixed_loss", 3),
        ("psenet.training.steps.mixed_loss", 5),
        ("psenet.scoring.scored", 2),
        ("psenet.scoring.scored", 3),
        ("psenet.training.plain.mixed_loss", 5),
        ("psenet.training.plain.mixed_loss", 6),
        ("psenet.pipeline.export_model", 1),
    ):
        with _interrupted_at(place, call), pytest.raises(KeyboardInterrupt):
            prune_net(run, resume=True)
    prune_net(run, resume=True)
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_an_interrupted_export_is_made_again(undisturbed: Path, tmp_path: Path):
    run = tmp_path / "run"
    with _interrupted_at("psenet.export._convert", 1), pytest.raises(KeyboardInterrupt):
        prune_net(run)
    assert not (run / "model/model.onnx").exists()
    prune_net(run, resume=True)
    assert_same_run(run, undisturbed)
    assert {path.name for path in (run / "model").iterdir()} == {
        *("weights.safetensors", "widths.json", "model.pt2", "model.onnx")
    }


def test_the_seconds_of_all_attempts_are_counted(tmp_path: Path, quick_export: None):
    run = tmp_path / "run"
    with _interrupted_at("psenet.training.plain.mixed_loss", 5), pytest.raises(KeyboardInterrupt):
        prune_net(run)
    stages = json.loads((run / "stages.json").read_text())
    stages["baseline"]["seconds"] += 1000
    (run / "stages.json").write_text(json.dumps(stages))
    seconds = prune_net(run, resume=True).record["seconds"]
    assert 1000 < seconds["baseline"] < seconds["total"] < 1100


def test_a_finished_run_is_shown_again_without_training(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_export: None
):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to train")

    run, lines = tmp_path / "run", []
    first = prune_net(run)
    for name in ("train_model", "train_supernet", "order_channels"):
        monkeypatch.setattr(f"psenet.stages.train.{name}", refuse)
    monkeypatch.setattr("psenet.evaluate.SupernetScore.__call__", refuse)
    monkeypatch.setattr("psenet.task.accuracy", refuse)  # test data is used once
    monkeypatch.setattr("psenet.stages.figures.measure_latency", refuse)
    before = (run / "result.json").read_bytes()
    again = prune_net(run, resume=True, say=lines.append)
    assert (run / "result.json").read_bytes() == before and dict(again.record) == json.loads(before)
    assert lines == ["this run is finished; its figures are shown again"]
    assert_same_run(run, undisturbed)
    assert again.export.bytes == first.export.bytes and again.export.problems == first.export.problems


def test_resuming_starts_a_run_that_is_not_there(undisturbed: Path, tmp_path: Path, quick_export: None):
    prune_net(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", undisturbed)


def test_one_seed_gives_one_result_whatever_was_drawn_before(tmp_path: Path, quick_export: None):
    """Also with a loader that shuffles by torch's global generator, and with a loader that was used before."""
    seeded, unseeded = train_images(), train_images(seeded=False)
    for number, loader in enumerate((seeded, seeded, unseeded, unseeded)):
        torch.manual_seed(number)
        prune_net(tmp_path / str(number), train_loader=loader)
    assert_same_run(tmp_path / "0", tmp_path / "1")
    assert_same_run(tmp_path / "2", tmp_path / "3")


def test_another_seed_gives_another_result(undisturbed: Path, tmp_path: Path, quick_export: None):
    prune_net(tmp_path / "run", config=short_config(seed=1))
    ours, theirs = (load_file(run / "stages/baseline.safetensors") for run in (tmp_path / "run", undisturbed))
    assert not torch.equal(ours["0.weight"], theirs["0.weight"])


def _cut_off(content: bytes) -> bytes:
    return content[:200]


def _with_a_flipped_bit(content: bytes) -> bytes:
    return content[:-50] + bytes([content[-50] ^ 8]) + content[-49:]


@pytest.mark.parametrize("damage", [_cut_off, _with_a_flipped_bit])
def test_a_damaged_stage_is_named_and_made_again_once_it_is_deleted(
    damage: Callable[[bytes], bytes], undisturbed: Path, tmp_path: Path, quick_export: None
):
    run = tmp_path / "run"
    prune_net(run)
    for name in ("baseline", "supernet", "searched", "uniform"):
        (run / "result.json").unlink()  # a finished run reads no stage again
        path = run / f"stages/{name}.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        words = rf"{name}\.safetensors is damaged \(.*\): delete it and resume to make it again"
        with pytest.raises(InputError, match=words):
            prune_net(run, resume=True)
        path.unlink()
        prune_net(run, resume=True)
        assert_same_run(run, undisturbed)


# Diverging ------------------------------------------------------------------------------------------------------------


def test_a_run_that_diverged_keeps_its_last_good_epoch_and_can_be_resumed(
    undisturbed: Path, tmp_path: Path, quick_export: None
):
    run, loader = tmp_path / "run", train_images()
    dataset: Any = loader.dataset
    # Read before the second epoch: all for calibration, a batch for the time estimate, and the first epoch.
    dataset.spoil_from = NUM_TRAIN + BATCH_SIZE + NUM_TRAIN
    with pytest.raises(TrainingDivergedError, match=r"lower the learning rate .* is kept in .*baseline\.pt"):
        prune_net(run, train_loader=loader)
    checkpoint = torch.load(run / "checkpoints/baseline.pt", weights_only=True)
    assert checkpoint["position"]["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint["module"].values())
    prune_net(run, resume=True)
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize(("stage", "kept"), [("baseline", []), ("supernet", ["baseline"]), ("finetune", ["supernet"])])
def test_a_learning_rate_far_too_high_is_said_and_earlier_stages_are_kept(
    stage: str, kept: list[str], tmp_path: Path, quick_export: None
):
    config = short_config(**{stage: replace(SHORT, learning_rate=1e9)})
    for resume in (False, True):
        with pytest.raises(TrainingDivergedError, match=": lower the learning rate or check the data; "):
            prune_net(tmp_path / "run", config=config, resume=resume)
    for name in kept:
        assert (tmp_path / f"run/stages/{name}.safetensors").exists()


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(undisturbed: Path):
    before = (undisturbed / "result.json").read_bytes()
    with pytest.raises(InputError, match="already holds a run; continue it with --resume or give another folder"):
        prune_net(undisturbed)
    assert (undisturbed / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": short_config(seed=1)}, "settings: settings.seed was 0, now 1; give another folder"),
        (
            {"config": short_config(finetune=replace(SHORT, epochs=3), num_evaluations=7)},
            "settings: settings.num_evaluations was 6, now 7; settings.finetune.epochs was 2, now 3; give",
        ),
        ({"budget": Budget(macs="60%")}, "settings: budget.macs was '50%', now '60%'; give"),
        ({"budget": Budget(macs="50%", params="50%")}, "settings: budget.params was None, now '50%'; give"),
        ({"description": {"data": "paint"}}, "settings: data was 'loaders', now 'paint'; give"),
        (
            {"train_loader": train_images(batch_size=48)},
            "settings: batch_size was 32, now 48; batches.train was 3, now 2; give",
        ),
        ({"test_loader": None}, "settings: batches.test was 3, now None; give"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_names_them(
    changes: dict[str, Any], message: str, undisturbed: Path
):
    before = (undisturbed / "result.json").read_bytes()
    with pytest.raises(InputError) as caught:
        prune_net(undisturbed, resume=True, **changes)
    assert message in str(caught.value)
    assert (undisturbed / "result.json").read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused(resume: bool, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds files that are not of a psenet run; give an empty one"):
        prune_net(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_will_do(undisturbed: Path, tmp_path: Path, quick_export: None):
    prune_net(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="run is a file; give another path"):
        prune_net(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written"):
        prune_net(tmp_path / "run" / "below")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": Budget(macs="5%")},
            r"macs='5%' is \d+ and cannot be reached: the smallest reachable is \d+ .*Raise the limit",
        ),
        ({"budget": Budget(macs="1G")}, "macs='1G' is above the full model's .*nothing to prune"),
        (
            {"config": short_config(strategy="bilaterol")},
            r"unknown strategy 'bilaterol'; there are \['bilateral', 'parallel', 'sandwich'",
        ),
        pytest.param(
            {"config": short_config(supernet=replace(SHORT, mixed_precision="fp16"))},
            "mixed_precision='fp16' is not possible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it"),
        ),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 3))}, "no width that could vary. What froze it: 1: "),
        ({"model": nn.Sequential(nn.Conv2d(1, 8, 3))}, r"the model refuses an input of shape \(1, 3, 8, 8\)"),
        ({"train_loader": NOTHING}, "the train loader has no batches"),
        ({"val_loader": NOTHING}, "the validation loader has no batches"),
        ({"test_loader": NOTHING}, "the test loader has no batches"),
        ({"calibration_loader": NOTHING}, "the calibration loader has no batches"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work_and_leaves_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    lines: list[str] = []
    with pytest.raises(InputError, match=message):
        prune_net(tmp_path / "run", say=lines.append, **changes)
    assert lines == []
    assert not (tmp_path / "run").exists()


def test_after_a_refused_budget_the_corrected_one_works_in_the_same_folder(
    undisturbed: Path, tmp_path: Path, quick_export: None
):
    for budget in (Budget(macs="5%"), Budget(params="1")):
        with pytest.raises(InputError, match="cannot be reached"):
            prune_net(tmp_path / "run", budget=budget)
    prune_net(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)
