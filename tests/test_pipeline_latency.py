"""`psenet.prune` with a budget on latency, from end to end."""

import json
from pathlib import Path

import pytest

from colours import export_weights_only, one_thread, prune_net, short_config
from psenet import Budget, LatencyModel, Runner
from psenet.errors import InputError

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psenet.pipeline.export_model", export_weights_only)
    monkeypatch.setattr("psenet.latency_model.NUM_SUBNETS", {"eager": 12, "onnxruntime": 12})


def test_the_winner_is_measured_and_the_record_says_whether_it_keeps_the_budget(tmp_path: Path):
    lines: list[str] = []
    result = prune_net(tmp_path / "run", budget=Budget(latency_ms="95%"), say=lines.append)
    found = result.record["search"]["latency"]
    assert result.record["budget"] == {"latency_ms": "95%"}
    limit = 0.95 * result.space.latency_ms(result.space.full())
    assert found["keeps_budget"] == (found["measured_ms"] <= 1.02 * limit + 1e-3)
    assert found["predicted_ms"] <= found["searched_within_ms"] + 1e-4
    assert any("error at subnets left out" in line for line in lines)
    assert any(line.startswith("latency of the winner: measured") for line in lines)


def test_a_run_that_goes_on_keeps_its_latency_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    budget = Budget(latency_ms="95%")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psenet.stages.train.train_model", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_net(tmp_path / "run", budget=budget)
    before = (tmp_path / "run/stages/latency.npz").read_bytes()
    monkeypatch.setattr(LatencyModel, "measure", stop)
    prune_net(tmp_path / "run", budget=budget, resume=True)
    assert (tmp_path / "run/stages/latency.npz").read_bytes() == before


def test_a_latency_that_no_subnet_reaches_is_refused_before_training_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(InputError, match=r"latency_ms='1us' is .* cannot be reached: the smallest reachable is"):
        prune_net(tmp_path / "run", budget=Budget(latency_ms="1us"))
    assert not (tmp_path / "run").exists()


def test_a_runner_whose_device_is_missing_is_refused_before_any_work(tmp_path: Path):
    config = short_config(latency=Runner(device="cuda:77"))
    with pytest.raises(InputError, match="device 'cuda:77' is not available"):
        prune_net(tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


def test_the_engine_of_the_budget_measures_the_result_too(tmp_path: Path):
    config = short_config(latency=Runner(engine="onnxruntime", num_threads=1))
    result = prune_net(tmp_path / "run", budget=Budget(latency_ms="95%", macs="60%"), config=config)
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    expected = {"engine": "onnxruntime", "device": "cpu", "num_threads": 1, "batch_size": 1}
    assert recipe["settings"]["latency"] == expected == result.record["settings"]["latency"]
    assert result.record["pruned"]["macs"] <= 0.6 * result.record["baseline"]["macs"]
