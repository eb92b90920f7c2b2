from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from psenet.devices import device_of, on_device, to_device

_META = torch.device("meta")  # a second device that every machine has


class _Pair(NamedTuple):
    image: torch.Tensor
    label: int


class _Travelling(nn.Linear):
    """Notes where it is sent and stays: a meta tensor would come back without its values."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.places: list[torch.device] = []

    def to(self, device: torch.device) -> "_Travelling":  # pyright: ignore[reportIncompatibleMethodOverride]
        self.places.append(device)
        return self


def test_a_module_is_moved_for_a_while_and_comes_back():
    module = _Travelling()
    with on_device(module, _META):
        assert module.places == [_META]
    assert module.places == [_META, torch.device("cpu")]


def test_a_module_comes_back_when_the_work_on_it_fails():
    module = _Travelling()
    with pytest.raises(RuntimeError, match="out of luck"), on_device(module, _META):
        raise RuntimeError("out of luck")
    assert module.places == [_META, torch.device("cpu")]


def test_all_tensors_of_a_module_are_moved():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with on_device(module, _META):
        assert {tensor.device for tensor in module.state_dict().values()} == {_META}
        module.to_empty(device="cpu")  # there is no other way back from there


def test_a_module_without_parameters_has_no_device_and_can_be_moved():
    assert device_of(nn.ReLU()) is None
    with on_device(nn.ReLU(), torch.device("cpu")):
        pass


def test_a_device_is_that_of_the_first_parameter_and_others_than_modules_have_none():
    assert device_of(nn.Linear(2, 2, device=_META)) == _META
    assert device_of(object()) is None


def test_the_tensors_of_a_batch_are_moved_wherever_they_are():
    x = torch.ones(2)
    batch = {"pair": _Pair(x, 3), "list": [x, (x, "name")], "nothing": None}
    moved = to_device(batch, _META)
    assert list(moved) == ["pair", "list", "nothing"] and moved["nothing"] is None
    assert isinstance(moved["pair"], _Pair) and moved["pair"].image.device == _META and moved["pair"].label == 3
    assert isinstance(moved["list"], list) and moved["list"][0].device == _META
    inner: Any = moved["list"][1]
    assert isinstance(inner, tuple) and inner[0].device == _META and inner[1] == "name"
    assert x.device == torch.device("cpu")


def test_without_a_device_the_tensors_stay_themselves():
    x, y = torch.ones(2), torch.zeros(2, device=_META)
    kept = to_device((x, [y]), None)
    assert kept[0] is x and kept[1][0] is y
