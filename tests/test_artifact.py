import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import psenet
from architectures import ARCHITECTURES, traced
from psenet.artifact import Description, load, read_description, save_weights
from psenet.errors import InputError
from psenet.slicing import narrow_attributes
from psenet.widths import Widths

WIDTHS = Widths({"conv": 3})
DETAILS = {"model": "my.module:net", "input_shape": [2, 8, 8], "num_classes": 5, "in_channels": 2}


class _Net(nn.Module):
    def __init__(self, width: int, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.depthwise(self.norm(self.conv(x)).relu()).mean((2, 3)))


def _full() -> nn.Module:
    return _Net(8)


@pytest.fixture
def narrow() -> nn.Module:
    torch.manual_seed(0)
    net = _Net(3)
    net(torch.randn(4, 2, 8, 8))  # statistics that are not the initial ones
    return net


def _same_state(ours: nn.Module, theirs: nn.Module) -> None:
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    for name, value in ours_state.items():
        assert value.dtype == theirs_state[name].dtype
        torch.testing.assert_close(value, theirs_state[name], rtol=0, atol=0)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Saving ---------------------------------------------------------------------------------------------------------------


def test_the_files_hold_the_state_and_the_documented_json(narrow: nn.Module, tmp_path: Path):
    folder = tmp_path / "new" / "model"
    weights, widths = save_weights(narrow, folder, widths=WIDTHS, details=DETAILS)
    assert sorted(path.name for path in folder.iterdir()) == ["weights.safetensors", "widths.json"]
    assert (weights.parent, widths.parent) == (folder, folder)
    assert json.loads(widths.read_text()) == {
        "format": 1,
        "widths": {"conv": 3},
        "model": "my.module:net",
        "input_shape": [2, 8, 8],
        "num_classes": 5,
        "in_channels": 2,
        "attributes": {},
    }
    saved = load_file(weights)
    assert sorted(saved) == sorted(narrow.state_dict())
    for name, value in narrow.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)


def test_numbers_that_the_users_modules_keep_are_saved_and_set_again(tmp_path: Path):
    model, space = traced("cut_by_numbers")
    widths = space.smallest()
    narrow = psenet.Supernet(model, space).extract(widths).eval()
    attributes = narrow_attributes(model, space, widths)
    assert attributes == {"2": {"width": 4}, "3": {"sizes": [2, 6]}}
    save_weights(narrow, tmp_path, widths=widths, details={"attributes": attributes})
    rebuilt = load(tmp_path, lambda: ARCHITECTURES["cut_by_numbers"].model()).eval()
    x = ARCHITECTURES["cut_by_numbers"].batch(2)
    assert torch.equal(rebuilt(x), narrow(x))


@pytest.mark.parametrize(
    "wrong", [{"2": {"wide": 4}}, {"9": {"width": 4}}, {"3": {"sizes": [4]}}, {"2": {"training": 4}}]
)
def test_numbers_that_the_modules_do_not_have_are_refused(wrong: dict, tmp_path: Path):
    model, space = traced("cut_by_numbers")
    narrow = psenet.Supernet(model, space).extract(space.smallest())
    save_weights(narrow, tmp_path, widths=space.smallest(), details={"attributes": wrong})
    with pytest.raises(InputError, match="sets numbers that the module which the factory returns does not have"):
        load(tmp_path, lambda: ARCHITECTURES["cut_by_numbers"].model())


def test_unknown_details_are_null(narrow: nn.Module, tmp_path: Path):
    _, widths = save_weights(narrow, tmp_path, widths=WIDTHS)
    document = json.loads(widths.read_text())
    assert [document[name] for name in ("model", "input_shape", "num_classes", "in_channels")] == [None] * 4


def test_tied_and_non_contiguous_tensors_are_saved_by_value(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
            whole = torch.arange(64.0).reshape(4, 4, 2, 2)
            self.register_buffer("part", whole[:, :2])
            self.register_buffer("last", whole.to(memory_format=torch.channels_last))

    tied = Tied()
    weights, _ = save_weights(tied, tmp_path, widths=WIDTHS)
    saved = load_file(weights)
    assert torch.equal(saved["first.weight"], saved["second.weight"])
    assert torch.equal(saved["part"], torch.arange(64.0).reshape(4, 4, 2, 2)[:, :2])
    assert torch.equal(saved["last"], torch.arange(64.0).reshape(4, 4, 2, 2))
    _same_state(load(tmp_path, Tied), tied)


def test_saving_again_replaces_both_files(narrow: nn.Module, tmp_path: Path):
    save_weights(narrow, tmp_path, widths=WIDTHS, details=DETAILS)
    other = _Net(2)
    save_weights(other, tmp_path, widths=Widths({"conv": 2}))
    _same_state(load(tmp_path, _full), other)
    assert read_description(tmp_path) == Description(widths=Widths({"conv": 2}))


def test_saving_into_a_file_is_refused(narrow: nn.Module, tmp_path: Path):
    target = tmp_path / "taken"
    target.write_text("mine")
    with pytest.raises(InputError, match="taken must be a folder to write the model into; it is a file"):
        save_weights(narrow, target, widths=WIDTHS)
    assert target.read_text() == "mine"


def test_state_that_is_not_a_tensor_is_named(tmp_path: Path):
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    with pytest.raises(InputError, match=r"only tensors can be saved.*0\._extra_state \(dict\)"):
        save_weights(nn.Sequential(Extra(1, 1)), tmp_path, widths=WIDTHS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"modell": "x"}, r"unknown details \['modell'\]; known are model, input_shape"),
        ({"model": 3}, "model must be a string or None; got 3"),
        ({"input_shape": 3}, "input_shape must be a list of positive integers; got 3"),
        ({"input_shape": [3, 0]}, r"input_shape must be positive integers; got \[3, 0\]"),
        ({"num_classes": "5", "in_channels": -1}, "num_classes must be .* got '5'; in_channels must be .* got -1"),
    ],
)
def test_details_of_the_wrong_kind_are_named(details: dict[str, object], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        save_weights(_Net(3), tmp_path, widths=WIDTHS, details=details)
    assert not list(tmp_path.iterdir())


def test_widths_must_be_widths(tmp_path: Path):
    with pytest.raises(InputError, match=r"widths must be psenet\.Widths; got dict"):
        save_weights(_Net(3), tmp_path, widths={"conv": 3})  # pyright: ignore[reportArgumentType]


# Loading --------------------------------------------------------------------------------------------------------------


def test_the_loaded_module_is_the_saved_one(narrow: nn.Module, tmp_path: Path):
    save_weights(narrow, tmp_path, widths=WIDTHS, details=DETAILS)
    loaded = load(tmp_path, _full)
    _same_state(loaded, narrow)
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(loaded.eval()(x), narrow.eval()(x), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_buffers_outside_the_state_come_from_the_factory(tmp_path: Path):
    class Blur(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, width, 1)
            self.register_buffer("kernel", torch.tensor([0.25, 0.5, 0.25]), persistent=False)

    save_weights(Blur(3), tmp_path, widths=WIDTHS)
    kernel = load(tmp_path, lambda: Blur(8)).get_buffer("kernel")
    assert kernel.tolist() == [0.25, 0.5, 0.25]


def test_a_run_directory_and_the_weights_file_alone_will_do(narrow: nn.Module, tmp_path: Path):
    weights, _ = save_weights(narrow, tmp_path / "run" / "model", widths=WIDTHS, details=DETAILS)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    expected = Description(widths=WIDTHS, model="my.module:net", input_shape=(2, 8, 8), num_classes=5, in_channels=2)
    for path in (tmp_path / "run", str(tmp_path / "run"), weights, moved):
        _same_state(load(path, _full), narrow)
        assert read_description(path) == expected


def test_a_missing_path_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        load(tmp_path / "nowhere", _full)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"weights\.pt must be a folder or a \.safetensors file"):
        load(path, _full)


def test_missing_files_are_named(narrow: nn.Module, tmp_path: Path):
    with pytest.raises(InputError, match=r"missing: weights\.safetensors, widths\.json"):
        load(tmp_path, _full)
    save_weights(narrow, tmp_path / "model", widths=WIDTHS)
    (tmp_path / "model" / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"model must hold .*; missing: weights\.safetensors$"):
        load(tmp_path, _full)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_damaged_weights_are_named(keep: int, narrow: nn.Module, tmp_path: Path):
    weights, _ = save_weights(narrow, tmp_path, widths=WIDTHS)
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"weights\.safetensors is damaged \("):
        load(tmp_path, _full)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"widths\.json cannot be read: not JSON"),
        (b"\xff\xfe", r"widths\.json cannot be read: not UTF-8"),
        (b"[1]", r"widths\.json cannot be read: not a JSON object with an object \"widths\""),
        (b'{"format": 2, "widths": {}}', r"widths\.json cannot be read: format 2 is not known"),
        (b'{"format": 1, "widths": {"conv": 0}}', r"widths\.json cannot be read: a width is a positive integer"),
        (b'{"format": 1, "widths": {}, "x": 1}', r"widths\.json cannot be read: unknown details \['x'\]"),
    ],
)
def test_damaged_widths_are_named(content: bytes, message: str, narrow: nn.Module, tmp_path: Path):
    _, widths = save_weights(narrow, tmp_path, widths=WIDTHS)
    widths.write_bytes(content)
    for read in (lambda: load(tmp_path, _full), lambda: read_description(tmp_path)):
        with pytest.raises(InputError, match=message):
            read()


def test_files_of_two_exports_are_not_mixed(narrow: nn.Module, tmp_path: Path):
    _, widths = save_weights(narrow, tmp_path, widths=WIDTHS)
    _edit(widths, widths={"conv": 4})
    with pytest.raises(InputError, match="are of two different exports"):
        load(tmp_path, _full)


def test_weights_without_our_header_still_load(narrow: nn.Module, tmp_path: Path):
    path = tmp_path / "foreign.safetensors"
    save_file(narrow.state_dict(), path)
    _same_state(load(path, _full), narrow)
    with pytest.raises(InputError, match=r"foreign\.safetensors does not say its widths"):
        read_description(path)


def test_a_factory_that_makes_no_module_is_refused(narrow: nn.Module, tmp_path: Path):
    save_weights(narrow, tmp_path, widths=WIDTHS)
    with pytest.raises(InputError, match=r"factory for .*weights\.safetensors must return .*; got type"):
        load(tmp_path, lambda: _Net)  # pyright: ignore[reportArgumentType, reportReturnType]


def test_every_tensor_that_does_not_fit_the_factory_is_named(narrow: nn.Module, tmp_path: Path):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 8, 3, bias=False)
            self.norm = nn.BatchNorm2d(8, dtype=torch.float64)
            self.depthwise = nn.Conv2d(2, 2, 3, groups=2)
            self.extra = nn.Linear(1, 1, bias=False)

    save_weights(narrow, tmp_path, widths=WIDTHS)
    with pytest.raises(InputError, match=r"weights\.safetensors does not fit the module") as caught:
        load(tmp_path, Other)
    for words in (
        "extra.weight is not in the file",
        "head.weight is not in the module",
        "head.bias is not in the module",
        "conv.weight has shape (3, 2, 3, 3) in the file, which is no part of the module's (8, 2, 3)",
        "norm.weight is torch.float32 in the file and torch.float64 in the module",
        "depthwise.bias has shape (3,) in the file, which is no part of the module's (2,)",
    ):
        assert words in str(caught.value)


def test_a_long_list_of_misfits_is_cut(tmp_path: Path):
    save_weights(nn.Sequential(*(nn.Linear(1, 1) for _ in range(20))), tmp_path, widths=WIDTHS)
    with pytest.raises(InputError, match=r"; and 20 more\. The factory must build the original"):
        load(tmp_path, nn.Identity)
