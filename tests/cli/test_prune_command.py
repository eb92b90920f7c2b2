import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import Ended, psenet, row
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from psenet import Budget, PruneConfig, load
from psenet.data import load_data
from psenet.models import digits_resnet
from psenet.stages.start import Job

MODEL = "psenet.models:digits_resnet"
# A name that would be a style in rich's markup, and that is longer than a line.
RUN = "[red]run" + 160 * "-"
SHORT = "--baseline-epochs 1 --supernet-epochs 1 --finetune-epochs 1 --evaluations 4 --max-train-images 256".split()
SHORT += "--batch-size 64 --num-subnets 4 --baseline-lr 0.05 --seed 3".split()


@dataclass(frozen=True, kw_only=True)
class _Run:
    arguments: list[str]
    out: Path
    ended: Ended

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.out / "result.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> _Run:
    """A finished run on digits."""
    out = tmp_path_factory.mktemp("runs") / RUN
    arguments = ["prune", "--model", MODEL, "--data", "digits", "--macs", "50%", "--out", str(out), *SHORT]
    return _Run(arguments=arguments, out=out, ended=psenet(*arguments))


def _digits_costs() -> tuple[int, int]:
    model = digits_resnet().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    return counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters())


# What is printed ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_says_what_it_does_and_how_long_it_will_take(run: _Run):
    assert (run.ended.code, run.ended.err) == (0, "")
    macs, params = _digits_costs()
    expected = [
        "loading digits",
        "images: 256 train, 100 calibration, 250 validation, 600 test",
        f"{MODEL}: {macs / 1e6:.1f}M MACs, {params / 1e6:.2f}M parameters, 6 channel groups, reachable down to ",
        f"budget: at most {macs // 2 / 1e6:.4g}M MACs (50.0 % of the full model)",
        "expected time: about ",
        "training the baseline",
        "baseline: ",
        "training the supernet (parallel)",
        "searching, 4 candidates",
        "scoring 24 candidates over all costs, for the Pareto front",
        "winner: score ",
        "fine-tuning the searched net",
        "fine-tuned, on validation data: ",
        "testing, measuring latency, exporting",
    ]
    lines = run.ended.out.splitlines()
    places = [next(place for place, line in enumerate(lines) if line.startswith(words)) for words in expected]
    assert places == sorted(places)


def test_the_table_shows_the_figures_of_the_record(run: _Run):
    record, out = run.record, run.ended.out
    nets = [record[name] for name in ("baseline", "pruned", "uniform")]
    assert row(out, "") == ["baseline", "pruned", "uniform"]
    macs, params = _digits_costs()
    assert (nets[0]["macs"], nets[0]["params"]) == (macs, params)
    assert nets[1]["macs"] <= macs // 2
    assert row(out, "MACs") == [f"{net['macs'] / 1e6:.3g} M ({net['macs'] / macs:.0%})" for net in nets]
    assert row(out, "FLOPs") == [f"{2 * net['macs'] / 1e6:.3g} M" for net in nets]
    assert row(out, "parameters") == [f"{net['params'] / 1e3:.3g} k ({net['params'] / params:.0%})" for net in nets]
    assert row(out, "latency, batch 1") == [f"{net['latency_ms']:.2f} ms" for net in nets]
    assert row(out, "accuracy on test data") == [f"{net['accuracy']:.2f} %" for net in nets]
    assert f"{MODEL} on digits" in out


def test_the_last_lines_say_where_report_figures_and_model_are(run: _Run):
    *_, report, figures, model = run.ended.out.splitlines()
    assert report == f"report:  {run.out / 'report.html'}" and (run.out / "report.html").is_file()
    assert figures == f"figures: {run.out / 'result.json'}"
    assert model == f"model:   {run.out / 'model'}"
    assert {path.name for path in (run.out / "model").iterdir()} == set(run.record["export"]["bytes"])
    assert len(run.record["export"]["bytes"]) == 4


def test_the_record_names_what_was_asked_for(run: _Run):
    record = run.record
    assert (record["model"], record["data"], record["budget"]) == (MODEL, "digits", {"macs": "50%"})
    assert record["seed"] == 3
    assert shlex.split(record["command"]) == ["psenet", *run.arguments]
    assert record["settings"]["baseline"]["learning_rate"] == 0.05
    assert record["settings"]["num_evaluations"] == record["search"]["num_evaluations"] == 4


def test_the_accuracy_in_the_record_is_that_of_the_saved_model(run: _Run):
    net = load(run.out, digits_resnet).eval()
    unseen: Any = load_data("digits", seed=3).test
    images_BCHW = torch.stack([image for image, _ in (unseen[index] for index in range(len(unseen)))])
    labels = torch.tensor([label for _, label in (unseen[index] for index in range(len(unseen)))])
    with torch.no_grad():
        right = int((net(images_BCHW).argmax(1) == labels).sum())
    assert run.record["pruned"]["accuracy"] == pytest.approx(100 * right / 600, abs=1e-3)


@pytest.mark.slow
def test_resuming_a_finished_run_shows_the_table_again_without_training(run: _Run, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to train")

    for name in ("train_model", "train_supernet"):
        monkeypatch.setattr(f"psenet.stages.train.{name}", refuse)
    before = run.record
    ended = psenet(*run.arguments, "--resume")
    assert (ended.code, ended.err) == (0, "")
    assert "training the" not in ended.out and "fine-tuning the" not in ended.out
    for title in ("MACs", "FLOPs", "parameters", "accuracy before fine-tuning", "accuracy on test data"):
        assert row(ended.out, title) == row(run.ended.out, title)
    assert run.record["widths"] == before["widths"]
    assert run.record["pruned"]["accuracy"] == before["pruned"]["accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "already holds a run; continue it with --resume or give another folder"),
        (["--resume", "--seed", "4"], "was started with other settings: settings.seed was 3, now 4; give another"),
        (["--resume", "--batch-size", "32"], "batch_size was 64, now 32; batches.train was 4, now 8; give another"),
        (["--resume", "--image-size", "16"], "input_shape was [1, 8, 8], now [1, 16, 16]; give another folder"),
        (["--resume", "--macs", "40%"], "settings: budget.macs was '50%', now '40%'; give another folder"),
    ],
)
def test_a_run_is_continued_only_as_it_was_started(changes: list[str], message: str, run: _Run):
    before = (run.out / "result.json").read_bytes()
    ended = psenet(*run.arguments, *changes)
    assert ended.code == 2
    assert message in ended.err
    assert (run.out / "result.json").read_bytes() == before


# How options reach the run --------------------------------------------------------------------------------------------


@dataclass
class _Asked:
    """The run that the command starts."""

    job: Job | None = None
    place: tuple[Path, dict[str, Any]] | None = None

    @property
    def given(self) -> Job:
        assert self.job is not None
        return self.job


@pytest.fixture
def asked(run: _Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Asked:
    """Let the start of a run note what it is asked for, and its end return the figures of another run."""
    noted = _Asked()

    def start_run(job: Job, out: Path, **named: Any) -> SimpleNamespace:
        noted.job, noted.place = job, (out, named)
        return SimpleNamespace(folder=SimpleNamespace(file=lambda name: tmp_path / name))

    monkeypatch.setattr("psenet.stages.start.start_run", start_run)
    monkeypatch.setattr("psenet.pipeline.finish", lambda _: SimpleNamespace(record=run.record))
    return noted


def test_every_option_reaches_the_run(asked: _Asked, tmp_path: Path):
    options = {
        **{"--macs": "60%", "--params": "100k", "--memory": "90%", "--seed": 5, "--image-size": 12},
        **{"--batch-size": 50, "--baseline-epochs": 2, "--supernet-epochs": 3, "--finetune-epochs": 4},
        **{
            "--evaluations": 7,
            "--front-evaluations": 3,
            "--baseline-lr": 0.3,
            "--supernet-lr": 0.2,
            "--finetune-lr": 0.1,
        },
        **{"--optimizer": "adamw", "--weight-decay": 0.01, "--distill": 0.5, "--strategy": "sandwich"},
        **{"--num-subnets": 6, "--divisor": 4, "--min-ratio": 0.5, "--max-train-images": 99},
        **{"--mixed-precision": "bf16", "--exclude": "conv1", "--opaque": "stages.1.*"},
        **{"--latency-ms": "90%", "--latency-engine": "onnxruntime", "--latency-threads": 3, "--latency-batch": 4},
        **{"--workers": 2},
    }
    given = [*(str(part) for pair in options.items() for part in pair), "--compile", "--focus", "--resume"]
    given.append("--tensorboard")
    out = tmp_path / "run"
    ended = psenet("prune", "--model", MODEL, "--data", "digits", "--out", out, *given)
    assert (ended.code, ended.err) == (0, "")
    job = asked.given
    assert job.budget == Budget(macs="60%", params="100k", memory="90%", latency_ms="90%")
    assert asked.place == (out, {"resume": True, "trained_in": None}) and job.workers == 2
    assert job.names == {"model": MODEL, "data": "digits"}
    assert job.config.tensorboard
    settings = job.config.as_dict()
    trainings = [settings.pop(name) for name in ("baseline", "supernet", "finetune")]
    assert settings == {
        **{"trained": False, "strategy": "sandwich", "num_subnets": 6, "num_evaluations": 7, "compiled": True},
        **{"num_front_evaluations": 3, "early_stopping": True},
        **{"focus": True, "divisor": 4, "min_ratio": 0.5, "seed": 5, "exclude": ["conv1"], "opaque": ["stages.1.*"]},
        "latency": {"engine": "onnxruntime", "device": "cpu", "num_threads": 3, "batch_size": 4},
    }
    assert [(training["epochs"], training["learning_rate"]) for training in trainings] == [(2, 0.3), (3, 0.2), (4, 0.1)]
    assert [training["distill_weight"] for training in trainings] == [0, 0, 0.5]
    for training in trainings:
        assert (training["optimizer"], training["weight_decay"]) == ("adamw", 0.01)
        assert training["mixed_precision"] == "bf16"
    assert isinstance(job.example_input, torch.Tensor) and job.example_input.shape == (1, 1, 12, 12)
    assert (len(_images(job.train_loader)), job.train_loader.batch_size) == (99, 50)


def _images(loader: Any) -> Any:
    return loader.dataset


def test_the_defaults_are_those_of_the_python_interface(asked: _Asked, tmp_path: Path):
    assert psenet("prune", "--model", MODEL, "--data", "digits", "--macs", "50%", "--out", tmp_path / "run").code == 0
    assert asked.given.config == PruneConfig()
    assert asked.place == (tmp_path / "run", {"resume": False, "trained_in": None})


def test_the_loaders_are_the_four_splits(asked: _Asked, tmp_path: Path):
    assert psenet("prune", "--model", MODEL, "--data", "digits", "--macs", "50%", "--out", tmp_path / "run").code == 0
    loaders = [loader for loader in asked.given.loaders.values() if loader is not None]
    assert list(asked.given.loaders) == ["train", "calibration", "validation", "test"]
    assert [len(_images(loader)) for loader in loaders] == [847, 100, 250, 600]
    assert [len(next(iter(loader))[0]) for loader in loaders] == [128, 100, 250, 256]


def test_a_last_batch_of_a_single_image_is_left_out(asked: _Asked, tmp_path: Path):
    arguments = ["prune", "--model", MODEL, "--data", "digits", "--macs", "50%", "--out", tmp_path / "run"]
    for num_images, sizes in ((129, [128]), (130, [128, 2]), (128, [128])):
        assert psenet(*arguments, "--max-train-images", str(num_images)).code == 0
        assert [len(labels) for _, labels in asked.given.train_loader] == sizes


def test_a_weights_file_makes_the_model_the_baseline(asked: _Asked, tmp_path: Path):
    torch.manual_seed(8)
    trained = digits_resnet()
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    arguments = ["prune", "--model", MODEL, "--data", "digits", "--macs", "50%", "--out", tmp_path / "run"]
    assert psenet(*arguments, "--weights", tmp_path / "trained.safetensors").code == 0
    assert asked.given.config.trained is True
    for name, tensor in asked.given.model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])


def test_the_seed_decides_the_model_s_first_weights(asked: _Asked, tmp_path: Path):
    def first_weights(seed: int) -> torch.Tensor:
        arguments = ["--model", MODEL, "--data", "digits", "--macs", "50%", "--out", tmp_path / "run"]
        assert psenet("prune", *arguments, "--seed", str(seed)).code == 0
        return asked.given.model.get_parameter("conv1.weight")

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


def test_unreadable_images_are_left_out_and_counted_where_asked(asked: _Asked, image_tree: Any, tmp_path: Path):
    root = image_tree({"cat": 40, "dog": 40})
    for name in ("cat/3.png", "dog/5.png"):
        (root / name).write_bytes(b"no image")
    arguments = ["prune", "--model", "timm:resnet18", "--data", root, "--macs", "50%", "--out", tmp_path / "run"]
    with pytest.warns(UserWarning, match=r"left out 2 unreadable images: .*3\.png.*5\.png"):
        ended = psenet(*arguments, "--skip-unreadable")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if line.startswith("images: ")]
    assert sum(int(word) for word in line.split() if word.isdigit()) == 78


def test_a_run_can_be_measured_again(run: _Run):
    ended = psenet("bench", run.out, "--runs", "3", "--batch", "2")
    assert (ended.code, ended.err) == (0, "")
    measured = json.loads((run.out / "bench.json").read_text())["measurements"]
    assert [(row["net"], row["batch"]) for row in measured] == [("baseline", 2), ("pruned", 2)]
    (run.out / "bench.json").unlink()
