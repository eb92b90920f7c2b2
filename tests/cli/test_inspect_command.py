from pathlib import Path

import pytest
import torch
from commandline import psenet, row
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from psenet.cli.inspect import say_cause, say_choices
from psenet.models import SmallResNet

DIGITS = ("psenet.models:digits_resnet", "--in-channels", "1", "--image-size", "8", "--num-classes", "10")
PLAIN_NET = """
from torch import nn

def net(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(320, num_classes),
    )
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _millions(model: nn.Module) -> tuple[str, str]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 1, 8, 8))
    params = sum(parameter.numel() for parameter in model.parameters())
    return f"{counter.get_total_flops() / 2e6:.2f} M", f"{params / 1e6:.2f} M"


def test_groups_are_shown_with_their_choices():
    ended = psenet("inspect", *DIGITS)
    assert (ended.code, ended.err) == (0, "")
    assert "6 channel groups of psenet.models:digits_resnet" in ended.out
    # The stem, both shortcuts of its stage, and what reads them: ten layers of one width.
    assert row(ended.out, "conv1") == ["32", "8, 16, 24, 32", "10"]
    assert row(ended.out, "stages.1.0.conv1") == ["64", "16, 24, ... 64 (7)", "3"]
    assert f"{4**3 * 7**3:.2g} width settings" in ended.out


def test_what_is_frozen_is_shown_with_the_reason():
    ended = psenet("inspect", *DIGITS)
    macs = 64 * 10 / _digits_macs()
    assert row(ended.out, "fc") == [f"{macs:.1%}", "the model's output"]


def _digits_macs() -> float:
    macs, _ = _millions(SmallResNet((32, 64), 2, num_classes=10, in_channels=1))
    return 1e6 * float(macs.split()[0])


def test_reachable_costs_are_those_of_the_model_at_its_ends():
    ended = psenet("inspect", *DIGITS)
    assert "one 8 x 8 image" in ended.out
    full = _millions(SmallResNet((32, 64), 2, num_classes=10, in_channels=1))
    least = _millions(SmallResNet((8, 16), 2, num_classes=10, in_channels=1))
    for title, most, smallest in zip(("MACs", "parameters"), full, least, strict=True):
        cells = row(ended.out, title)
        assert cells[:2] == [most, smallest]
        share = float(smallest.split()[0]) / float(most.split()[0])
        assert float(cells[2].rstrip("%")) / 100 == pytest.approx(share, abs=0.05)
    assert row(ended.out, "peak activations")[0].endswith("MiB")


def test_divisor_and_least_ratio_decide_the_choices():
    ended = psenet("inspect", *DIGITS, "--divisor", "16", "--min-ratio", "0.6")
    # Nothing but 32 itself is a multiple of 16 and at least 19.2.
    assert row(ended.out, "conv1 and 4 more")[1] == "no smaller width is allowed"
    assert row(ended.out, "stages.1.0.conv1")[:2] == ["64", "48, 64"]


def test_the_user_s_own_model_is_read_from_the_current_directory(user_folder: Path):
    (user_folder / "inspected_nets.py").write_text(PLAIN_NET)
    ended = psenet("inspect", "inspected_nets:net", "--image-size", "8", "--num-classes", "5", "--divisor", "4")
    assert ended.code == 0
    assert row(ended.out, "0") == ["16", "4, 8, 12, 16", "2"]
    # The linear layer behind it sees each of the 20 channels at 16 places.
    assert row(ended.out, "2") == ["20", "8, 12, 16, 20", "2"]
    assert row(ended.out, "5")[1] == "the model's output"


def test_what_is_excluded_or_opaque_does_not_vary_and_is_listed_by_its_reason():
    ended = psenet("inspect", *DIGITS, "--exclude", "stages.0.0.conv1", "--opaque", "stages.1")
    assert (ended.code, ended.err) == (0, "")
    assert row(ended.out, "stages.0.0.conv1")[1] == "excluded"
    assert row(ended.out, "stages.1")[1] == "comes out of an opaque module (psenet.opaque.default)"
    # The stem's channels go into the opaque stage, so that one group is left.
    assert row(ended.out, "stages.0.1.conv1")[0] == "32"
    assert "1 channel groups of" in ended.out


def test_layers_are_asked_for_by_a_pattern():
    ended = psenet("inspect", *DIGITS, "--why", "*c*1", "--exclude", "stages.0.0.conv1")
    assert (ended.code, ended.err) == (0, "")
    assert row(ended.out, "stages.0.0.conv1") == ["nothing", "excluded"]
    assert row(ended.out, "stages.0.1.conv1") == ["stages.0.1.conv1: 8, 16, 24, 32", ""]
    assert "bn1" not in ended.out


def test_a_pattern_without_a_layer_is_refused():
    ended = psenet("inspect", *DIGITS, "--why", "nothing*")
    assert ended.code == 2
    assert "--why: no layer with channels matches 'nothing*'" in ended.err


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("no smaller width is allowed than 32", "no smaller width is allowed"),
        ("no rule for this op (aten.sort.default in a.b.0)", "no rule for this op (aten.sort.default)"),
        ("the model's output", "the model's output"),
    ],
)
def test_a_cause_is_a_reason_without_its_place(reason: str, said: str):
    assert say_cause(reason) == said


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ((8,), "8"),
        ((8, 16, 24, 32, 40, 48), "8, 16, 24, 32, 40, 48"),
        ((8, 16, 24, 32, 40, 48, 56), "8, 16, ... 56 (7)"),
    ],
)
def test_many_choices_are_said_in_short(choices: tuple[int, ...], said: str):
    assert say_choices(choices) == said
