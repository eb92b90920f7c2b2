"""How the program ends where something is wrong; single mistakes stand in the tables of `test_bad_input`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import Ended, psenet

from psenet.errors import InputError

NETS = """
from torch import nn

def for_16_pixels(num_classes):
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, num_classes))
"""


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


# Mistakes that a line of a table does not hold ------------------------------------------------------------------------


def test_an_image_size_that_the_model_refuses_is_named(user_folder: Path, image_tree: Any, tmp_path: Path):
    data = image_tree({"cat": 12, "dog": 12})
    ended = _prune(tmp_path / "run", model="nets_of_mine:for_16_pixels", data=data, image_size="12")
    _refused(ended, "the model refuses images of shape (3, 12, 12): RuntimeError: ", "mat1 and mat2 shapes")
    inspected = psenet("inspect", "nets_of_mine:for_16_pixels", "--image-size", "12")
    _refused(inspected, "the model refuses an input of shape (1, 3, 12, 12): RuntimeError: ", "mat1 and mat2 shapes")


def test_a_missing_tensorboard_is_named_before_data_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    arguments = ("--model", "psenet.models:digits_resnet", "--data", "digits", *("--macs", "50%"), "--tensorboard")
    ended = psenet("prune", *arguments, "--out", tmp_path / "run")
    _refused(ended, "logs need the package tensorboard", "pip install 'psenet[tensorboard]', or leave the logs out")
    assert "loading" not in ended.out and not (tmp_path / "run").exists()


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
    assert ": lower the learning rate or check the data; there is no checkpoint yet" in ended.err
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


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("the disk is gone"), 1), (InputError("no such thing"), 2)])
def test_debug_shows_where_an_error_came_from(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("psenet.data.load_data", _raise(error))
    arguments = ("--model", "timm:resnet18", "--data", "digits", "--macs", "50%", "--out", tmp_path / "run")
    ended = psenet("--debug", "prune", *arguments)
    assert ended.code == code
    first, *_, last = ended.err.splitlines()
    assert first == "Traceback (most recent call last):" and str(error) in last


def test_ctrl_c_ends_with_its_exit_code_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psenet.data.load_data", _raise(KeyboardInterrupt()))
    ended = _prune(tmp_path / "run")
    assert ended.code == 130
    assert ended.err.strip() == "stopped; what is finished is kept: the same command with --resume continues"


@pytest.mark.slow
def test_the_program_itself_ends_with_message_and_exit_code():
    command = [sys.executable, "-m", "psenet"]
    plain = subprocess.run([*command, "inspect", "resnet18"], capture_output=True, text=True)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == "psenet: a model is timm:NAME, torchvision:NAME or my.module:factory; got 'resnet18'\n"
    debug = subprocess.run([*command, "--debug", "inspect", "resnet18"], capture_output=True, text=True)
    assert debug.returncode == 2
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert "in build_model" in debug.stderr
