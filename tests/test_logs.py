"""TensorBoard logs, read back by TensorBoard itself and compared with what the run keeps elsewhere."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import psenet
from colours import NUM_STEPS, NUM_TRAIN, export_weights_only, make_net, one_thread, prune_net, short_config
from psenet import Widths
from psenet.errors import InputError
from psenet.found import Evaluation, SearchProgress
from psenet.logs import Logs, check_tensorboard
from psenet.stages.run import _samples_in_epoch
from psenet.training import EpochRecord
from psenet.training.checkpoint import Checkpoint, Position

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
CONFIG = short_config(tensorboard=True)


@pytest.fixture(scope="module", autouse=True)
def _quick_export():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psenet.pipeline.export_model", export_weights_only)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with logs."""
    out = tmp_path_factory.mktemp("logged") / "run"
    prune_net(out, config=CONFIG)
    return out


def _curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return the steps and values of a curve as TensorBoard shows them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _kept(run: Path, training: str, field: str) -> list[tuple[int, float]]:
    epochs = json.loads((run / "stages/curves.json").read_text())[training]
    return [(epoch["epoch"] + 1, epoch[field]) for epoch in epochs]


def _hide_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


# A run's logs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ["baseline", "supernet", "searched", "uniform"])
def test_the_curves_of_a_training_are_those_that_the_run_keeps(run: Path, training: str):
    folder = run / "logs" / training
    for tag, field in (("loss", "loss"), ("learning rate", "learning_rate"), ("seconds", "seconds")):
        shown, kept = _curve(folder, f"epoch/{tag}"), _kept(run, training, field)
        assert [step for step, _ in shown] == [step for step, _ in kept] == [1, 2]
        assert [value for _, value in shown] == pytest.approx([value for _, value in kept])
    speeds = [value for _, value in _curve(folder, "epoch/samples per second")]
    assert speeds == pytest.approx([NUM_TRAIN / seconds for _, seconds in _kept(run, training, "seconds")])


def test_the_candidates_of_the_search_are_those_of_the_study(run: Path):
    storage = JournalStorage(JournalFileBackend(str(run / "stages/study.journal")))
    trials = optuna.load_study(study_name="psenet", storage=storage).trials
    scores = [trial.value for trial in trials if trial.value is not None]
    folder = run / "logs" / "search"
    shown = _curve(folder, "candidate/score")
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown] == pytest.approx(scores)
    best = [value for _, value in _curve(folder, "candidate/best score")]
    assert best == pytest.approx(np.maximum.accumulate(scores))
    space = psenet.trace(make_net(), torch.zeros(1, 3, 8, 8), divisor=4)
    macs = [space.macs(Widths(trial.params)) for trial in trials]
    assert [value for _, value in _curve(folder, "candidate/MACs")] == macs


def test_the_spread_of_the_subnets_is_that_of_the_history(run: Path):
    with np.load(run / "stages/history.npz") as history:
        steps, losses = history["steps"], history["losses"]
    for tag, share in (("10 % are below", 10), ("median", 50), ("10 % are above", 90)):
        expected = [np.percentile(losses[(steps >= at) & (steps < at + 3)], share) for at in range(0, NUM_STEPS, 3)]
        shown = _curve(run / "logs" / "subnets", f"loss of a subnet/{tag}")
        assert shown == [(1, pytest.approx(expected[0])), (2, pytest.approx(expected[1]))]


def test_the_page_on_tracking_opens_the_study(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/tracking.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "tracking.md", "exec"), names)
    scores = [value for _, value in _curve(run / "logs/search", "candidate/score")]
    assert [value for _, value, _ in names["table"]] == pytest.approx(scores)
    for path in (run / "logs").iterdir():
        assert f"`{path.name}`" in page


def test_logs_change_nothing_of_the_run_and_may_begin_when_it_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("psenet.pipeline.search_best", _stop)
        with pytest.raises(KeyboardInterrupt):
            prune_net(out, config=short_config())
    assert not (out / "logs").exists()
    prune_net(out, config=CONFIG, resume=True)
    assert {path.name for path in (out / "logs").iterdir()} == {"search", "searched", "uniform"}
    assert (out / "recipe.json").read_bytes() == (run / "recipe.json").read_bytes()
    records = [json.loads((folder / "result.json").read_text()) for folder in (out, run)]
    assert records[0]["widths"] == records[1]["widths"]
    assert records[0]["pruned"]["accuracy"] == records[1]["pruned"]["accuracy"]


def _stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stopped_at", [1, 2, 3, 4])
def test_a_run_that_goes_on_shows_no_step_twice(stopped_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped after an epoch was told and before it was kept, so that it is told again."""
    out, kept, save = tmp_path / "run", [0], Checkpoint.save

    def stop_once(self: Any, position: Position) -> None:
        kept[0] += 1
        if kept[0] == stopped_at:
            raise KeyboardInterrupt
        save(self, position)

    monkeypatch.setattr(Checkpoint, "save", stop_once)
    with pytest.raises(KeyboardInterrupt):
        prune_net(out, config=CONFIG)
    prune_net(out, config=CONFIG, resume=True)
    for training in ("baseline", "supernet"):
        shown = _curve(out / "logs" / training, "epoch/loss")
        assert shown == [(step, pytest.approx(loss)) for step, loss in _kept(out, training, "loss")]
        assert [step for step, _ in shown] == [1, 2]


def test_a_search_that_goes_on_shows_no_candidate_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, told, candidate = tmp_path / "run", [0], Logs.candidate

    def stop_once(self: Logs, state: SearchProgress) -> None:
        candidate(self, state)
        told[0] += 1
        if told[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Logs, "candidate", stop_once)
    with pytest.raises(KeyboardInterrupt):
        prune_net(out, config=CONFIG)
    prune_net(out, config=CONFIG, resume=True)
    assert [step for step, _ in _curve(out / "logs/search", "candidate/score")] == [1, 2, 3, 4, 5, 6]


# Single logs ----------------------------------------------------------------------------------------------------------


def _epoch(number: int, loss: float) -> EpochRecord:
    return EpochRecord(epoch=number, step=10 * number + 10, loss=loss, learning_rate=0.1, seconds=2.0)


def test_an_epoch_that_is_told_again_replaces_what_was_told_of_it(tmp_path: Path):
    for epochs in ([(0, 3.0), (1, 2.0), (2, 1.5)], [(1, 2.25), (2, 1.75), (3, 1.0)]):
        logs = Logs(tmp_path)
        record = logs.recorder("baseline", num_samples=None)
        for number, loss in epochs:
            record(_epoch(number, loss))
        logs.close()
    assert _curve(tmp_path / "baseline", "epoch/loss") == [(1, 3.0), (2, 2.25), (3, 1.75), (4, 1.0)]


def test_what_is_told_is_on_the_disk_before_the_logs_are_closed(tmp_path: Path):
    logs = Logs(tmp_path)
    logs.recorder("baseline", num_samples=50)(_epoch(0, 3.0))
    assert _curve(tmp_path / "baseline", "epoch/samples per second") == [(1, 25.0)]
    logs.close()


def test_candidates_count_on_where_a_tighter_search_begins_and_one_without_a_score_is_left_out(tmp_path: Path):
    logs = Logs(tmp_path)
    for num_done, score in ((1, 50.0), (2, 70.0), (2, None), (1, 60.0), (2, 65.0)):
        last = None if score is None else Evaluation(Widths({"0": 8}), score, 1000, 100)
        logs.candidate(SearchProgress(num_done=num_done, num_evaluations=9, last=last, best=last))
    logs.close()
    expected = [(1, 50.0), (2, 70.0), (3, 60.0), (4, 65.0)]
    assert _curve(tmp_path / "search", "candidate/score") == expected


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"batch_size": 4}, 10),
        ({"batch_size": 4, "drop_last": True}, 8),
        ({"batch_size": 4, "sampler": [1, 2, 3, 4, 5]}, 5),
        ({"batch_sampler": [[0, 1], [2, 3, 4]]}, None),
    ],
)
def test_the_samples_of_an_epoch_are_counted_as_they_come(options: dict[str, Any], number: int | None):
    loader = DataLoader(list(range(10)), **options)  # pyright: ignore[reportArgumentType]
    assert _samples_in_epoch(loader) == number
    assert number is None or number == sum(len(batch) for batch in loader)


# Without TensorBoard --------------------------------------------------------------------------------------------------


def test_a_missing_tensorboard_is_named_before_any_time_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _hide_tensorboard(monkeypatch)
    monkeypatch.setattr("psenet.stages.start.trace", _stop)
    message = r"logs need the package tensorboard \(ModuleNotFoundError: .*pip install 'psenet\[tensorboard\]'"
    with pytest.raises(InputError, match=message):
        check_tensorboard()
    with pytest.raises(InputError, match=message):
        prune_net(tmp_path / "run", config=CONFIG)
    assert not (tmp_path / "run").exists()


def test_a_run_without_logs_needs_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _hide_tensorboard(monkeypatch)
    prune_net(tmp_path / "run")
    assert (tmp_path / "run/result.json").exists() and not (tmp_path / "run/logs").exists()
