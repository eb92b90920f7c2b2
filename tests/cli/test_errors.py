"""What a user can get wrong: a message that says what to do, an exit code, and no traceback."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ended, psenet
from safetensors.torch import save_file

from psenet.cli.main import main
from psenet.errors import InputError
from psenet.models import digits_resnet

NETS = """
import torch
from torch import nn

def ten_classes():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def for_16_pixels(num_classes):
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, num_classes))

def nothing_to_vary(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))

def broken(num_classes):
    raise OSError("the shelf is empty")

def no_net(num_classes):
    return "net"

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return x.mean((2, 3)), x
"""
IN_A_PLACE = ("--macs", "50%", "--out")


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with the user's own models, which are forgotten afterwards."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "nets_of_mine.py").write_text(NETS)
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("nets_of_mine", None)


def _prune(run: Path, **options: str | Path | None) -> Ended:
    """Run `psenet prune` with good options but for those given; None leaves one out."""
    good = {"model": "psenet.models:digits_resnet", "data": "digits", "macs": "50%", "out": run}
    given = {name.replace("_", "-"): value for name, value in {**good, **options}.items() if value is not None}
    return psenet("prune", *(part for name, value in given.items() for part in (f"--{name}", value)))


def _refused(ended: Ended, *words: str) -> None:
    """Expect a mistake of the user's, told in these words."""
    assert ended.code == 2, ended.err
    # A message in a frame is broken into lines.
    message = " ".join(ended.err.replace("│", " ").split())
    for part in words:
        assert part in message
    assert "Traceback" not in ended.out + ended.err


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", "a model is timm:NAME, torchvision:NAME or my.module:factory; got 'resnet18'"),
        ("timm:resnet1888", "timm has no classification model 'resnet1888'; did you mean "),
        ("torchvision:resnet1888", "torchvision has no classification model 'resnet1888'; did you mean "),
        ("torchvision:resnet18", "torchvision models take images of 3 channels; the data has 1"),
        ("no_such_module:net", "no module 'no_such_module' in the current directory or the environment"),
        ("psenet.models:digits_resnt", "has no 'digits_resnt'; did you mean digits_resnet"),
        ("nets_of_mine:torch", "must be a function or class that makes the model; it is a module"),
        ("nets_of_mine:broken", "nets_of_mine:broken(num_classes=10) raised OSError: the shelf is empty"),
        ("nets_of_mine:no_net", "must return a torch.nn.Module; it returned str"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "inspect"])
def test_a_model_that_cannot_be_built_is_explained(
    command: str, model: str, message: str, user_folder: Path, tmp_path: Path
):
    if command == "prune":
        ended = _prune(tmp_path / "run", model=model)
    else:
        ended = psenet("inspect", model, "--in-channels", "1", "--num-classes", "10")
    _refused(ended, f"psenet: {message}" if not message[0].islower() else message)
    assert ended.err.startswith("psenet: ")
    assert not (tmp_path / "run").exists()


def test_a_model_of_other_classes_than_the_data_is_refused(user_folder: Path, image_tree: Any, tmp_path: Path):
    data = image_tree({"cat": 12, "dog": 12})
    _refused(
        _prune(tmp_path / "run", model="nets_of_mine:ten_classes", data=data),
        "the data has 2 classes, so the model's output for one image must be of shape (1, 2); got (1, 10)",
        "Let the factory take num_classes, or give a model for these classes",
    )
    _refused(_prune(tmp_path / "run", model="nets_of_mine:TwoHeads", data=data), "(1, 2); got tuple")


def test_an_image_size_that_the_model_refuses_is_named(user_folder: Path, image_tree: Any, tmp_path: Path):
    data = image_tree({"cat": 12, "dog": 12})
    ended = _prune(tmp_path / "run", model="nets_of_mine:for_16_pixels", data=data, image_size="12")
    _refused(ended, "the model refuses images of shape (3, 12, 12): RuntimeError: mat1 and mat2 shapes")
    inspected = psenet("inspect", "nets_of_mine:for_16_pixels", "--image-size", "12")
    _refused(inspected, "the model refuses an input of shape (1, 3, 12, 12): RuntimeError: mat1 and mat2 shapes")


def test_a_model_with_nothing_to_vary_is_refused(user_folder: Path, image_tree: Any, tmp_path: Path):
    ended = _prune(tmp_path / "run", model="nets_of_mine:nothing_to_vary", data=image_tree({"cat": 12, "dog": 12}))
    _refused(ended, "this model has no width that could vary. What froze it: 1: the model's output")
    _refused(psenet("inspect", "nets_of_mine:nothing_to_vary", "--image-size", "16"), "no width that could vary")
    assert not (tmp_path / "run").exists()


def test_a_missing_weights_file_is_named(tmp_path: Path):
    missing = tmp_path / "trained.safetensors"
    for ended in (
        _prune(tmp_path / "run", weights=missing),
        psenet("inspect", "psenet.models:digits_resnet", "--weights", missing),
    ):
        _refused(ended, f"there is no weights file {missing}")


def test_weights_of_another_model_are_refused(tmp_path: Path):
    weights = tmp_path / "trained.safetensors"
    save_file(digits_resnet(num_classes=7).state_dict(), weights)
    _refused(
        _prune(tmp_path / "run", weights=weights),
        "do not fit the model. other shape: fc.weight is (7, 64), the model has (10, 64)",
    )
    save_file({"extra": torch.zeros(1)}, weights)
    _refused(_prune(tmp_path / "run", weights=weights), "missing: conv1.weight", "not in the model: extra")
    weights.write_bytes(b"nonsense")
    _refused(_prune(tmp_path / "run", weights=weights), "cannot be read as tensors only")


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_missing_data_folder_is_named(tmp_path: Path):
    _refused(
        _prune(tmp_path / "run", data=tmp_path / "photos"),
        f"there is no data folder '{tmp_path / 'photos'}'",
    )
    message = "there is no data folder 'photos'; the data is an existing folder of images, `digits`, or"
    _refused(_prune(tmp_path / "run", data="photos"), message)


def test_an_empty_data_folder_is_named(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    _refused(_prune(tmp_path / "run", data=tmp_path / "photos"), f"the data folder {tmp_path / 'photos'} is empty")


def test_a_class_without_images_is_named(image_tree: Any, tmp_path: Path):
    ended = _prune(tmp_path / "run", data=image_tree({"train/cat": 12, "train/dog": 12, "train/eel": 0}))
    _refused(ended, "every class folder in", "must hold images", "none in: eel")


def test_an_unreadable_image_is_named(image_tree: Any, tmp_path: Path):
    data = image_tree({"cat": 12, "dog": 12})
    (data / "dog/7.png").write_bytes((data / "dog/7.png").read_bytes()[:40])
    ended = _prune(tmp_path / "run", model="timm:resnet18", data=data)
    _refused(ended, "every image must be readable; 1 are not: ", "dog/7.png", "ask for unreadable images to be skipped")


def test_a_missing_tensorboard_is_named_before_data_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    arguments = ("--model", "psenet.models:digits_resnet", "--data", "digits", *("--macs", "50%"), "--tensorboard")
    ended = psenet("prune", *arguments, "--out", tmp_path / "run")
    _refused(ended, "logs need the package tensorboard", "pip install 'psenet[tensorboard]', or leave the logs out")
    assert "loading" not in ended.out and not (tmp_path / "run").exists()


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            {"macs": "5O%"},
            ["the budget's macs must be a positive number with a unit or a percentage, such as 300M", "; got '5O%'"],
        ),
        ({"macs": "150%"}, ["macs must be above 0% and at most 100% of the full model", "; got '150%'"]),
        ({"macs": "0"}, ["macs must be a positive number, such as", "; got '0'"]),
        ({"macs": "-5M"}, ["macs must be a positive number", "; got '-5M'"]),
        ({"macs": "300X", "params": "2 apples"}, ["; got '300X'; the budget's params must be", "; got '2 apples'"]),
        ({"macs": "1G"}, ["macs='1G' is above the full model's 4.476M MACs (4475520): nothing to prune; give less"]),
        (
            {"macs": "1%", "params": "1k"},
            [
                "macs='1%' is 44755 and cannot be reached: the smallest reachable is ",
                "; params='1k' is 1000 and cannot be reached: the smallest reachable is ",
                ". Raise the limit",
            ],
        ),
        ({"macs": None}, ["a budget needs at least one limit: set macs, params, memory or latency_ms"]),
    ],
)
def test_a_budget_that_cannot_be_is_explained_before_any_work(
    budget: dict[str, str | None], words: list[str], tmp_path: Path
):
    ended = _prune(tmp_path / "run", **budget)
    _refused(ended, *words)
    assert "training" not in ended.out
    assert not (tmp_path / "run").exists()


# The output folder ----------------------------------------------------------------------------------------------------


def test_an_output_folder_in_use_is_refused(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    _refused(_prune(run), f"the output folder {run} holds files that are not of a psenet run; give an empty one")
    (run / "recipe.json").write_text('{"model": "timm:resnet18", "settings": {"seed": 8}}')
    _refused(_prune(run), f"the output folder {run} already holds a run; continue it with --resume or give another")
    _refused(
        psenet(*("prune", "--model", "psenet.models:digits_resnet", "--data", "digits", *IN_A_PLACE, run, "--resume")),
        "was started with other settings: model was 'timm:resnet18', now 'psenet.models:digits_resnet'",
        "settings.seed was 8, now 0",
    )
    (run / "recipe.json").write_text("{")
    _refused(
        psenet(*("prune", "--model", "psenet.models:digits_resnet", "--data", "digits", *IN_A_PLACE, run, "--resume")),
        "recipe.json cannot be read as JSON",
    )
    assert (run / "thesis.tex").read_text() == "mine"


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    _refused(_prune(tmp_path / "run"), "run is a file; give another path")
    _refused(_prune(tmp_path / "run" / "below"), "below cannot be written: ")


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model", "model.name must be given"),
        ("data", "data.source must be given"),
        ("out", "--out RUN must be given: the folder that the run is to be kept in"),
    ],
)
def test_a_required_option_that_is_missing_is_named(option: str, message: str, tmp_path: Path):
    _refused(_prune(tmp_path / "run", **{option: None}), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "-1"}, "Invalid value for '--seed'"),
        ({"batch_size": "1"}, "Invalid value for '--batch-size'"),
        ({"image_size": "7"}, "Invalid value for '--image-size'"),
        ({"evaluations": "0"}, "Invalid value for '--evaluations'"),
        ({"baseline_epochs": "0"}, "Invalid value for '--baseline-epochs'"),
        ({"supernet_epochs": "many"}, "Invalid value for '--supernet-epochs'"),
        ({"divisor": "0"}, "Invalid value for '--divisor'"),
        ({"max_train_images": "3"}, "the training images must be at least one per class, 10 here; got a maximum of 3"),
        ({"min_ratio": "0"}, "min_ratio must be above 0 and at most 1; got 0.0"),
        ({"baseline_lr": "0"}, "learning_rate must be above 0; got 0.0"),
        ({"optimizer": "lion"}, "--optimizer: baseline.optimizer: input should be 'sgd' or 'adamw'; got 'lion'"),
        ({"weight_decay": "-1"}, "weight_decay must be at least 0; got -1.0"),
        ({"distill": "1.5"}, "distill_weight must be between 0 and 1; got 1.5"),
        ({"mixed_precision": "fp8"}, "supernet.mixed_precision: input should be 'no', 'fp16' or 'bf16'"),
        ({"strategy": "bilaterol"}, "unknown strategy 'bilaterol'; there are ['bilateral', 'parallel', 'sandwich'"),
    ],
)
def test_an_option_out_of_range_is_named_and_leaves_nothing(options: dict[str, str], message: str, tmp_path: Path):
    _refused(_prune(tmp_path / "run", **options), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["purne"], "No such command 'purne'"),
        (["prune", "--mcas", "50%"], "No such option: --mcas"),
        (["inspect"], "Missing argument"),
        (["inspect", "timm:resnet18", "--image-size", "0"], "Invalid value for '--image-size'"),
        (["inspect", "psenet.models:digits_resnet", "--min-ratio", "2"], "min_ratio must be above 0 and at most 1"),
    ],
)
def test_a_command_that_does_not_exist_like_that_is_explained(arguments: list[str], message: str):
    _refused(psenet(*arguments), message)


def test_no_command_shows_the_help_and_help_is_no_error():
    ended = psenet("--help")
    assert (ended.code, ended.err) == (0, "")
    for words in ("prune", "inspect", "bench", "--debug"):
        assert words in ended.out
    assert psenet().code == 2
    for command in ("prune", "inspect", "bench"):
        ended = psenet(command, "--help")
        assert (ended.code, ended.err) == (0, "")
        assert f"Example: psenet {command}" in ended.out


# Failures -------------------------------------------------------------------------------------------------------------


def _few_steps(out: Path, *more: str) -> Ended:
    few = "--baseline-epochs 1 --supernet-epochs 1 --finetune-epochs 1 --evaluations 2 --max-train-images 128"
    few += " --batch-size 32 --num-subnets 4"
    model = ["--model", "psenet.models:digits_resnet", "--data", "digits", "--macs", "50%"]
    return psenet("prune", *model, "--out", out, *few.split(), *more)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tmp_path: Path):
    ended = _few_steps(tmp_path / "run", "--supernet-lr", "1e9")
    assert ended.code == 1
    assert "psenet: TrainingDivergedError: " in ended.err
    assert ": lower the learning rate or check the data; no epoch was finished before" in ended.err
    assert "Traceback" not in ended.out + ended.err
    assert (tmp_path / "run/stages/baseline.safetensors").exists()
    # It goes on where it stopped, which helps only if the data was the reason.
    again = _few_steps(tmp_path / "run", "--supernet-lr", "1e9", "--resume")
    assert again.code == 1
    assert "training the supernet" in again.out and "training the baseline" not in again.out
    lower = _few_steps(tmp_path / "run", "--supernet-lr", "0.1", "--resume")
    _refused(lower, "settings.supernet.learning_rate was 1000000000.0, now 0.1; give another folder")


def _raise(error: BaseException) -> Any:
    def load_data(*_: Any, **__: Any) -> None:
        raise error

    return load_data


def test_an_error_of_psenet_s_own_is_told_apart_from_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psenet.data.load_data", _raise(RuntimeError("the disk is gone")))
    ended = _prune(tmp_path / "run")
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "psenet: RuntimeError: the disk is gone",
        "psenet: `psenet --debug ...` shows where it came from",
    ]


def test_ctrl_c_ends_with_its_exit_code_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psenet.data.load_data", _raise(KeyboardInterrupt()))
    ended = _prune(tmp_path / "run")
    assert ended.code == 130
    assert ended.err.strip() == "stopped; what is finished is kept: the same command with --resume continues"


@pytest.mark.parametrize("error", [RuntimeError("the disk is gone"), InputError("no such thing")])
def test_debug_lets_the_error_through(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psenet.data.load_data", _raise(error))
    arguments = ["--debug", "prune", "--model", "timm:resnet18", "--data", "digits", *IN_A_PLACE, str(tmp_path / "run")]
    with pytest.raises(type(error), match=str(error)):
        main(arguments)


@pytest.mark.slow
def test_the_program_itself_ends_with_message_and_exit_code():
    command = [sys.executable, "-m", "psenet"]
    plain = subprocess.run([*command, "inspect", "resnet18"], capture_output=True, text=True)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == "psenet: a model is timm:NAME, torchvision:NAME or my.module:factory; got 'resnet18'\n"
    debug = subprocess.run([*command, "--debug", "inspect", "resnet18"], capture_output=True, text=True)
    assert debug.returncode != 0
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert "in build_model" in debug.stderr
