import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import psenet
from architectures import ARCHITECTURES, traced
from psenet import slicing
from psenet.cost import PeakCost, ProductCost
from psenet.errors import InputError
from psenet.slicing import (
    SlicePlan,
    load_slices,
    narrow_attributes,
    narrow_module,
    resizer,
    slice_state,
    sliced_shapes,
    state_of,
)
from psenet.space import ChannelGroup, SpaceCosts, WidthSpace, Wiring
from psenet.tracing.layout import Run
from psenet.widths import Widths

Axes = dict[int, list[int]]
"""By axis, the positions that stay; other axes stay whole."""


def _select(tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    for axis, positions in axes.items():
        tensor = tensor.index_select(axis, torch.tensor(positions))
    return tensor


def _is_view(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _first(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


# Slices, by hand ------------------------------------------------------------------------------------------------------


def _channel_multiplier() -> tuple[Widths, dict[str, Axes]]:
    """Each channel of the first convolution becomes two of the second."""
    norms = {f"{layer}.{name}": {0: positions} for layer, positions in (("0.1", _first(12)), ("3", _first(24)))
             for name in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    last = {f"5.1.{name}": {0: _first(8)} for name in ("weight", "bias", "running_mean", "running_var")}
    return Widths({"0.0": 12, "5.0": 8}), {
        "0.0.weight": {0: _first(12)},
        "2.weight": {0: _first(24)},
        "2.bias": {0: _first(24)},
        "5.0.weight": {0: _first(8), 1: _first(24)},
        "7.3.weight": {1: _first(8)},
        **norms,
        **last,
    }


def _densenet() -> tuple[Widths, dict[str, Axes]]:
    """The axes that read a concatenation keep the first channels of each of its parts."""
    two, three = [*_first(8), *_first(4, 16)], [*_first(8), *_first(4, 16), *_first(8, 24)]
    last = [*_first(12), *_first(4, 16)]

    def norm(layer: str, positions: list[int]) -> dict[str, Axes]:
        return {f"{layer}.{name}": {0: positions} for name in ("weight", "bias", "running_mean", "running_var")}

    return Widths({"0": 8, "1.conv": 4, "2.conv": 8, "5": 12, "7.conv": 4}), {
        "0.weight": {0: _first(8)},
        **norm("1.norm", _first(8)),
        "1.conv.weight": {0: _first(4), 1: _first(8)},
        **norm("2.norm", two),
        "2.conv.weight": {1: two},
        **norm("3", three),
        "5.weight": {0: _first(12), 1: three},
        **norm("7.norm", _first(12)),
        "7.conv.weight": {0: _first(4), 1: _first(12)},
        **norm("8", last),
        "10.3.weight": {1: last},
    }


def _regnet() -> tuple[Widths, dict[str, Axes]]:
    """A grouped convolution's input axis is the channels of one conv-group: it stays whole."""
    norms = {
        f"{layer}.{name}": {0: _first(width)}
        for layer, width in (
            ("0.1", 8), ("2.conv1.1", 12), ("2.conv2.1", 12), ("2.conv3.1", 16), ("2.shortcut.1", 16),
            ("3.conv1.1", 16), ("3.conv2.1", 16), ("3.conv3.1", 8), ("3.shortcut.1", 8),
        )
        for name in ("weight", "bias", "running_mean", "running_var")
    }  # fmt: skip
    widths = {"0.0": 8, "2.conv1.0": 12, "2.se.reduce": 4, "2.conv3.0": 16}
    return Widths({**widths, "3.conv1.0": 16, "3.se.reduce": 8, "3.conv3.0": 8}), {
        "0.0.weight": {0: _first(8)},
        "2.conv1.0.weight": {0: _first(12), 1: _first(8)},
        "2.conv2.0.weight": {0: _first(12)},
        "2.se.reduce.weight": {0: _first(4), 1: _first(12)},
        "2.se.reduce.bias": {0: _first(4)},
        "2.se.expand.weight": {0: _first(12), 1: _first(4)},
        "2.se.expand.bias": {0: _first(12)},
        "2.conv3.0.weight": {0: _first(16), 1: _first(12)},
        "2.shortcut.0.weight": {0: _first(16), 1: _first(8)},
        "3.conv1.0.weight": {0: _first(16), 1: _first(16)},
        "3.conv2.0.weight": {0: _first(16)},
        "3.se.reduce.weight": {1: _first(16)},
        "3.se.expand.weight": {0: _first(16)},
        "3.se.expand.bias": {0: _first(16)},
        "3.conv3.0.weight": {0: _first(8), 1: _first(16)},
        "3.shortcut.0.weight": {0: _first(8), 1: _first(16)},
        "4.3.weight": {1: _first(8)},
        **norms,
    }


def _split_by_concat() -> tuple[Widths, dict[str, Axes]]:
    """The third convolution keeps the channels that meet those of the first two."""
    both = [*_first(4), *_first(12, 8)]
    norms = {
        f"{layer}.1.{name}": {0: positions}
        for layer, positions in (("a", _first(4)), ("b", _first(12)), ("c", both), ("mix", _first(8)))
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    return Widths({"stem.0": 16, "a.0": 4, "b.0": 12, "mix.0": 8}), {
        "a.0.weight": {0: _first(4)},
        "b.0.weight": {0: _first(12)},
        "c.0.weight": {0: both},
        "mix.0.weight": {0: _first(8), 1: both},
        "head.3.weight": {1: _first(8)},
        **norms,
    }


def _flatten_to_linear() -> tuple[Widths, dict[str, Axes]]:
    """A channel is nine features of the linear layer."""
    norms = {
        f"{layer}.{name}": {0: _first(width)}
        for layer, width in (("0.1", 4), ("3.1", 20), ("8", 28))
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    return Widths({"0.0": 4, "3.0": 20, "7": 28}), {
        "0.0.weight": {0: _first(4)},
        "3.0.weight": {0: _first(20), 1: _first(4)},
        "7.weight": {0: _first(28), 1: _first(180)},
        "7.bias": {0: _first(28)},
        "10.weight": {1: _first(28)},
        **norms,
    }


_BY_HAND = {
    "channel_multiplier": _channel_multiplier,
    "densenet": _densenet,
    "regnet": _regnet,
    "split_by_concat": _split_by_concat,
    "flatten_to_linear": _flatten_to_linear,
}


@pytest.mark.parametrize("name", _BY_HAND)
def test_slices_are_the_channels_selected_by_hand(name: str):
    model, space = traced(name)
    widths, expected = _BY_HAND[name]()
    state = state_of(model)
    narrow = slice_state(state, space, widths)
    assert list(narrow) == list(state)
    for key, tensor in state.items():
        axes = expected.pop(key, {})
        assert torch.equal(narrow[key], _select(tensor, axes)), key
        in_one_piece = all(positions == _first(len(positions)) for positions in axes.values())
        assert _is_view(narrow[key], tensor) == in_one_piece, key
    assert not expected
    assert sliced_shapes(state, space, widths) == {key: tuple(tensor.shape) for key, tensor in narrow.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_width_slices_are_the_tensors_themselves(name: str):
    model, space = traced(name)
    state = state_of(model)
    narrow = slice_state(state, space, space.full())
    assert all(narrow[key] is tensor for key, tensor in state.items()) and len(narrow) == len(state)


def test_the_users_tensors_are_not_changed_by_slicing():
    model, space = traced("densenet")
    state = state_of(model)
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    slice_state(state, space, space.smallest())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


@st.composite
def _axis(draw: st.DrawFn, sizes: Mapping[str, int]) -> tuple[tuple[Run, ...], list[tuple[str, int]]]:
    """Draw a layout of an axis and spell it out: (group, unit) of every channel, "" where frozen."""
    runs, channels = [], []
    names = list(sizes)
    for group in draw(st.lists(st.sampled_from(["", *names]), min_size=1, max_size=4)):
        repeat = draw(st.integers(1, 3))
        if not group:
            runs.append(Run(None, 1, repeat))
            channels += [("", 0)] * repeat
        else:
            runs.append(Run(names.index(group), repeat, repeat * sizes[group]))
            channels += [(group, unit) for unit in range(sizes[group]) for _ in range(repeat)]
    return tuple(runs), channels


def _space_of(sizes: Mapping[str, int], layouts: Mapping[str, tuple[tuple[Run, ...], ...]]) -> WidthSpace:
    none = SpaceCosts(macs=ProductCost([], 2), params=ProductCost([], 2), memory=PeakCost([], 2))
    groups = [ChannelGroup(name, size, tuple(range(1, size + 1)), ()) for name, size in sizes.items()]
    return WidthSpace(groups, none, wiring=Wiring(layouts))


@given(st.data())
def test_slices_of_any_layout_are_those_that_a_count_selects(data: st.DataObject):
    sizes = {"a": 4, "b": 3}
    axes = data.draw(st.lists(_axis(sizes), min_size=1, max_size=3))
    widths = Widths({name: data.draw(st.integers(1, size)) for name, size in sizes.items()})
    space = _space_of(sizes, {"w": tuple(layout for layout, _ in axes)})
    shape = [len(channels) for _, channels in axes]
    whole = torch.arange(float(torch.tensor(shape).prod())).reshape(shape).requires_grad_()
    kept = {
        axis: [place for place, (group, unit) in enumerate(channels) if not group or unit < widths[group]]
        for axis, (_, channels) in enumerate(axes)
    }
    state = {"w": whole, "other": torch.ones(2)}
    narrow = slice_state(state, space, widths)
    expected = _select(whole, kept)
    assert torch.equal(narrow["w"], expected) and narrow["other"] is state["other"]
    assert sliced_shapes(state, space, widths) == {"w": tuple(expected.shape), "other": (2,)}
    in_one_piece = all(positions == _first(len(positions), positions[0]) for positions in kept.values())
    assert _is_view(narrow["w"], whole) or not in_one_piece
    (gradient,) = torch.autograd.grad(narrow["w"].sum(), whole)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), whole)
    assert torch.equal(gradient, expected_gradient)


@given(st.data())
def test_slices_from_the_right_are_the_last_units_of_every_group(data: st.DataObject):
    sizes = {"a": 4, "b": 3}
    axes = data.draw(st.lists(_axis(sizes), min_size=1, max_size=3))
    widths = Widths({name: data.draw(st.integers(1, size)) for name, size in sizes.items()})
    space = _space_of(sizes, {"w": tuple(layout for layout, _ in axes)})
    whole = torch.randn([len(channels) for _, channels in axes], dtype=torch.float64, requires_grad=True)
    kept = {
        axis: [
            place for place, (group, unit) in enumerate(channels) if not group or unit >= sizes[group] - widths[group]
        ]
        for axis, (_, channels) in enumerate(axes)
    }
    narrow, expected = SlicePlan(space, widths, from_right=True)({"w": whole})["w"], _select(whole, kept)
    assert torch.equal(narrow, expected)
    in_one_piece = all(positions == _first(len(positions), positions[0]) for positions in kept.values())
    assert _is_view(narrow, whole) or not in_one_piece
    weighting = torch.randn(expected.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(narrow, whole, weighting), torch.autograd.grad(expected, whole, weighting), strict=True
    ):
        assert torch.equal(ours, theirs)


# Slices through autograd ----------------------------------------------------------------------------------------------

_CONCATENATION = (Run(0, 1, 6), Run(None, 1, 2), Run(1, 2, 8), Run(0, 1, 6))
"""Channels of group a (6 units), two frozen ones, those of group b (4 units, two channels each), and a again."""
_SIDES = pytest.mark.parametrize("from_right", [False, True], ids=["left", "right"])


def _by_hand(weight: torch.Tensor, from_right: bool) -> torch.Tensor:
    """Take 4 of 6 units of a and 3 of 4 of b, on axis 0 of 22 channels, and 4 of 6 on axis 1."""
    if from_right:
        parts = [weight[2:6], weight[6:8], weight[10:16], weight[18:22]]
        return torch.cat(parts, 0)[:, 2:6]
    parts = [weight[0:4], weight[6:8], weight[8:14], weight[16:20]]
    return torch.cat(parts, 0)[:, 0:4]


def _plan(*, from_right: bool) -> SlicePlan:
    space = _space_of({"a": 6, "b": 4}, {"w": (_CONCATENATION, (Run(0, 1, 6),), (Run(None, 1, 3),))})
    return SlicePlan(space, Widths({"a": 4, "b": 3}), from_right=from_right)


@_SIDES
def test_the_gradient_of_a_concatenations_slices_is_that_of_plain_indexing(from_right: bool):
    weight = torch.randn(22, 6, 3, dtype=torch.float64, requires_grad=True)
    narrow, expected = _plan(from_right=from_right)({"w": weight})["w"], _by_hand(weight, from_right)
    assert narrow.shape == (16, 4, 3) and torch.equal(narrow, expected)
    weighting = torch.randn_like(narrow)
    (ours,) = torch.autograd.grad((narrow.sin() * weighting).sum(), weight)
    (theirs,) = torch.autograd.grad((expected.sin() * weighting).sum(), weight)
    assert torch.equal(ours, theirs) and (ours == 0).sum() == weight.numel() - narrow.numel()


@_SIDES
def test_slices_have_first_and_second_derivatives(from_right: bool):
    plan = _plan(from_right=from_right)
    weight = torch.randn(22, 6, 3, dtype=torch.float64, requires_grad=True)

    def take(tensor: torch.Tensor) -> torch.Tensor:
        return plan({"w": tensor})["w"]

    assert torch.autograd.gradcheck(take, (weight,))
    (ours,) = torch.autograd.grad(take(weight).pow(3).sum(), weight, create_graph=True)
    (theirs,) = torch.autograd.grad(_by_hand(weight, from_right).pow(3).sum(), weight, create_graph=True)
    for first, second in zip(
        torch.autograd.grad(ours.pow(2).sum(), weight), torch.autograd.grad(theirs.pow(2).sum(), weight), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@_SIDES
def test_gradients_of_several_steps_add_up(from_right: bool):
    weight = torch.randn(22, 6, 3, dtype=torch.float64, requires_grad=True)
    plan = _plan(from_right=from_right)
    for factor in (1.0, 2.0):
        (plan({"w": weight})["w"] * factor).sum().backward()
    counts = torch.zeros(22, 6, 3, dtype=torch.float64, requires_grad=True)
    _by_hand(counts, from_right).sum().backward()
    assert weight.grad is not None and counts.grad is not None
    assert torch.equal(weight.grad, 3 * counts.grad)


@_SIDES
@pytest.mark.parametrize("name", ["densenet", "split_by_concat", "channel_multiplier", "regnet", "split_attention"])
def test_gradients_of_a_models_slices_are_those_of_plain_indexing(name: str, from_right: bool):
    model, space = traced(name)
    state = state_of(model)
    parameters = {name: tensor for name, tensor in state.items() if isinstance(tensor, nn.Parameter)}
    widths = space.uniform(0.5)
    # The positions that stay are read from slices of numbered tensors, which have no gradient.
    numbered = {name: torch.arange(tensor.numel()).reshape(tensor.shape) for name, tensor in parameters.items()}
    plan = SlicePlan(space, widths, from_right=from_right)
    places, narrow = plan(numbered), plan(parameters)
    generator = torch.Generator().manual_seed(0)
    weightings = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for name, tensor in narrow.items()
    }
    loss = torch.stack([(narrow[name] * weightings[name]).sum() for name in parameters]).sum()
    for (name, tensor), gradient in zip(
        parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        expected = torch.zeros(tensor.numel(), dtype=torch.float64)
        expected[places[name].flatten()] = weightings[name].flatten()
        assert torch.equal(gradient, expected.reshape(tensor.shape)), name


def test_slices_without_gradients_have_none():
    plan, weight = _plan(from_right=False), torch.randn(22, 6, 3, requires_grad=True)
    with torch.no_grad():
        assert not plan({"w": weight})["w"].requires_grad
    assert not plan({"w": weight.detach()})["w"].requires_grad
    assert plan({"w": weight})["w"].requires_grad


# Which side, which names ----------------------------------------------------------------------------------------------


def test_slices_from_the_right_are_the_channels_selected_by_hand():
    model, space = traced("densenet")
    widths = Widths({"0": 8, "1.conv": 4, "2.conv": 8, "5": 12, "7.conv": 4})
    # Of 16 + 8 + 8 concatenated channels: the last 8, the last 4, all 8; of 16 + 8: the last 12, the last 4.
    three, last = [*_first(8, 8), *_first(4, 20), *_first(8, 24)], [*_first(12, 4), *_first(4, 20)]
    state = state_of(model)
    narrow = SlicePlan(space, widths, from_right=True)(state)
    for name, axes in {
        "0.weight": {0: _first(8, 8)},
        "1.norm.running_var": {0: _first(8, 8)},
        "1.conv.weight": {0: _first(4, 4), 1: _first(8, 8)},
        "2.norm.bias": {0: [*_first(8, 8), *_first(4, 20)]},
        "3.weight": {0: three},
        "5.weight": {0: _first(12, 4), 1: three},
        "7.conv.weight": {0: _first(4, 4), 1: _first(12, 4)},
        "8.running_mean": {0: last},
        "10.3.weight": {1: last},
        "10.3.bias": {},
    }.items():
        assert torch.equal(narrow[name], _select(state[name], axes)), name


def test_a_unit_of_several_channels_stays_whole_from_the_right():
    model, space = traced("channel_multiplier")
    state = state_of(model)
    narrow = SlicePlan(space, Widths({"0.0": 12, "5.0": 8}), from_right=True)(state)
    for name, axes in {
        "0.0.weight": {0: _first(12, 4)},
        "2.weight": {0: _first(24, 8)},
        "2.bias": {0: _first(24, 8)},
        "5.0.weight": {0: _first(8, 8), 1: _first(24, 8)},
        "7.3.weight": {1: _first(8, 8)},
    }.items():
        assert torch.equal(narrow[name], _select(state[name], axes)), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slices_from_the_right_have_the_shapes_of_those_from_the_left(name: str):
    model, space = traced(name)
    state = state_of(model)
    for widths in (space.smallest(), space.uniform(0.75)):
        narrow = SlicePlan(space, widths, from_right=True)(state)
        assert {key: tuple(tensor.shape) for key, tensor in narrow.items()} == sliced_shapes(state, space, widths)
    whole = SlicePlan(space, space.full(), from_right=True)(state)
    assert all(whole[key] is tensor for key, tensor in state.items())


def test_a_plan_for_some_names_slices_these_as_a_plan_for_all_does():
    model, space = traced("densenet")
    state, widths = state_of(model), space.smallest()
    names = ["5.weight", "3.bias", "10.3.bias"]
    own = {name: state[name] for name in names}
    some, every = SlicePlan(space, widths, names)(own), SlicePlan(space, widths)(own)
    assert list(some) == names
    assert all(torch.equal(some[name], every[name]) for name in names)
    assert some["5.weight"].shape == (4, 12, 1, 1) and some["3.bias"].shape == (12,) and some["10.3.bias"].shape == (5,)


def test_a_plan_for_no_names_slices_nothing():
    model, space = traced("densenet")
    assert SlicePlan(space, space.smallest(), [])({}) == {}


def test_a_setting_of_another_space_is_refused():
    model, space = traced("vgg_bn")
    state, wrong = state_of(model), Widths({**space.full(), "3.0": 7})
    for use in (slice_state, sliced_shapes):
        with pytest.raises(InputError, match="7 is not a choice of group '3.0'"):
            use(state, space, wrong)


# The state ------------------------------------------------------------------------------------------------------------


def test_the_state_is_the_models_own_tensors_buffers_and_all():
    model, _ = traced("resnet_basic")
    state = state_of(model)
    assert set(state) == set(model.state_dict())
    assert all(
        tensor is model.get_parameter(name) for name, tensor in state.items() if isinstance(tensor, nn.Parameter)
    )
    assert state["0.1.running_mean"] is model.get_buffer("0.1.running_mean")


def test_tied_tensors_come_under_each_name_and_one_module_under_its_first_path():
    tied, _ = traced("tied_weights")
    state = state_of(tied)
    assert state["first.0.weight"] is state["second.0.weight"]
    twice, _ = traced("one_module_in_two_places")
    assert "first.0.0.weight" in state_of(twice)
    assert not [name for name in state_of(twice) if name.startswith("again")]


# Narrow modules -------------------------------------------------------------------------------------------------------


def _narrow(name: str, widths: Callable[[WidthSpace], Widths]) -> tuple[nn.Module, nn.Module]:
    model, space = traced(name)
    return model, narrow_module(model, sliced_shapes(state_of(model), space, widths(space)))


_ATTRIBUTES = {
    "regnet": (
        {"0.0": 8, "2.conv1.0": 12, "2.se.reduce": 4, "2.conv3.0": 16, "3.conv1.0": 16, "3.se.reduce": 8,
         "3.conv3.0": 8},
        {"0.0": "Conv2d(3, 8,", "0.1": "BatchNorm2d(8,", "2.conv1.0": "Conv2d(8, 12,", "2.se.expand": "Conv2d(4, 12,",
         "2.conv2.0": "Conv2d(12, 12, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=3,",
         "3.conv2.0": "Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2,",
         "4.3": "Linear(in_features=8, out_features=5,"},
    ),
    "mobilenet_v1": (
        {"0.0": 4, "2.2.0": 20, "3.2.0": 8},
        {"2.0.0": "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4,",
         "3.0.0": "Conv2d(20, 20, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=20,",
         "3.0.1": "BatchNorm2d(20,", "3.2.0": "Conv2d(20, 8,"},
    ),
    "channel_multiplier": (
        {"0.0": 12, "5.0": 8},
        {"2": "Conv2d(12, 24, kernel_size=(3, 3), stride=(1, 1), groups=12)", "3": "BatchNorm2d(24,",
         "5.0": "Conv2d(24, 8,"},
    ),
    "flatten_to_linear": (
        {"0.0": 4, "3.0": 20, "7": 28},
        {"7": "Linear(in_features=180, out_features=28,", "8": "BatchNorm1d(28,",
         "10": "Linear(in_features=28, out_features=5,"},
    ),
    "group_norms": (
        {"0": 8, "3": 12, "6": 4},
        {"1": "GroupNorm(2, 8,", "4": "GroupNorm(1, 12,", "7": "InstanceNorm2d(4,", "8": "PReLU(num_parameters=4)"},
    ),
    "convnext": (
        {"0": 8, "2.fc1": 12, "4": 20, "5.fc1": 16},
        {"1": "LayerNorm2d((8,),", "2.norm": "LayerNorm((8,),", "2.fc1": "Linear(in_features=8, out_features=12,",
         "2.depthwise": "Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=8)"},
    ),
    "up_and_down": (
        {"down1.0": 8, "down2.0": 12, "up": 4, "mix.0": 16},
        {"up": "ConvTranspose2d(12, 4,", "norm": "BatchNorm2d(4,", "mix.0": "Conv2d(12, 16,", "out": "Conv2d(4, 5,"},
    ),
    "norm_without_affine": ({"0": 8, "3": 12}, {"1": "BatchNorm2d(8,", "4": "BatchNorm2d(12,"}),
    "norm_without_statistics": ({"0": 8, "3": 12}, {"1": "BatchNorm2d(8,"}),
}  # fmt: skip


@pytest.mark.parametrize("name", _ATTRIBUTES)
def test_the_layers_of_a_narrow_module_say_how_narrow_they_are(name: str):
    widths, expected = _ATTRIBUTES[name]
    _, narrow = _narrow(name, lambda space: Widths(widths))
    for path, words in expected.items():
        assert repr(narrow.get_submodule(path)).startswith(words)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_narrow_module_has_the_shapes_of_the_slices_and_runs(name: str):
    model, space = traced(name)
    widths = space.uniform(0.5)
    state = state_of(model)
    attributes = narrow_attributes(model, space, widths)
    narrow = narrow_module(model, sliced_shapes(state, space, widths), attributes=attributes)
    slices = slice_state(state, space, widths)
    assert {key: tensor.shape for key, tensor in state_of(narrow).items()} == {
        key: tensor.shape for key, tensor in slices.items()
    }
    load_slices(narrow, slices)
    assert all(torch.equal(tensor, slices[key]) for key, tensor in state_of(narrow).items())
    assert all(not _is_view(tensor, state[key]) for key, tensor in state_of(narrow).items())
    x = ARCHITECTURES[name].batch(2)
    with torch.no_grad():
        y = narrow.eval()(x)
        assert y.shape == copy.deepcopy(model).eval()(x).shape and y.isfinite().all()


def test_numbers_that_modules_keep_and_that_count_channels_follow_the_widths():
    model, space = traced("cut_by_numbers")
    shapes = sliced_shapes(state_of(model), space, space.smallest())
    attributes = narrow_attributes(model, space, space.smallest())
    width = shapes["2.convs.0.0.weight"][1]
    sizes = [shapes["3.conv.weight"][1], shapes["3.mix.0.weight"][1] - shapes["3.conv.weight"][0]]
    assert attributes == {"2": {"width": width}, "3": {"sizes": sizes}}
    assert width < 16 and sizes[0] < 8 and sizes[1] < 24
    narrow = narrow_module(model, shapes, attributes=attributes)
    for module, expected in ((narrow, (width, sizes)), (model, (16, [8, 24]))):
        kept = {**vars(module.get_submodule("2")), **vars(module.get_submodule("3"))}
        assert (kept["width"], kept["sizes"]) == expected
    assert narrow_attributes(model, space, space.full()) == {}


def test_making_a_narrow_module_changes_nothing_of_the_model():
    model = ARCHITECTURES["resnet_basic"].model()
    _, space = traced("resnet_basic")
    model.train()
    model.get_submodule("0.1").eval()
    model(ARCHITECTURES["resnet_basic"].batch(2)).sum().backward()
    text, tensors = repr(model), {name: tensor.detach().clone() for name, tensor in state_of(model).items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    narrow = narrow_module(model, sliced_shapes(state_of(model), space, space.smallest()))
    load_slices(narrow, slice_state(state_of(model), space, space.smallest()))
    assert repr(model) == text and repr(narrow) != text
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in state_of(model).items())
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is None and parameter.is_leaf for parameter in narrow.parameters())
    assert narrow.training and not narrow.get_submodule("0.1").training


def test_tied_parameters_stay_tied():
    model, narrow = _narrow("tied_weights", lambda space: space.smallest())
    assert narrow.get_parameter("first.0.weight") is narrow.get_parameter("second.0.weight")
    assert narrow.get_parameter("first.0.weight").shape == (4, 4, 3, 3)
    assert narrow.get_parameter("first.0.weight") is not model.get_parameter("first.0.weight")


def test_one_module_in_two_places_stays_one():
    _, narrow = _narrow("one_module_in_two_places", lambda space: space.smallest())
    assert narrow.get_submodule("first") is narrow.get_submodule("again")
    assert repr(narrow.get_submodule("again.0.0")).startswith("Conv2d(4, 4,")


def test_a_narrow_module_keeps_dtype_and_what_needs_no_gradient():
    model = ARCHITECTURES["vgg_bn"].model(dtype=torch.float16)
    model.get_parameter("0.0.weight").requires_grad_(False)
    narrow = narrow_module(model, {"0.0.weight": (4, 3, 3, 3)})
    assert narrow.get_parameter("0.0.weight").shape == (4, 3, 3, 3)
    assert not narrow.get_parameter("0.0.weight").requires_grad
    assert narrow.get_parameter("3.0.weight").requires_grad
    assert narrow.get_parameter("3.0.weight").dtype == narrow.get_buffer("0.1.running_mean").dtype == torch.float16
    assert narrow.get_buffer("0.1.num_batches_tracked").dtype == torch.int64


def test_names_left_out_keep_their_shape():
    model, _ = traced("vgg_bn")
    narrow = narrow_module(model, {})
    assert repr(narrow) == repr(model)
    assert all(tensor.shape == state_of(model)[name].shape for name, tensor in state_of(narrow).items())


def test_a_skeleton_on_the_meta_device_holds_no_storage():
    model, space = traced("mobilenet_v2")
    narrow = narrow_module(model, sliced_shapes(state_of(model), space, space.smallest()), device="meta")
    assert all(tensor.is_meta for tensor in state_of(narrow).values())
    assert not any(tensor.is_meta for tensor in state_of(model).values())


# Resizers -------------------------------------------------------------------------------------------------------------


def test_a_second_resizer_for_a_layer_type_is_refused():
    before = dict(slicing._RESIZERS)
    with pytest.raises(ValueError, match="Linear has a resizer already"):
        resizer(nn.Linear)(lambda layer, shapes: None)
    assert slicing._RESIZERS == before


def test_a_layer_type_of_ones_own_gets_a_resizer_that_runs_after_its_base_class(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slicing, "_RESIZERS", dict(slicing._RESIZERS))

    class Counting(nn.Conv2d):
        num_weights = 0

    @resizer(Counting)
    def _count(layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        assert isinstance(layer, Counting)
        layer.num_weights = layer.out_channels * layer.in_channels
        assert shapes["weight"] == (8, 3, 1, 1)

    model = nn.Sequential(Counting(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    space = psenet.trace(copy.deepcopy(model), torch.randn(1, 3, 4, 4), keep_ratios=(0.5,))
    narrow = narrow_module(model, sliced_shapes(state_of(model), space, space.smallest()))
    layer = narrow.get_submodule("0")
    assert isinstance(layer, Counting) and layer.num_weights == 24 and model[0].num_weights == 0
