import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import psenet
from architectures import ARCHITECTURES, traced
from psenet.errors import InputError
from psenet.space import WidthSpace
from psenet.tracing.call import Call
from psenet.tracing.facts import Value
from psenet.tracing.rules import RULES, rule
from psenet.widths import Widths

Between = Callable[[Any, torch.Tensor], torch.Tensor]

_OUTPUT = "the model's output"


def _reasons(space: WidthSpace) -> dict[str, str]:
    return {frozen.layer: frozen.reason for frozen in space.frozen}


def _names(space: WidthSpace) -> list[str]:
    return [group.name for group in space.groups]


def _chain(*sizes: int) -> nn.Sequential:
    """Convolutions of one pixel, named 0, 1, 2, ... after their place."""
    return nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in zip(sizes, sizes[1:], strict=False)))


def _trace(model: nn.Module, shape: tuple[int, ...] = (2, 3, 8, 8), **settings: Any) -> WidthSpace:
    return psenet.trace(model, torch.randn(shape), **{"divisor": 4, **settings})


class _Net(nn.Module):
    """Three convolutions of one pixel: a, b, c (3 -> 16 -> 8 -> 4), with something of one's own between a and b."""

    def __init__(self, between: Between, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)
        self.extra = nn.Identity() if extra is None else extra
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.between(self, self.a(x))).relu())


# Groups, by hand ------------------------------------------------------------------------------------------------------

_GROUPS = {
    "vgg_bn": {
        "0.0": (16, "0.0 0.1 3.0"),
        "3.0": (24, "3.0 3.1 5.0"),
        "5.0": (32, "5.0 5.1 7.3"),
    },
    "resnet_basic": {
        # The stem meets what the first block adds to it; the second block's output meets its shortcut and the third's.
        "0.0": (16, "0.0 0.1 2.conv1.0 2.conv2.0 2.conv2.1 3.conv1.0 3.shortcut.0"),
        "2.conv1.0": (16, "2.conv1.0 2.conv1.1 2.conv2.0"),
        "3.conv1.0": (24, "3.conv1.0 3.conv1.1 3.conv2.0"),
        "3.conv2.0": (24, "3.conv2.0 3.conv2.1 3.shortcut.0 3.shortcut.1 4.conv1.0 4.conv2.0 4.conv2.1 5.3"),
        "4.conv1.0": (24, "4.conv1.0 4.conv1.1 4.conv2.0"),
    },
    "mobilenet_v2": {
        "0.0": (16, "0.0 0.1 2.expand.0.0 2.project.0 2.project.1 3.expand.0.0"),
        "2.expand.0.0": (24, "2.expand.0.0 2.expand.0.1 2.depthwise.0.0 2.depthwise.0.1 2.project.0"),
        "3.expand.0.0": (32, "3.expand.0.0 3.expand.0.1 3.depthwise.0.0 3.depthwise.0.1 3.project.0"),
        "3.project.0": (24, "3.project.0 3.project.1 4.0"),
        "4.0": (32, "4.0 4.1 6.3"),
    },
    "densenet": {
        # Every reader of the growing concatenation follows each of its parts.
        "0": (16, "0 1.norm 1.conv 2.norm 2.conv 3 5"),
        "1.conv": (8, "1.conv 2.norm 2.conv 3 5"),
        "2.conv": (8, "2.conv 3 5"),
        "5": (16, "5 7.norm 7.conv 8 10.3"),
        "7.conv": (8, "7.conv 8 10.3"),
    },
    "split_by_concat": {
        "stem.0": (16, "stem.0 stem.1 a.0 b.0 c.0"),
        "a.0": (8, "a.0 a.1 c.0 c.1 mix.0"),
        "b.0": (16, "b.0 b.1 c.0 c.1 mix.0"),
        "mix.0": (16, "mix.0 mix.1 head.3"),
    },
    "regnet": {
        "0.0": (16, "0.0 0.1 2.conv1.0 2.shortcut.0"),
        "2.conv1.0": (24, "2.conv1.0 2.conv1.1 2.conv2.0 2.conv2.1 2.se.reduce 2.se.expand 2.conv3.0"),
        "2.se.reduce": (8, "2.se.reduce 2.se.expand"),
        "2.conv3.0": (24, "2.conv3.0 2.conv3.1 2.shortcut.0 2.shortcut.1 3.conv1.0 3.shortcut.0"),
        "3.conv1.0": (32, "3.conv1.0 3.conv1.1 3.conv2.0 3.conv2.1 3.se.reduce 3.se.expand 3.conv3.0"),
        "3.se.reduce": (8, "3.se.reduce 3.se.expand"),
        "3.conv3.0": (32, "3.conv3.0 3.conv3.1 3.shortcut.0 3.shortcut.1 4.3"),
    },
    "channel_multiplier": {
        "0.0": (16, "0.0 0.1 2 3 5.0"),
        "5.0": (16, "5.0 5.1 7.3"),
    },
    "flatten_to_linear": {
        "0.0": (16, "0.0 0.1 3.0"),
        "3.0": (24, "3.0 3.1 7"),
        "7": (32, "7 8 10"),
    },
    "called_twice": {
        "stem.0": (16, "stem.0 stem.1 block.0 block.1 down.0"),
        "down.0": (24, "down.0 down.1 head.3"),
    },
    "tied_weights": {
        # One weight maps the stem's channels to the first's and these to the second's: all three are one.
        "stem.0": (16, "stem.0 stem.1 first.0 first.1 second.0 second.1 wide.0"),
        "wide.0": (24, "wide.0 wide.1 head.3"),
    },
    "one_module_in_two_places": {
        "stem.0": (16, "stem.0 stem.1 first.0.0 first.0.1 wide.0"),
        "wide.0": (24, "wide.0 wide.1 head.3"),
    },
    "convnext": {
        # A layer scale and a norm over channels follow them.
        "0": (16, "0 1 2 2.depthwise 2.norm 2.fc1 2.fc2 3 4"),
        "2.fc1": (32, "2.fc1 2.fc2"),
        "4": (24, "4 5 5.depthwise 5.norm 5.fc1 5.fc2 6.3"),
        "5.fc1": (48, "5.fc1 5.fc2"),
    },
    "selective_kernel": {
        # The gates stand for the branches one after the other.
        "0.0": (16, "0.0 0.1 2.small.0 2.large.0"),
        "2.small.0": (16, "2.small.0 2.small.1 2.large.0 2.large.1 2.reduce 2.expand 3.0"),
        "2.reduce": (8, "2.reduce 2.expand"),
        "3.0": (24, "3.0 3.1 5.3"),
    },
    "up_and_down": {
        "down1.0": (16, "down1.0 down1.1 down2.0 mix.0"),
        "down2.0": (24, "down2.0 down2.1 up"),
        "up": (16, "up norm mix.0"),
        "mix.0": (32, "mix.0 mix.1 out"),
    },
    "shufflenet": {
        # The halves of the stem are tied through the shuffle, and so are the blocks.
        "0.0": (16, "0.0 0.1 2.branch.0.0 2.branch.2.0 2.branch.2.1 3.branch.0.0 3.branch.2.0 3.branch.2.1 4.0"),
        "2.branch.0.0": (8, "2.branch.0.0 2.branch.0.1 2.branch.2.0"),
        "3.branch.0.0": (8, "3.branch.0.0 3.branch.0.1 3.branch.2.0"),
        "4.0": (24, "4.0 4.1 5.3"),
    },
    "functional_dropout": {
        "conv1": (16, "conv1 norm1 conv2"),
        "conv2": (24, "conv2 fc1"),
        "fc1": (16, "fc1 fc2"),
    },
}


@pytest.mark.parametrize("name", _GROUPS)
def test_channel_groups_are_those_found_by_hand(name: str):
    groups = traced(name)[1].groups
    assert [group.name for group in groups] == list(_GROUPS[name])
    assert {group.name: (group.size, sorted(group.layers)) for group in groups} == {
        group: (size, sorted(layers.split())) for group, (size, layers) in _GROUPS[name].items()
    }


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("regnet", {"2.conv1.0": 4, "3.conv1.0": 8}),  # grouped convolutions
        ("group_norms", {"0": 4}),
        ("up_and_down", {"mix.0": 4}),  # a pixel shuffle
        ("shufflenet", {"0.0": 4}),  # one block ties halves, a second one quarters
        ("mobilenet_v2", {}),
    ],
)
def test_channels_live_and_die_in_the_blocks_that_an_op_makes(name: str, units: dict[str, int]):
    for group in traced(name)[1].groups:
        assert group.unit == units.get(group.name, 1)
        assert all(width % group.unit == 0 for width in group.choices)


@pytest.mark.parametrize("name", _GROUPS)
def test_the_last_layer_is_frozen_and_nothing_else_is(name: str):
    (frozen,) = traced(name)[1].frozen
    assert (
        frozen.layer
        == [path for path, layer in traced(name)[0].named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    )
    if name == "functional_dropout":
        assert frozen.reason == "normalises over channels (aten.log_softmax.int in the model itself)"
    else:
        assert frozen.reason == _OUTPUT


def test_a_convolution_that_makes_one_channel_is_not_taken_for_depthwise():
    model = _chain(3, 16, 1, 8, 2)
    space = _trace(model)
    assert {group.name: group.layers for group in space.groups} == {"0": ("0", "1"), "2": ("2", "3")}
    assert _reasons(space) == {"1": "one channel cannot be fewer", "3": _OUTPUT}


def test_a_convolution_that_reads_one_channel_is_not_taken_for_depthwise():
    space = _trace(_chain(1, 16, 2), (2, 1, 8, 8))
    assert [(group.name, group.size, group.unit) for group in space.groups] == [("0", 16, 1)]


def test_a_gate_of_one_channel_leaves_what_it_gates_elastic():
    space = _trace(_Net(lambda net, x: x * net.extra(x).sigmoid(), nn.Conv2d(16, 1, 3, padding=1)))
    assert {group.name: group.layers for group in space.groups} == {"a": ("a", "extra", "b"), "b": ("b", "c")}
    assert _reasons(space) == {"extra": "one channel cannot be fewer", "c": _OUTPUT}


def test_channels_of_the_input_beside_others_stay_and_the_others_vary():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(19, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.cat([x, self.a(x)], 1))

    model = Net()
    space = _trace(model)
    assert [(group.name, group.layers) for group in space.groups] == [("a", ("a", "b"))]
    assert psenet.Supernet(model, space).extract(Widths({"a": 4})).get_parameter("b.weight").shape == (2, 7, 1, 1)


def test_a_sum_with_the_input_freezes_what_is_added_to_it():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(x + self.b(self.a(x).relu()))

    space = _trace(Net(), (2, 8, 4, 4))
    assert _names(space) == ["a"]
    assert _reasons(space)["b"].startswith("meets a tensor of fixed size on its channel axis (aten.add.Tensor in")


def test_a_depthwise_convolution_of_the_input_is_frozen_because_of_the_input():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), *_chain(3, 16, 4))
    space = _trace(model)
    assert _names(space) == ["1"]
    reason = _reasons(space)["0"]
    assert "one channel" not in reason and "input" in reason


def test_a_convolution_of_which_some_channels_are_frozen_is_cut():
    class Net(nn.Module):
        """The first three channels of a meet those of the input, the others those of b."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 13, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + torch.cat([x, self.b(x)], 1))

    space = _trace(Net(), divisor=1)
    assert [(group.name, group.size, group.layers) for group in space.groups] == [("a[3:16]", 13, ("a", "b", "c"))]
    assert _reasons(space)["a"] == "meets channels that always stay (aten.add.Tensor in the model itself)"


def test_a_channel_shuffle_before_a_grouped_convolution_stays_elastic():
    def shuffle(net: Any, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        return net.extra(x.view(batch, 4, channels // 4, height, width).transpose(1, 2).reshape(x.shape))

    # Each block of the convolution reads every fourth channel, so these live and die together.
    space = _trace(_Net(shuffle, nn.Conv2d(16, 16, 3, groups=4)), divisor=1)
    assert "a" in _names(space)
    assert all(group.unit == 4 for group in space.groups if group.name == "a")


def test_a_transformers_block_on_channels_last_is_elastic():
    def block(net: Any, x: torch.Tensor) -> torch.Tensor:
        return x + net.extra(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    space = _trace(_Net(block, nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))))
    assert [(group.name, group.size, group.layers) for group in space.groups] == [
        ("a", 16, ("a", "extra.0", "extra.2", "b")),
        ("extra.0", 24, ("extra.0", "extra.2")),
        ("b", 8, ("b", "c")),
    ]


def test_convolutions_called_by_hand_in_one_module_are_groups_with_names_of_their_own():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(16, 3, 3, 3)), nn.Parameter(torch.randn(24, 16, 3, 3))
            self.norm1, self.norm2, self.out = nn.BatchNorm2d(16), nn.BatchNorm2d(24), nn.Conv2d(24, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm1(F.conv2d(x, self.first)).relu()
            return self.out(self.norm2(F.conv2d(x, self.second)).relu())

    space = _trace(Net())
    assert [group.size for group in space.groups] == [16, 24]
    assert len(set(_names(space))) == 2
    assert space.macs(space.full()) == 36 * 3 * 9 * 16 + 16 * 16 * 9 * 24 + 16 * 24 * 4


# Choices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "settings", "choices"),
    [
        (32, {}, (8, 16, 24, 32)),
        (20, {"divisor": 8}, (8, 16, 20)),
        (64, {"divisor": 16}, (16, 32, 48, 64)),
        (64, {"divisor": 8}, (16, 24, 32, 40, 48, 56, 64)),
        (32, {"min_ratio": 0.5}, (16, 24, 32)),
        (32, {"min_ratio": 0.51}, (24, 32)),
        (10, {"divisor": 1, "min_ratio": 0.85}, (9, 10)),
        (4, {"divisor": 1, "min_ratio": 1e-9}, (1, 2, 3, 4)),
        (100, {"divisor": 4, "min_ratio": 0.88}, (88, 92, 96, 100)),
        (100, {"divisor": 28, "min_ratio": 0.28}, (28, 56, 84, 100)),
        (16, {"keep_ratios": (0.25, 0.5, 0.75, 1)}, (4, 8, 12, 16)),
        (16, {"keep_ratios": [0.75, 0.25, 0.75]}, (4, 12, 16)),
        (16, {"keep_ratios": (0.5,)}, (8, 16)),
        (10, {"keep_ratios": (0.3, 0.68)}, (3, 7, 10)),
        (16, {"keep_ratios": (0.01,)}, (1, 16)),
        (16, {"keep_ratios": (0.5,), "divisor": 999, "min_ratio": 1.0}, (8, 16)),
    ],
)
def test_choices_follow_the_settings(size: int, settings: dict[str, Any], choices: tuple[int, ...]):
    (group,) = psenet.trace(_chain(3, size, 2), torch.randn(1, 3, 4, 4), **settings).groups
    assert group.choices == choices and group.size == size


@pytest.mark.parametrize(
    ("settings", "choices"),
    [
        ({"divisor": 24}, (24, 48)),
        ({"divisor": 6}, (12, 24, 36, 48)),
        ({"divisor": 1, "min_ratio": 0.5}, (24, 36, 48)),
        ({"keep_ratios": (0.1, 0.4, 0.5)}, (12, 24, 48)),
    ],
)
def test_choices_of_a_grouped_convolution_are_whole_blocks(settings: dict[str, Any], choices: tuple[int, ...]):
    model = nn.Sequential(
        nn.Conv2d(3, 48, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=4), nn.ReLU(), nn.Conv2d(48, 2, 1)
    )
    (group,) = _trace(model, **settings).groups
    assert (group.unit, group.choices) == (12, choices)


def test_what_has_no_smaller_choice_is_frozen():
    space = _trace(_chain(3, 8, 16, 2), divisor=8)
    assert _names(space) == ["1"]
    assert _reasons(space) == {"0": "no smaller width is allowed than 8", "2": _OUTPUT}


# Include and exclude --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names", "reasons"),
    [
        ({"include": ["1"]}, ["0", "1"], {"2": "not included"}),  # layer 1 reads the channels that layer 0 makes
        ({"include": ["0"]}, ["0"], {"1": "not included", "2": "not included"}),
        ({"include": ["[01]"]}, ["0", "1"], {"2": "not included"}),
        ({"include": ["*"]}, ["0", "1", "2"], {}),
        ({"exclude": ["1"]}, ["2"], {"0": "excluded", "1": "excluded"}),
        ({"exclude": ["0"]}, ["1", "2"], {"0": "excluded"}),
        ({"exclude": ["0", "3"]}, ["1"], {"0": "excluded", "2": "excluded"}),
        ({"include": ["1"], "exclude": ["0"]}, ["1"], {"0": "excluded", "2": "not included"}),
        ({"include": ("0", "3"), "exclude": ()}, ["0", "2"], {"1": "not included"}),
    ],
)
def test_patterns_choose_the_groups_by_their_layers(
    settings: dict[str, Any], names: list[str], reasons: dict[str, str]
):
    space = _trace(_chain(3, 8, 16, 24, 2), **settings)
    assert _names(space) == names
    assert _reasons(space) == {**reasons, "3": _OUTPUT}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_match_nothing_are_refused(option: str):
    words = f"{option}: no elastic layer matches ['layer1.*', '7']; layers are named like ['0', '1', '1']"
    settings: dict[str, Any] = {option: ["layer1.*", "0", "7"]}
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        _trace(_chain(3, 8, 16, 2), **settings)


def test_a_pattern_stands_for_the_whole_path():
    model = nn.Sequential(nn.Sequential(*_chain(3, 8, 16)), nn.Sequential(*_chain(16, 24, 2)))
    assert _names(_trace(model, include=["0.*"])) == ["0.0", "0.1"]
    assert _names(_trace(model, exclude=["0.0"])) == ["0.1", "1.0"]
    with pytest.raises(InputError, match="no elastic layer matches"):
        _trace(model, exclude=["0"])


# What freezes, and why ------------------------------------------------------------------------------------------------


@torch.library.custom_op("psenet_tests::twice", mutates_args=())
def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("psenet_tests::total", mutates_args=())
def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum(0)


@_twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@_total.register_fake
def _(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.empty_like(parts[0])


class _Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _twice(x)


def _across(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.extra(x.transpose(1, 2)).transpose(1, 2)


def _extra(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.extra(x)


_UNKNOWN: dict[str, tuple[Between, Callable[[], nn.Module], str]] = {
    "plain": (lambda net, x: x.cumsum(1), nn.Identity, "aten.cumsum.default in the model itself"),
    "two results": (lambda net, x: x.sort(1)[0], nn.Identity, "aten.sort.default in the model itself"),
    "in place": (lambda net, x: x.cumsum_(2), nn.Identity, "aten.cumsum_.default in the model itself"),
    "custom": (lambda net, x: _twice(x), nn.Identity, "psenet_tests.twice.default in the model itself"),
    "custom on a list": (lambda net, x: _total([x, x]), nn.Identity, "psenet_tests.total.default in the model itself"),
    "in a module": (_extra, lambda: nn.Sequential(nn.ReLU(), _Twice()), "psenet_tests.twice.default in extra.1"),
}

_FREEZING: dict[str, tuple[Between, Callable[[], nn.Module], str]] = {
    "convolution": (
        _across,
        lambda: nn.Conv2d(16, 16, 1),
        "channels are not on axis 1 of a batch (aten.conv2d.default in extra)",
    ),
    "linear": (
        _extra,
        lambda: nn.Linear(16, 16),
        "channels are not on the last axis (aten.linear.default in extra)",
    ),
    "norm": (
        _across,
        lambda: nn.BatchNorm2d(16),
        "channels are not on axis 1 (aten.batch_norm.default in extra)",
    ),
    "pool": (
        _across,
        lambda: nn.MaxPool2d(1),
        "channels are not on axis 1 (aten.max_pool2d.default in extra)",
    ),
    "not finite": (
        lambda net, x: x.abs() ** -0.5,
        nn.Identity,
        "is not finite at zero (aten.pow.Tensor_Scalar in the model itself)",
    ),
    "division": (
        lambda net, x: x / (x.square() + 1),
        nn.Identity,
        "divides by channels (aten.div.Tensor in the model itself)",
    ),
    "fixed size": (
        lambda net, x: x * torch.linspace(1, 2, 16).view(16, 1, 1),
        nn.Identity,
        "meets a tensor of fixed size on its channel axis (aten.mul.Tensor in the model itself)",
    ),
    "reduction": (
        lambda net, x: x + x.prod(1, keepdim=True),
        nn.Identity,
        "no rule for this op (aten.prod.dim_int in the model itself)",
    ),
    "softmax": (
        lambda net, x: x.softmax(1),
        nn.Identity,
        "normalises over channels (aten.softmax.int in the model itself)",
    ),
    "order": (
        lambda net, x: x.flip(1),
        nn.Identity,
        "moves channels (aten.flip.default in the model itself)",
    ),
    "padding": (
        lambda net, x: net.extra(F.pad(x, (0, 0, 0, 0, -1, 1))),
        lambda: nn.Conv2d(16, 16, 1),
        "pads channels (aten.pad.default in the model itself)",
    ),
    "batch": (
        lambda net, x: x.view(1, -1, 16, 16).view(x.shape),
        nn.Identity,
        "moves the batch axis (aten.view.default in the model itself)",
    ),
    "concatenation": (
        lambda net, x: net.extra(torch.cat([x, x.transpose(1, 2)], 1)),
        lambda: nn.Conv2d(32, 16, 1),
        "concatenates across channels (aten.cat.default in the model itself)",
    ),
    "computed weight": (
        lambda net, x: F.conv2d(x, net.extra.weight.sort(0)[0]),
        lambda: nn.Conv2d(16, 16, 1),
        "the weight is computed, not a parameter (aten.conv2d.default in the model itself)",
    ),
}


@pytest.mark.parametrize("case", _UNKNOWN)
def test_an_op_without_a_rule_freezes_what_it_touches_and_nothing_else(case: str):
    between, extra, place = _UNKNOWN[case]
    space = _trace(_Net(between, extra()), (2, 3, 16, 16))
    assert _names(space) == ["b"]
    assert _reasons(space)["a"] == f"no rule for this op ({place})"


@pytest.mark.parametrize("case", _FREEZING)
def test_what_depends_on_the_number_of_channels_freezes_them_and_says_why(case: str):
    between, extra, reason = _FREEZING[case]
    space = _trace(_Net(between, extra()), (2, 3, 16, 16))
    assert _reasons(space)["a"] == reason
    assert "a" not in _names(space) and "b" in _names(space)


def _without_gradients(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.extra(x)


def _without_autocast(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return net.extra(x)


@pytest.mark.parametrize("between", [_without_gradients, _without_autocast])
def test_a_part_of_the_forward_in_a_context_manager_does_not_crash(between: Between):
    # torch.export makes a graph of its own of it.
    model = _Net(between, nn.Conv2d(16, 16, 1))
    space = _trace(model)
    assert "b" in _names(space)
    assert {"a", "c"} <= {*_names(space), *_reasons(space)}


@pytest.mark.parametrize("between", [lambda net, x: x.float().tanh(), lambda net, x: x.double().tanh().float()])
def test_conversions_of_the_type_leave_channels_elastic(between: Between):
    assert _names(_trace(_Net(between))) == ["a", "b"]


def _macs_by_layer(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Count with hooks: each output of a layer takes as many MACs as one row of its weight has elements."""
    macs: dict[str, int] = {}

    def count(path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(layer: nn.Module, args: Any, out: torch.Tensor) -> None:
            macs[path] = macs.get(path, 0) + out.numel() * layer.get_parameter("weight")[0].numel()

        return hook

    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count(path))
    model(x)
    return macs


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v3", "densenet", "called_twice", "tied_weights"])
def test_macs_shares_are_those_that_the_layers_have_by_hand(name: str):
    model = copy.deepcopy(traced(name)[0]).float()
    x = ARCHITECTURES[name].batch(1, dtype=torch.float32)
    macs = _macs_by_layer(copy.deepcopy(model).eval(), x)
    groups = traced(name)[1].groups
    space = psenet.trace(model, x, divisor=4, include=[groups[0].name])
    shares = {frozen.layer: frozen.macs_share for frozen in space.frozen}
    elastic = {layer for layer in macs if layer not in shares}
    total = sum(macs.values())
    for layer, share in shares.items():
        assert share == pytest.approx(macs[layer] / total, rel=1e-12)
    assert sum(shares.values()) == pytest.approx(1 - sum(macs[layer] for layer in elastic) / total, rel=1e-12)
    assert elastic and elastic <= set(groups[0].layers) and 0 < sum(shares.values()) < 1


# The proof ------------------------------------------------------------------------------------------------------------


class _HardCodedView(nn.Module):
    """A flatten whose author counted the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3, 2)
        self.linear, self.out = nn.Linear(32, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.out(self.linear(x.view(-1, 32)).relu())


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_hard_coded_view_is_caught_and_everything_else_stays_elastic(batch_size: int):
    space = _trace(_HardCodedView(), (batch_size, 3, 8, 8))
    assert _names(space) == ["first", "linear"]
    reason = _reasons(space)["second"]
    assert reason.startswith("the model's own code fails when it is narrower: RuntimeError: ")
    assert _reasons(space) == {"second": reason, "out": _OUTPUT}


_WRONG_WHEN_NARROW: dict[str, tuple[Between, str]] = {
    "scale": (lambda net, x: x * x.shape[1], "the narrower model computes something else than the masked one"),
    "shape": (
        lambda net, x: x if x.shape[1] == 16 else x[:, :, :1],
        "its output changes shape, (2, 4, 8, 8) to (2, 4, 1, 8), when it is narrower",
    ),
    "failure": (
        lambda net, x: x.view(x.shape[0], 16, 8, 8),
        "the model's own code fails when it is narrower: RuntimeError: shape '[2, 16, 8, 8]' is invalid for input of "
        "size 512",
    ),
    "error of its own": (
        lambda net, x: {16: x}[x.shape[1]],
        "the model's own code fails when it is narrower: KeyError: 4",
    ),
}


@pytest.mark.parametrize("case", _WRONG_WHEN_NARROW)
def test_code_that_is_wrong_when_narrower_freezes_what_it_depends_on(case: str):
    between, reason = _WRONG_WHEN_NARROW[case]
    space = _trace(_Net(between))
    assert _names(space) == ["b"]
    assert _reasons(space) == {"a": reason, "c": _OUTPUT}


def test_a_dead_layer_hides_nothing_from_the_proof():
    """A norm whose scale starts at zero, as after residual blocks, makes the output constant."""
    model = _Net(lambda net, x: net.extra(x) * x.shape[1], nn.BatchNorm2d(16))
    nn.init.zeros_(model.extra.get_parameter("weight"))
    space = _trace(model)
    assert _names(space) == ["b"]
    assert "computes something else" in _reasons(space)["a"]


def test_a_model_that_takes_only_one_sample_is_refused_with_this_reason():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8 * 16, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.second(self.first(x).view(1, -1)).relu())

    words = "What froze it: first: the model does not run several samples at once: RuntimeError: "
    with pytest.raises(InputError, match=words):
        _trace(Net(), (1, 3, 4, 4))


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch):
    def zero_at_zero(call: Call) -> Value:
        """Claim that a sigmoid is zero at zero, so that no mask is put before the next layer."""
        return call.output(call.value(call["self"]).ids, zero=True)

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Sigmoid(), *_chain(16, 8, 2))

    assert _names(_trace(build())) == ["0", "3"]
    monkeypatch.setitem(RULES, "aten.sigmoid.default", zero_at_zero)
    space = _trace(build())
    assert _names(space) == ["3"]
    assert _reasons(space)["0"] == (
        "the narrower model computes something else than the masked one (a rule of your own was used here: "
        "the rule 'test_a_wrong_rule_is_caught.<locals>.zero_at_zero' for aten.sigmoid.default)"
    )


def test_outputs_of_any_structure_and_type_are_compared():
    class Net(_Net):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return {"scores": y, "more": [y > 0, y.argmax(1), 3], "nothing": None}

    assert _names(_trace(Net(lambda net, x: x.relu()))) == ["a", "b"]


def test_a_model_that_changes_its_input_is_proved_on_equal_inputs():
    def normalise(net: Any, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.5)
        return x.div_(0.25)

    class Net(_Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(normalise(self, x)).relu()).relu())

    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    space = psenet.trace(Net(normalise), x, divisor=4)
    assert _names(space) == ["a", "b"]
    assert torch.equal(x, before)


# The user's model -----------------------------------------------------------------------------------------------------


def _picture(model: nn.Module) -> dict[str, Any]:
    """Everything that a trace might change: tensors by identity and value, flags, hooks."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {
        "tensors": {name: (id(tensor), tensor.requires_grad, tensor.grad is None) for name, tensor in named.items()},
        "values": {name: tensor.detach().double().tolist() for name, tensor in named.items()},
        "modules": {path: (id(module), module.training, repr(module)) for path, module in model.named_modules()},
        "hooks": {
            path: [list(hooks.values()) for name, hooks in vars(module).items() if name.endswith("_hooks")]
            for path, module in model.named_modules()
        },
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
    }


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v3", "tied_weights", "norm_without_statistics"])
def test_a_trace_changes_nothing_of_the_users_model(name: str):
    model = ARCHITECTURES[name].model(dtype=torch.float32)
    x = ARCHITECTURES[name].batch(4, dtype=torch.float32)
    model.train()
    for module in list(model.modules())[2::3]:
        module.training = False
    modules = list(model.modules())
    modules[1].register_forward_hook(lambda layer, args, out: None)
    next(model.parameters()).requires_grad_(False)
    model(x).sum().backward()
    before, example, state = _picture(model), x.clone(), torch.get_rng_state()
    psenet.trace(model, x, divisor=4)
    assert _picture(model) == before
    assert torch.equal(x, example) and torch.equal(torch.get_rng_state(), state)


def test_a_buffer_that_the_forward_counts_up_is_as_before():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.get_buffer("calls").add_(1)
            return self.b(self.a(x).relu())

    model = Counting()
    assert _names(_trace(model)) == ["a"]
    assert int(model.get_buffer("calls")) == 0


class _DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm2d(3), nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(self.norm(x))
        return self.b(x if float(x.sum()) > 0 else -x)


class _Failing(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("not today")


@pytest.mark.parametrize(
    "build", [_DataDependent, lambda: _Failing(3), lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))]
)
def test_a_refused_model_is_unchanged_too(build: Callable[[], nn.Module]):
    model = build().train()
    before = _picture(model)
    with pytest.raises(InputError):
        _trace(model)
    assert _picture(model) == before


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="^trace needs a torch.nn.Module; got function$"):
        psenet.trace(_extra, torch.randn(1, 3, 8, 8))  # pyright: ignore[reportArgumentType]


def test_an_example_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"^example_input must be a tensor of shape \(B, ...\); got tuple$"):
        psenet.trace(_chain(3, 16, 2), (1, 3, 8, 8))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(), (3,), (0, 3, 8, 8)])
def test_an_example_that_is_no_batch_is_refused(shape: tuple[int, ...]):
    words = f"example_input must be a batch of samples, shape (B, ...); got {shape}"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        psenet.trace(_chain(3, 16, 2), torch.zeros(shape))


def test_a_model_that_refuses_the_example_is_refused_with_its_words():
    words = (
        "the model refuses an input of shape (1, 4, 8, 8): RuntimeError: Given groups=1, weight of size [16, 3, 1, 1]"
    )
    with pytest.raises(InputError, match=f"^{re.escape(words)}") as caught:
        psenet.trace(_chain(3, 16, 2), torch.randn(1, 4, 8, 8))
    assert isinstance(caught.value.__cause__, RuntimeError)
    words = "the model refuses an input of shape (2, 3, 8, 8): ArithmeticError: not today"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        _trace(_Failing(3))


def test_a_model_that_looks_at_its_values_is_refused():
    line = re.escape(f"at {__file__}:") + r"\d+ \(`return self.b\(x if float\(x.sum\(\)\) > 0 else -x\)`\): [A-Za-z]+: "
    with pytest.raises(InputError, match=f"^the model cannot be traced {line}"):
        _trace(_DataDependent())


@pytest.mark.parametrize("divisor", [0, -8, 8.0, True, "8"], ids=repr)
def test_a_divisor_that_is_no_positive_integer_is_refused(divisor: Any):
    with pytest.raises(InputError, match=f"^divisor must be a positive integer; got {divisor!r}$"):
        _trace(_chain(3, 16, 2), divisor=divisor)


@pytest.mark.parametrize("min_ratio", [0.0, -0.25, 1.01, float("nan")])
def test_a_min_ratio_outside_the_model_is_refused(min_ratio: float):
    with pytest.raises(InputError, match=f"^min_ratio must be above 0 and at most 1; got {min_ratio}$"):
        _trace(_chain(3, 16, 2), min_ratio=min_ratio)


@pytest.mark.parametrize("keep_ratios", [(), (0.5, 0.0), (0.5, 1.5), (float("nan"),)], ids=repr)
def test_keep_ratios_outside_the_model_are_refused(keep_ratios: tuple[float, ...]):
    words = f"keep_ratios must be numbers above 0 and at most 1; got {keep_ratios!r}"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        _trace(_chain(3, 16, 2), keep_ratios=keep_ratios)


def test_all_settings_out_of_range_are_named_together():
    words = (
        "divisor must be a positive integer; got 0; min_ratio must be above 0 and at most 1; got 2; "
        "keep_ratios must be numbers above 0 and at most 1; got [3]"
    )
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        _trace(_chain(3, 16, 2), divisor=0, min_ratio=2, keep_ratios=[3])


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (_chain(3, 4), {}, "0: the model's output"),
        (nn.Sequential(nn.ReLU()), {}, "it has no layers"),
        (_chain(3, 8, 2), {"divisor": 8}, "0: no smaller width is allowed than 8; 1: the model's output"),
        (_chain(3, 8, 2), {"min_ratio": 1.0}, "0: no smaller width is allowed than 8; 1: the model's output"),
        (_chain(3, 8, 2), {"exclude": ["*"]}, "0: excluded; 1: the model's output"),
        (_chain(3, 8, 2), {"exclude": ["0"], "include": ["1"]}, "0: excluded; 1: the model's output"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 1), _Twice(), nn.Conv2d(8, 2, 1)),
            {},
            "0: no rule for this op (psenet_tests.twice.default in 1); 2: the model's output",
        ),
    ],
)
def test_a_model_with_nothing_to_vary_is_refused_with_what_froze_it(
    model: nn.Module, settings: dict[str, Any], words: str
):
    with pytest.raises(InputError) as caught:
        _trace(model, **settings)
    assert str(caught.value) == f"this model has no width that could vary. What froze it: {words}"


# Rules ----------------------------------------------------------------------------------------------------------------


def test_a_second_rule_for_an_op_is_refused():
    before = dict(RULES)
    with pytest.raises(ValueError, match="aten.relu.default has a rule already: elementwise"):
        rule("aten.relu.default")(lambda call: call.untracked())
    assert before == RULES


def test_a_new_rule_makes_an_unknown_op_elastic(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RULES, "psenet_tests.twice.default", RULES["aten.relu.default"])  # undone at the end
    del RULES["psenet_tests.twice.default"]

    def build() -> nn.Module:
        return _Net(lambda net, x: _twice(x))

    assert _names(_trace(build())) == ["b"]

    @rule("psenet_tests.twice.default")
    def _same(call: Call) -> Value:
        value = call.value(call["x"])
        return call.output(value.ids, zero=value.zero)

    assert _names(_trace(build())) == ["a", "b"]
