"""`psenet.prune` from end to end: what comes out, and that it is true."""

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import psenet
import psenet.result
from colours import (
    EXAMPLE,
    GROUPS,
    NUM_STEPS,
    SHAPE,
    SHORT,
    count_macs,
    count_params,
    export_weights_only,
    load_by_hand,
    make_net,
    one_thread,
    prune_net,
    read_record,
    repeatable,
    short_config,
    top1,
    unseen_images,
    validation_images,
    widths_of,
)
from psenet import Budget, PruneConfig, PruneResult, Widths
from psenet.budget import Limits, uniform_widths
from psenet.found import Evaluation, SearchResult
from psenet.models import digits_resnet

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psenet.pipeline.export_model", export_weights_only)


class _CountingLoader(DataLoader):
    """Notes at the start of every pass what the run had said last."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(unseen_images().dataset, batch_size=32)
        self.lines, self.passes = lines, list[str]()

    def __iter__(self) -> Any:
        self.passes.append(self.lines[-1] if self.lines else "")
        return super().__iter__()


@dataclass(frozen=True, kw_only=True)
class _Finished:
    result: PruneResult
    out: Path
    lines: list[str]
    passes: list[str]
    """What was said before each pass over the test data."""
    record: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> _Finished:
    """A whole run, with the real export."""
    out = tmp_path_factory.mktemp("finished") / "run"
    lines: list[str] = []
    test_loader = _CountingLoader(lines)
    result = prune_net(out, test_loader=test_loader, say=lines.append)
    return _Finished(result=result, out=out, lines=lines, passes=test_loader.passes, record=read_record(out))


def _study(run: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(run / "stages/study.journal")))
    return optuna.load_study(study_name=None, storage=storage)


# What comes out -------------------------------------------------------------------------------------------------------


def test_the_pruned_model_is_plain_and_inside_the_budget(finished: _Finished):
    model = finished.result.model
    assert type(model) is nn.Sequential and not model.training
    assert {type(module).__module__.partition(".")[0] for module in model.modules()} == {"torch"}
    assert model(torch.randn(2, *SHAPE)).shape == (2, 3)
    assert count_macs(model) <= 0.5 * count_macs(make_net())
    assert count_params(model) < count_params(make_net())


def test_every_limit_of_a_budget_is_kept(tmp_path: Path, quick_export: None):
    result = prune_net(tmp_path / "run", budget=Budget(macs="60%", params="2k"))
    for net in ("pruned", "uniform"):
        assert result.record[net]["params"] <= 2000
        assert result.record[net]["macs"] <= 0.6 * count_macs(make_net())
    assert count_params(result.model) <= 2000
    assert result.record["budget"] == {"macs": "60%", "params": "2k"}


def test_the_record_has_the_documented_structure(finished: _Finished):
    record = finished.record
    assert record == finished.result.record
    assert list(record) == [
        *("format", "model", "data", "budget", "limits", "score_name", "score_unit"),
        *("accuracy_on", "test_samples", "seed", "command", "finished_at", "versions", "hardware"),
        *("baseline", "pruned", "searched", "uniform"),
        *("widths", "searched_widths", "uniform_widths", "full_widths", "layers", "frozen"),
        *("seconds", "settings", "search", "export"),
    ]
    net = {"macs", "params", "memory", "weights_bytes", "latency_ms", "latency_quartiles_ms", "accuracy"}
    assert set(record["baseline"]) == net
    assert set(record["pruned"]) == set(record["uniform"]) == net | {"accuracy_before_finetune"}
    assert list(record["seconds"]) == ["baseline", "supernet", "search", "finetune", "total"]
    assert set(record["search"]) == {"num_evaluations", "best_score", "history", "kept"}
    assert set(record["export"]) == {
        *("bytes", "problems", "onnx_max_relative_difference", "onnx_opset", "batch_is_dynamic")
    }
    documentation = psenet.result.__doc__ or ""
    for name in [*record, *net, *record["seconds"], *record["search"], *record["export"]]:
        assert name in documentation, name


def test_the_record_says_what_was_asked_for(finished: _Finished):
    record = finished.record
    assert (record["format"], record["model"], record["data"]) == (1, "Sequential", "loaders")
    assert record["budget"] == {"macs": "50%"}
    assert record["limits"] == {"macs": count_macs(make_net()) // 2}
    assert (record["accuracy_on"], record["test_samples"]) == ("test data", 90)
    assert record["command"] is None
    assert abs(datetime.fromisoformat(record["finished_at"]) - datetime.now(UTC)) < timedelta(hours=1)
    assert record["seed"] == record["settings"]["seed"] == 0
    assert record["settings"]["finetune"]["epochs"] == 2
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["search"]["num_evaluations"] == 6
    assert record["search"]["history"] == 4 * NUM_STEPS
    assert record["full_widths"] == {"0": 16, "3": 24, "6": 16}
    seconds = dict(record["seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=0.01)
    assert record["export"]["problems"] == []
    files = {path.name: path.stat().st_size for path in (finished.out / "model").iterdir()}
    assert files == record["export"]["bytes"]
    assert set(files) == {"weights.safetensors", "widths.json", "model.pt2", "model.onnx"}


def test_a_description_names_model_and_data(tmp_path: Path, quick_export: None):
    result = prune_net(tmp_path / "run", description={"model": "my.nets:colours", "data": "paint"})
    assert (result.record["model"], result.record["data"]) == ("my.nets:colours", "paint")
    assert json.loads((tmp_path / "run/model/widths.json").read_text())["model"] == "my.nets:colours"


def test_the_costs_are_true(finished: _Finished):
    record, stages = finished.record, finished.out / "stages"
    kept = {"searched": stages / "searched.safetensors", "uniform": stages / "uniform.safetensors"}
    nets = {
        "baseline": make_net(),
        "pruned": load_by_hand(kept[record["search"]["kept"]]),
        "uniform": load_by_hand(kept["uniform"]),
    }
    for name, net in nets.items():
        assert (record[name]["macs"], record[name]["params"]) == (count_macs(net), count_params(net))
        low, high = record[name]["latency_quartiles_ms"]
        assert 0 < low <= record[name]["latency_ms"] <= high
    for widths, net in (("widths", "pruned"), ("uniform_widths", "uniform")):
        assert tuple(record[widths][group] for group in GROUPS) == widths_of(nets[net])


def test_the_layers_are_those_of_the_saved_weights(finished: _Finished):
    files = {"full": "baseline", "pruned": finished.record["search"]["kept"], "uniform": "uniform"}
    states = {net: load_file(finished.out / f"stages/{name}.safetensors") for net, name in files.items()}
    kinds = {"0": "Conv2d", "3": "Conv2d", "6": "Conv2d", "11": "Linear"}
    assert finished.record["layers"] == [
        {"name": name, "kind": kind, **{net: len(state[f"{name}.weight"]) for net, state in states.items()}}
        for name, kind in kinds.items()
    ]
    for net, name in (("baseline", "full"), ("pruned", "pruned"), ("uniform", "uniform")):
        tensors = states[name].values()
        assert finished.record[net]["weights_bytes"] == sum(len(tensor.numpy().tobytes()) for tensor in tensors)


def test_what_cannot_vary_is_named_with_its_reason(finished: _Finished):
    (head,) = [item for item in finished.record["frozen"] if item["layer"] == "11"]
    assert head["reason"] and head["macs_share"] == pytest.approx(16 * 3 / count_macs(make_net()), rel=1e-6)


def test_every_scored_candidate_is_kept_with_its_costs(finished: _Finished):
    candidates = json.loads((finished.out / "stages/evaluated.json").read_text())["candidates"]
    trials = _study(finished.out).trials
    assert [one["widths"] for one in candidates] == [trial.params for trial in trials]
    assert [one["score"] for one in candidates] == [trial.value for trial in trials]
    for one in candidates:
        net = make_net(*(one["widths"][group] for group in GROUPS))
        assert (one["macs"], one["params"]) == (count_macs(net), count_params(net))
        assert one["memory"] > 0 and "latency_ms" not in one


def test_what_was_stopped_early_is_kept_with_its_share(
    tmp_path: Path, quick_export: None, monkeypatch: pytest.MonkeyPatch
):
    # Sixty images are too few for it, as it is.
    monkeypatch.setattr("psenet.evaluate.LEAST_SEEN", 8)
    monkeypatch.setattr("psenet.evaluate.BETWEEN_LOOKS", 1)
    monkeypatch.setattr("psenet.evaluate.shuffled", functools.partial(_in_batches_of, 4))
    lines: list[str] = []
    config = short_config(num_evaluations=24, num_front_evaluations=20)
    record = prune_net(tmp_path / "run", config=config, say=lines.append).record
    candidates = json.loads((tmp_path / "run/stages/evaluated.json").read_text())["candidates"]
    trials = _study(tmp_path / "run").trials
    shares = {tuple(trial.params.values()): round(trial.user_attrs.get("psenet_share", 1), 4) for trial in trials}
    kept = {tuple(one["widths"].values()): one for one in candidates}
    assert min(shares.values()) < 0.5
    for widths, share in shares.items():
        assert kept[widths]["share"] in (share, 1)  # the search for the front may have scored it to the end
    whole = [float(trial.values[0]) for trial in trials if "psenet_share" not in trial.user_attrs]
    assert record["search"]["best_score"] == max(whole)
    num_stopped = sum(share < 1 for share in shares.values())
    assert any(line.startswith(f"{num_stopped} candidates were stopped early") for line in lines)
    prune_net(tmp_path / "other", config=replace(config, early_stopping=False, num_front_evaluations=0))
    assert all("psenet_share" not in trial.user_attrs for trial in _study(tmp_path / "other").trials)


def _in_batches_of(size: int, batches: Any, *, ignored: int) -> Any:
    return [(x[place : place + size], y[place : place + size]) for x, y in batches for place in range(0, len(x), size)]


def test_candidates_of_all_costs_are_kept_for_the_front(tmp_path: Path, quick_export: None):
    prune_net(tmp_path / "run", config=short_config(num_front_evaluations=8))
    candidates = json.loads((tmp_path / "run/stages/evaluated.json").read_text())["candidates"]
    full = count_macs(make_net())
    shares = [one["macs"] / full for one in candidates]
    assert 12 <= len(candidates) <= 14  # the best of the budget's six is scored by both searches
    assert max(shares) == 1 and min(shares) < 0.3 and sum(share <= 0.5 for share in shares) >= 6
    assert len({tuple(one["widths"].values()) for one in candidates}) == len(candidates)
    assert len(_study(tmp_path / "run").trials) == 6


def test_every_training_leaves_its_curve(finished: _Finished):
    curves = json.loads((finished.out / "stages/curves.json").read_text())
    assert set(curves) == {"baseline", "supernet", "searched", "uniform"}
    for epochs in curves.values():
        assert [(one["epoch"], one["step"]) for one in epochs] == [(0, 3), (1, 6)]


def test_what_the_prior_learned_is_kept(finished: _Finished):
    record = json.loads((finished.out / "stages/prior.json").read_text())
    assert record["groups"] == list(GROUPS) and record["versus"] == "visits"
    assert np.shape(record["keeps"]) == np.shape(record["usual"]) == (len(record["macs_shares"]), 3)


def test_a_run_ends_with_its_report(finished: _Finished):
    for name in ("report.html", "report.md"):
        text = (finished.out / name).read_text()
        assert "Pruning report: Sequential" in text
        assert f"{finished.record['pruned']['accuracy']:.2f}" in text


@pytest.mark.parametrize("error", [OSError("disk full"), KeyError("score"), ValueError("no number")])
def test_a_report_that_cannot_be_written_does_not_cost_the_run(
    error: Exception, tmp_path: Path, quick_export: None, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("psenet.pipeline.write_report", fail)
        result = prune_net(tmp_path / "run", say=lines.append)
    assert result.record == read_record(tmp_path / "run") and not (tmp_path / "run/report.html").exists()
    (line,) = [line for line in lines if line.startswith("the report could not be written: ")]
    assert type(error).__name__ in line and "the run is finished all the same" in line
    # Showing the finished run again makes up for it.
    prune_net(tmp_path / "run", resume=True)
    assert (tmp_path / "run/report.html").exists()


def test_the_accuracies_are_true(finished: _Finished):
    record = finished.record
    loaded = psenet.load(finished.out, make_net)
    uniform = load_by_hand(finished.out / "stages/uniform.safetensors")
    baseline = load_by_hand(finished.out / "stages/baseline.safetensors")
    for name, net in (("pruned", loaded), ("uniform", uniform), ("baseline", baseline)):
        assert record[name]["accuracy"] == pytest.approx(top1(net, unseen_images()), abs=1e-4)
    for key, tensor in finished.result.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])


def test_the_best_score_is_that_of_the_best_evaluation(finished: _Finished):
    study = _study(finished.out)
    assert len(study.trials) == 6
    assert finished.record["search"]["best_score"] == study.best_value
    assert study.best_params == json.loads((finished.out / "stages/search.json").read_text())["widths"]


def test_the_accuracy_before_fine_tuning_is_that_of_a_run_without_any(
    finished: _Finished, tmp_path: Path, quick_export: None
):
    result = prune_net(tmp_path / "run", config=short_config(finetune=replace(SHORT, epochs=0)))
    for net in ("pruned", "uniform"):
        assert result.record[net]["accuracy"] == result.record[net]["accuracy_before_finetune"]
    assert result.record["pruned"]["accuracy"] == pytest.approx(top1(result.model, unseen_images()), abs=1e-4)
    uniform, tuned = result.record["uniform"], finished.record["uniform"]
    assert uniform["accuracy"] == tuned["accuracy_before_finetune"]


def test_without_test_data_the_record_says_that_the_figures_are_on_validation_data(tmp_path: Path, quick_export: None):
    result = prune_net(tmp_path / "run", test_loader=None)
    assert result.record["accuracy_on"] == "validation data"
    expected = top1(result.model, validation_images())
    assert result.record["pruned"]["accuracy"] == pytest.approx(expected, abs=1e-4)


_RUN_EXPORTED = """
import sys
sys.modules["psenet"] = None
import numpy, onnxruntime, torch
folder = sys.argv[1]
x = torch.from_numpy(numpy.load(folder + "/x.npy"))
numpy.save(folder + "/pt2.npy", torch.export.load(folder + "/run/model/model.pt2").module()(x).detach().numpy())
session = onnxruntime.InferenceSession(folder + "/run/model/model.onnx", providers=["CPUExecutionProvider"])
numpy.save(folder + "/onnx.npy", session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
"""


@pytest.mark.slow
def test_the_exported_files_give_the_same_outputs_without_psenet(finished: _Finished):
    folder = finished.out.parent
    x = torch.randn(5, *SHAPE)
    np.save(folder / "x.npy", x.numpy())
    subprocess.run([sys.executable, "-I", "-c", _RUN_EXPORTED, str(folder)], check=True, cwd=folder)
    with torch.no_grad():
        expected = finished.result.model(x).numpy()
    for name in ("pt2", "onnx"):
        np.testing.assert_allclose(np.load(folder / f"{name}.npy"), expected, rtol=1e-4, atol=1e-5)


def test_the_given_model_is_not_changed(tmp_path: Path, quick_export: None):
    model = make_net().train()
    model[4].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune_net(tmp_path / "run", model=model)
    assert model.training and not model[4].training and model[0].weight.grad is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_done_is_said_in_order_with_the_expected_time(finished: _Finished):
    beginnings = [
        *("Sequential: 0.1M MACs, 0.01M parameters, 3 channel groups, reachable down to 12%", "budget: at most"),
        *("expected time: about", "training the baseline", "baseline: ", "training the supernet (parallel)"),
        *("searching, 6 candidates", "winner: score", "fine-tuning the searched net", "fine-tuning the uniform net"),
        *("fine-tuned, on validation data: ", "testing, measuring latency, exporting"),
    ]
    assert len(finished.lines) == len(beginnings)
    for line, beginning in zip(finished.lines, beginnings, strict=True):
        assert line.startswith(beginning)


def test_a_log_is_told_at_every_quarter_how_far_a_long_search_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_export: None
):
    lines: list[str] = []
    monkeypatch.setattr("psenet.stages.search._LONG_SECONDS", -1.0)
    prune_net(tmp_path / "run", config=short_config(num_evaluations=8), say=lines.append)
    told = [line for line in lines if " of 8 candidates, best score " in line]
    assert [line.partition(" ")[0] for line in told] == ["2", "4", "6", "8"]
    assert all(line.endswith(" left") for line in told)


def test_a_run_without_a_folder_goes_to_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_export: None
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = prune_net(None)
    run = result.export.paths["weights.safetensors"].parents[1]
    assert run.parent == tmp_path
    assert (run / "result.json").exists()


@pytest.mark.parametrize(
    "config",
    [
        short_config(strategy="sandwich"),
        short_config(finetune=replace(SHORT, distill_weight=0.5), supernet=replace(SHORT, distill_weight=0.5)),
        short_config(supernet=replace(SHORT, mixed_precision="bf16")),
    ],
    ids=["sandwich", "distillation", "bf16"],
)
def test_other_ways_to_train_end_inside_the_budget(tmp_path: Path, quick_export: None, config: PruneConfig):
    result = prune_net(tmp_path / "run", config=config)
    assert count_macs(result.model) <= 0.5 * count_macs(make_net())
    assert result.record["pruned"]["accuracy"] == pytest.approx(top1(result.model, unseen_images()), abs=1e-4)


# Test data ------------------------------------------------------------------------------------------------------------


def test_test_data_is_read_once_for_each_net_and_not_before_the_figures(finished: _Finished):
    # The baseline, and the pruned and the uniform net before and after fine-tuning.
    assert finished.passes == ["testing, measuring latency, exporting"] * 5


# The uniform net ------------------------------------------------------------------------------------------------------


def _spaces() -> Iterator[tuple[psenet.WidthSpace, str, str]]:
    spaces = [psenet.trace(make_net(), EXAMPLE, divisor=4), psenet.trace(digits_resnet(), torch.zeros(1, 1, 8, 8))]
    for space, resource, share in itertools.product(spaces, ("macs", "params", "memory"), (100, 80, 55, 50, 37, 30)):
        yield space, resource, f"{share}%"


def test_no_group_of_the_uniform_net_can_be_widened_within_the_budget():
    for space, resource, share in _spaces():
        limits = Budget(**{resource: share}).resolve(space)
        cost, limit = getattr(space, resource), getattr(limits, resource)
        widths = uniform_widths(space, limits)
        assert cost(widths) <= limit
        for group in space.groups:
            wider = [width for width in group.choices if width > widths[group.name]]
            if wider:
                assert cost(Widths({**widths, group.name: wider[0]})) > limit, (resource, share, group.name)
        # It holds every setting of one ratio that is inside.
        for ratio in np.linspace(0.01, 1, 67):
            setting = space.uniform(ratio)
            assert cost(setting) > limit or all(widths[name] >= setting[name] for name in setting)


def test_the_uniform_net_of_the_ends_is_the_full_and_the_smallest():
    space = psenet.trace(make_net(), EXAMPLE, divisor=4)
    assert uniform_widths(space, Limits(macs=space.macs(space.full()))) == space.full()
    assert uniform_widths(space, Limits(macs=space.macs(space.smallest()))) == space.smallest()


def test_the_uniform_net_keeps_all_limits_at_once():
    space = psenet.trace(make_net(), EXAMPLE, divisor=4)
    limits = Budget(macs="70%", params="30%", memory="60%").resolve(space)
    widths = uniform_widths(space, limits)
    assert limits.holds(space, widths)
    for group in space.groups:
        for wider in [width for width in group.choices if width > widths[group.name]][:1]:
            assert not limits.holds(space, Widths({**widths, group.name: wider}))


# Which net is kept ----------------------------------------------------------------------------------------------------

NARROW_FIRST = Widths({"0": 4, "3": 24, "6": 16})


def _found(widths: Widths) -> Callable[..., SearchResult]:
    """Stand in for `search` with one that finds these widths."""

    def search(space: psenet.WidthSpace, *_: Any, **__: Any) -> SearchResult:
        best = Evaluation(widths, 50.0, space.macs(widths), space.params(widths))
        return SearchResult(best=best, evaluated=(best,), num_failed=0, exhausted=False)

    return search


@pytest.mark.parametrize(("lead", "kept"), [(1.5, "searched"), (0.5, "uniform"), (-1.5, "uniform"), (0.0, "uniform")])
def test_the_searched_net_is_kept_if_it_leads_by_more_than_a_standard_error(
    lead: float, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_export: None
):
    monkeypatch.setattr("psenet.stages.search.search", _found(NARROW_FIRST))
    compared: list[tuple[int, int]] = []

    def difference(net: Any, other: Any, _: object) -> tuple[float, float]:
        compared.append((net[0].weight.shape[0], other[0].weight.shape[0]))
        return lead, 1.0

    monkeypatch.setattr("psenet.task.paired_difference", difference)
    lines: list[str] = []
    result = prune_net(tmp_path / "run", say=lines.append)
    record = result.record
    assert record["search"]["kept"] == kept
    assert f"{lead:+.2f} points (+- 1.00); the {kept} one is kept" in lines[-2]
    assert compared == [(NARROW_FIRST["0"], record["uniform_widths"]["0"])]
    assert record["searched_widths"] == dict(NARROW_FIRST)
    assert record["searched"]["macs"] != record["uniform"]["macs"]
    assert repeatable(record)["pruned"] == repeatable(record)[kept]
    uniform = Widths(record["uniform_widths"])
    assert uniform != NARROW_FIRST
    assert result.widths == Widths(record["widths"]) == (NARROW_FIRST if kept == "searched" else uniform)
    assert widths_of(result.model) == tuple(result.widths[group] for group in GROUPS)
    assert record["pruned"]["macs"] == count_macs(result.model)
    assert (repeatable(record)["pruned"] == repeatable(record)["uniform"]) == (kept == "uniform")
    weights = load_file(tmp_path / f"run/stages/{kept}.safetensors")
    exported = load_file(tmp_path / "run/model/weights.safetensors")
    assert all(torch.equal(weights[name], exported[name]) for name in weights)


def test_one_net_is_fine_tuned_when_the_search_returns_the_uniform_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_export: None
):
    space = psenet.trace(make_net(), EXAMPLE, divisor=4)
    uniform = uniform_widths(space, Budget(macs="50%").resolve(space))
    monkeypatch.setattr("psenet.stages.search.search", _found(uniform))
    lines: list[str] = []
    record = prune_net(tmp_path / "run", say=lines.append).record
    assert [line for line in lines if line.startswith("fine-tuning")] == ["fine-tuning the searched net"]
    assert not (tmp_path / "run/stages/uniform.safetensors").exists()
    assert record["search"]["kept"] == "searched"
    assert record["widths"] == record["uniform_widths"] == dict(uniform)
    assert repeatable(record)["pruned"] == repeatable(record)["uniform"]


def test_the_search_tries_the_uniform_widths_first(finished: _Finished):
    study = _study(finished.out)
    assert study.trials[0].params == finished.record["uniform_widths"]


# Trained models -------------------------------------------------------------------------------------------------------


def _trained_net() -> nn.Sequential:
    """Return a net of which the channels of each layer get more important from the first to the last."""
    net, scale_in = make_net(), torch.ones(3)
    torch.manual_seed(11)
    with torch.no_grad():
        for conv, norm in ((0, 1), (3, 4), (6, 7), (11, None)):
            weight: Any = net[conv].weight
            scale = torch.ones(3) if norm is None else torch.linspace(0.5, 1.5, len(weight))
            by_channel = (scale[:, None] * scale_in).view(*weight.shape[:2], *[1] * (weight.ndim - 2))
            weight.copy_(0.1 * torch.randn(weight.shape).sign() * by_channel)
            scale_in = scale
            if norm is not None:
                net[norm].load_state_dict(
                    {
                        "weight": scale,
                        "bias": torch.rand(len(scale)) - 0.3,
                        "running_mean": torch.rand(len(scale)) - 0.5,
                        "running_var": torch.rand(len(scale)) + 0.5,
                        "num_batches_tracked": torch.tensor(9),
                    }
                )
    return net.eval()


def test_a_trained_model_is_the_baseline_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_export: None
):
    trained, lines = [], []

    def noting(net: nn.Module, loader: DataLoader, **settings: Any) -> None:
        trained.append(settings["description"])
        psenet.train_model(net, loader, **settings)

    for stage in ("train", "finetune"):
        monkeypatch.setattr(f"psenet.stages.{stage}.train_model", noting)
    record = prune_net(
        tmp_path / "run", model=_trained_net(), config=short_config(trained=True), say=lines.append
    ).record
    assert trained == ["fine-tune searched", "fine-tune uniform"]
    assert "training the baseline" not in lines
    assert not any("baseline" in line for line in lines if line.startswith("expected time"))
    assert record["baseline"]["accuracy"] == pytest.approx(top1(_trained_net(), unseen_images()), abs=1e-4)
    assert record["settings"]["trained"] is True


def test_the_supernet_starts_from_the_model_with_its_channels_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_export: None
):
    starts: list[dict[str, torch.Tensor]] = []

    def noting(supernet: psenet.Supernet, loader: DataLoader, **settings: Any) -> psenet.History:
        starts.append({name: tensor.clone() for name, tensor in supernet.model.state_dict().items()})
        return psenet.train_supernet(supernet, loader, **settings)

    monkeypatch.setattr("psenet.stages.train.train_supernet", noting)
    model = _trained_net()
    prune_net(tmp_path / "run", model=model, config=short_config(trained=True))
    (start,) = starts
    for norm in ("1", "4", "7"):
        scale = model.state_dict()[f"{norm}.weight"]
        assert torch.equal(start[f"{norm}.weight"], scale.flip(0))
        assert torch.equal(start[f"{norm}.running_mean"], model.state_dict()[f"{norm}.running_mean"].flip(0))
    ordered, x = make_net().eval(), torch.randn(6, *SHAPE)
    ordered.load_state_dict(start)
    torch.testing.assert_close(ordered(x), model(x), rtol=1e-5, atol=1e-5)


# Several inputs -------------------------------------------------------------------------------------------------------


class _TwoInputs(nn.Module):
    """Reads an image and a map of depths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.depth, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, image: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.image(image) + self.depth(depth)).relu().mean((2, 3)))


class _Pairs(Dataset):
    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.images = torch.randn(size, 3, 6, 6, generator=generator)
        self.depths = torch.randn(size, 1, 6, 6, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        return (self.images[index], self.depths[index]), index % 3


def test_a_model_of_two_inputs_goes_the_whole_way(tmp_path: Path):
    model = _TwoInputs()
    train, validation = (DataLoader(_Pairs(size), batch_size=8) for size in (32, 24))
    short = psenet.TrainConfig(epochs=1)
    result = psenet.prune(
        model,
        (torch.zeros(1, 3, 6, 6), torch.zeros(1, 1, 6, 6)),
        train,
        validation,
        budget=Budget(macs="60%"),
        out=tmp_path / "run",
        config=PruneConfig(baseline=short, supernet=short, finetune=short, num_subnets=2, num_evaluations=2),
    )
    assert result.record["pruned"]["macs"] <= 0.6 * result.record["baseline"]["macs"]
    assert result.export.problems == ()
    inputs = (torch.randn(4, 3, 6, 6), torch.randn(4, 1, 6, 6))
    loaded = psenet.load(tmp_path / "run", _TwoInputs).eval()
    assert torch.equal(loaded(*inputs), result.model(*inputs))
