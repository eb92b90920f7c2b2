import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from commandline import Ended, psenet
from safetensors.torch import save_file
from torch import nn

from psenet.artifact import save_weights
from psenet.finished import load_run
from psenet.models import digits_resnet
from psenet.reading import trace
from psenet.supernet import Supernet

MODEL = "psenet.models:digits_resnet"
DIGITS = (MODEL, "--channels", "1", "--image-size", "8", "--num-classes", "10", "--runs", "3", "--threads", "1")
KEYS = {"engine", "device", "threads", "batch", "net", "median_ms", "quartiles_ms", "num_runs", "speed_up"}


def _refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2 and ended.out == ""
    for said in words:
        assert said in ended.err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a finished run of 7 classes has left, as far as it is read here."""
    folder = tmp_path / "[red]run"
    (folder / "stages").mkdir(parents=True)
    torch.manual_seed(0)
    net = digits_resnet(num_classes=7)
    save_file(net.state_dict(), folder / "stages" / "baseline.safetensors")
    space = trace(net, torch.zeros(1, 1, 8, 8))
    widths = space.uniform(0.5)
    save_weights(Supernet(net, space).extract(widths), folder / "model", widths=widths)
    recipe: dict[str, Any] = {"model": MODEL, "data": "digits", "input_shape": [1, 8, 8]}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "result.json").write_text(json.dumps({"format": 1, "model": MODEL}))
    return folder


def _rows(printed: str) -> list[list[str]]:
    lines = [line.strip("│┃") for line in printed.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in line.replace("┃", "│").split("│")] for line in lines]


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_model_is_measured_beside_its_uniform_subnet_by_every_engine(tmp_path: Path):
    out = tmp_path / "figures" / "bench.json"
    engines = ("--engine", "eager", "--engine", "onnxruntime", "--batch", "4")
    ended = psenet("bench", *DIGITS, "--keep", "50%", *engines, "--out", out)
    assert (ended.code, ended.err) == (0, "")
    head, *rows = _rows(ended.out)
    assert head == ["engine", "device", "threads", "batch", "net", "median", "quartiles", "speed-up"]
    expected = [
        [engine, "cpu", "1", "4", net] for engine in ("eager", "onnxruntime") for net in ("baseline", "uniform 50%")
    ]
    assert [row[:5] for row in rows] == expected
    record = json.loads(out.read_text())
    assert (record["format"], record["model"], record["input_shape"]) == (1, MODEL, [1, 8, 8])
    assert record["versions"]["onnxruntime"] == onnxruntime.__version__
    for shown, measured in zip(rows, record["measurements"], strict=True):
        assert set(measured) == KEYS and measured["num_runs"] == 3
        low, high = measured["quartiles_ms"]
        assert 0 < low <= measured["median_ms"] <= high
        assert shown[5:] == [
            f"{measured['median_ms']:.3f} ms",
            f"{low:.3f}-{high:.3f} ms",
            f"{measured['speed_up']:.2f}x",
        ]
    for base, subnet in zip(record["measurements"][::2], record["measurements"][1::2], strict=True):
        assert base["speed_up"] == 1.0
        assert subnet["speed_up"] == pytest.approx(base["median_ms"] / subnet["median_ms"], rel=1e-2)


def test_a_model_alone_is_measured_eagerly_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ended = psenet("bench", *DIGITS)
    assert (ended.code, ended.err) == (0, "")
    assert [row[:5] for row in _rows(ended.out)[1:]] == [["eager", "cpu", "1", "1", "baseline"]]
    ended = psenet("bench", *DIGITS, "--batch", "2", "--batch", "8", "--batch", "2")
    assert [row[:5] for row in _rows(ended.out)[1:]] == [["eager", "cpu", "1", batch, "baseline"] for batch in "28"]
    assert "psenet.models:digits_resnet, input 1 x 8 x 8" in ended.out
    assert list(tmp_path.iterdir()) == []


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_s_baseline_is_measured_against_its_pruned_net(run: Path):
    ended = psenet("bench", run, "--runs", "3")
    assert (ended.code, ended.err) == (0, "")
    assert [row[4] for row in _rows(ended.out)[1:]] == ["baseline", "pruned"]
    record = json.loads((run / "bench.json").read_text())
    assert [measured["net"] for measured in record["measurements"]] == ["baseline", "pruned"]
    assert ended.out.splitlines()[-1] == f"figures: {run / 'bench.json'}"


def test_the_nets_of_a_run_are_those_that_were_saved(run: Path):
    opened = load_run(run)
    x_BCHW = torch.randn(2, 1, 8, 8)
    torch.manual_seed(0)
    net = digits_resnet(num_classes=7).eval()
    space = trace(net, x_BCHW)
    pruned = Supernet(net, space).extract(space.uniform(0.5)).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened.baseline(x_BCHW), net(x_BCHW))
        torch.testing.assert_close(opened.pruned(x_BCHW), pruned(x_BCHW))
    assert opened.input_shape == (1, 8, 8)


def test_figures_of_a_run_go_elsewhere_where_asked(run: Path, tmp_path: Path):
    ended = psenet("bench", run, "--runs", "3", "--out", tmp_path / "here.json")
    assert ended.code == 0
    assert (tmp_path / "here.json").exists() and not (run / "bench.json").exists()


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_missing_run_is_named():
    _refused(psenet("bench", "runs/none"), "there is no run directory 'runs/none'; a model is timm:NAME")


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    _refused(psenet("bench", tmp_path), f"{tmp_path} must be a run directory made by psenet prune")


def test_an_unfinished_run_is_named(run: Path):
    (run / "result.json").unlink()
    _refused(psenet("bench", run), f"the run in {run} is not finished", "continue it with psenet prune ... --resume")


def test_a_run_of_a_model_without_a_name_is_refused(run: Path):
    (run / "recipe.json").write_text(json.dumps({"model": "SmallResNet", "input_shape": [1, 8, 8]}))
    _refused(psenet("bench", run), "must have a name to be built by", "its recipe has 'SmallResNet'")


def test_a_run_of_a_model_with_several_inputs_is_refused(run: Path):
    (run / "recipe.json").write_text(json.dumps({"model": MODEL, "input_shape": [[1, 8, 8], [4]]}))
    _refused(psenet("bench", run), "must be of a model with one input")


def test_a_run_whose_weights_are_damaged_is_named(run: Path):
    (run / "stages" / "baseline.safetensors").write_bytes(b"nothing")
    _refused(psenet("bench", run), "baseline.safetensors is damaged (its header is longer than the file)")


def test_a_run_of_another_architecture_is_refused(run: Path):
    save_file(nn.Linear(2, 3).state_dict(), run / "stages" / "baseline.safetensors")
    _refused(psenet("bench", run), f"{MODEL} does not build the model that this run pruned")


def test_options_of_models_are_refused_for_a_run(run: Path):
    _refused(psenet("bench", run, "--keep", "50%", "--channels", "3"), "--keep, --in-channels: for models only")


@pytest.mark.parametrize("engine", ["tensorrt", ""])
def test_an_unknown_engine_is_named(engine: str):
    _refused(
        psenet("bench", *DIGITS, "--engine", engine),
        f"engine must be one of eager, compile, onnxruntime; got '{engine}'",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_cuda_device_is_named_before_any_work():
    _refused(psenet("bench", *DIGITS, "--device", "cuda"), "device 'cuda' is not available: torch sees 0 CUDA devices")
    onnx = psenet("bench", *DIGITS, "--device", "cuda", "--engine", "onnxruntime")
    _refused(onnx, "needs its CUDAExecutionProvider; this installation has ")


@pytest.mark.parametrize("keep", ["0", "half", "150%", "-10%", "nan", "%"])
def test_a_keep_ratio_that_is_none_is_named(keep: str):
    _refused(psenet("bench", *DIGITS, f"--keep={keep}"), "--keep must be a share of the channels", f"got '{keep}'")


@pytest.mark.parametrize(("option", "value"), [("--runs", "2"), ("--batch", "0"), ("--threads", "0")])
def test_a_number_that_is_too_small_is_named(option: str, value: str):
    _refused(psenet("bench", MODEL, option, value), f"Invalid value for '{option}'")


def test_a_factory_that_only_the_recipe_names_is_not_imported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    recipe = json.loads((copied / "recipe.json").read_text()) | {"model": "strange_nets:make"}
    (copied / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "strange_nets.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\nfrom psenet.models import digits_resnet as make\n"
    )
    monkeypatch.chdir(tmp_path)
    ended = psenet("bench", copied, "--runs", "3")
    assert ended.code == 2 and "not trusted to import" in ended.err and "--factory strange_nets:make" in ended.err
    assert not (tmp_path / "imported").exists()
    assert psenet("bench", copied, "--runs", "3", "--factory", "strange_nets:make").code == 0
    assert (tmp_path / "imported").exists()
