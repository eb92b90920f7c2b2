"""Models as people write them: the traps, and what psenet promises of them."""

import copy
import inspect
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import psenet
from architectures import Head, conv_bn
from one_by_one import (
    Build,
    assert_costs,
    assert_equal_one_by_one,
    assert_guarantee,
    batch,
    built,
    settings_of,
    supernet_of,
)
from psenet.errors import InputError
from psenet.parallel.ops import _AS_TRACED, _MASKED
from psenet.space import WidthSpace
from psenet.tracing.call import Call
from psenet.tracing.facts import Value
from psenet.tracing.reader import COUNTED_OPS
from psenet.tracing.rules import RULES
from psenet.widths import Widths

Between = Callable[[torch.Tensor], torch.Tensor]

_OUTPUT = "the model's output"
_MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _reasons(space: WidthSpace) -> dict[str, str]:
    return {frozen.layer: frozen.reason for frozen in space.frozen}


def _names(space: WidthSpace) -> list[str]:
    return [group.name for group in space.groups]


class _Net(nn.Module):
    """Three convolutions: a, b, c (3 -> 16 -> 8 -> 4), a norm after a, something of one's own between a and b."""

    def __init__(self, between: Between | None = None, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)
        self.extra, self.between = extra, between

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        if self.extra is not None:
            x = self.extra(x)
        return x if self.between is None else self.between(x)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.b(self.middle(self.norm(self.a(x)))).relu())


# Traps: their groups, by hand, and the guarantee ----------------------------------------------------------------------


class _InPlace(_Net):
    """Ops in place on tensors that another branch reads, too."""

    def __init__(self, change: Callable[[torch.Tensor], Any], side: Between = torch.sigmoid) -> None:
        super().__init__()
        self.change, self.side = change, side
        self.d = nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.a(x))
        y = self.side(x)
        self.change(x)
        return self.c(self.b(x) + self.d(y))


class _SumInPlace(_Net):
    """A sum in place of what two branches read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.e = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.norm(self.a(x)), self.d(x)
        gate = y.sigmoid()
        y.add_(z)
        z += 0.5
        return self.c(self.b(y * gate) + self.e(z))


class _SharedHead(nn.Module):
    """One head reads two levels of a pyramid, with a norm inside that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv_bn(3, 16), conv_bn(16, 16, stride=2)
        self.head = nn.Sequential(conv_bn(16, 12), nn.ReLU(), nn.Conv2d(12, 4, 1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        fine = self.stem(x).relu()
        return [self.head(level).mean((2, 3)) for level in (fine, self.down(fine))]


class _TiedLinears(nn.Module):
    """Two linear layers own one weight, two norms one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3), nn.BatchNorm1d(16)
        self.one, self.two, self.norm2 = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.two.weight, self.norm2.weight = self.one.weight, self.norm1.weight
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.first(x).relu().mean((2, 3)))
        return self.out(self.norm2(self.two(self.one(x).tanh()).tanh()))


class _TransposedTie(nn.Module):
    """An autoencoder whose decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stem = conv_bn(3, 12), nn.Conv2d(12, 16, 3)
        self.encode, self.out = nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(self.first(x).relu()).relu().mean((2, 3))
        return self.out(F.linear(self.encode(x).tanh(), self.encode.weight.t()))


class _OnlyInTraining(_Net):
    """A branch that evaluation never takes."""

    def __init__(self) -> None:
        super().__init__(extra=conv_bn(16, 24))
        self.back = conv_bn(24, 16)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        assert self.extra is not None
        return x + self.back(self.extra(x).relu()) if self.training else x


class _OnlyInEvaluation(_OnlyInTraining):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        assert self.extra is not None
        return x if self.training else x + self.back(self.extra(x).relu())


class _AuxiliaryHead(_Net):
    """Two outputs in training, one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(conv_bn(16, 12, 1), nn.ReLU(), nn.Dropout(0.0), Head(12, 3))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.norm(self.a(x)).relu()
        y = self.c(self.b(x).relu())
        return (y, self.auxiliary(x)) if self.training else y


class _Buffers(_Net):
    """Buffers of several forms that stand for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.randn(1, 16, 1, 1))
        self.register_buffer("shift", torch.randn(8, 1, 1))
        self.register_buffer("flat", torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.a(x)) * self.get_buffer("gate") + self.get_buffer("flat").view(1, -1, 1, 1)
        return self.c((self.b(x) + self.get_buffer("shift")).relu())


class _WithoutNorms(nn.Module):
    """Residual, with biases and nonlinearities that are not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 16, 1)
        self.wide, self.out = nn.Conv2d(16, 24, 3), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.softplus(self.stem(x))
        x = F.elu(x + self.two(self.one(x).sigmoid()))
        return self.out(F.adaptive_max_pool2d((self.wide(x) + 1).exp(), 1).flatten(1).sigmoid())


def _one_output() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 1), nn.Conv2d(1, 1, 3)),
        *(nn.Conv2d(1, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 1)),
    )


def _multiplier() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 16, 3, groups=8), nn.Sigmoid()),
        *(nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)),
    )


def _norms(**options: Any) -> Build:
    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, **options), nn.SiLU()),
            *(nn.Conv2d(16, 12, 1), nn.BatchNorm2d(12, **options), nn.Sigmoid()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8, **options)),
            nn.Linear(8, 4),
        )

    return build


_TRAPS: dict[str, tuple[Build, dict[str, str]]] = {
    "one output channel": (_one_output, {"0": "0 2", "4": "4 6"}),
    "channel multiplier": (_multiplier, {"0": "0 2 4", "4": "4 6"}),
    "relu in place": (lambda: _InPlace(torch.relu_), {"a": "a norm b d", "b": "b d c"}),
    "sum in place": (_SumInPlace, {"a": "a norm d b e", "b": "b e c"}),
    "number in place": (lambda: _InPlace(lambda x: x.add_(1)), {"a": "a norm b d", "b": "b d c"}),
    "alias in place": (lambda: _InPlace(torch.relu_, lambda x: x), {"a": "a norm b d", "b": "b d c"}),
    "called twice": (
        _SharedHead,
        {"stem.0": "stem.0 stem.1 head.0.0 down.0 down.1", "head.0.0": "head.0.0 head.0.1 head.2"},
    ),
    "tied": (_TiedLinears, {"first": "first norm1 one two norm2 out"}),
    "only in training": (
        _OnlyInTraining,
        {"a": "a norm b extra.0 back.0 back.1", "b": "b c", "extra.0": "extra.0 extra.1 back.0"},
    ),
    "only in evaluation": (
        _OnlyInEvaluation,
        {"a": "a norm b extra.0 back.0 back.1", "b": "b c", "extra.0": "extra.0 extra.1 back.0"},
    ),
    "auxiliary head": (
        _AuxiliaryHead,
        {"a": "a norm b auxiliary.0.0", "b": "b c", "auxiliary.0.0": "auxiliary.0.0 auxiliary.0.1 auxiliary.3.3"},
    ),
    "buffers": (_Buffers, {"a": "a norm b", "b": "b c"}),
    "norms without affine": (_norms(affine=False), {"0": "0 1 3", "3": "3 4 8", "8": "8 9 10"}),
    "norms without statistics": (_norms(track_running_stats=False), {"0": "0 1 3", "3": "3 4 8", "8": "8 9 10"}),
    "norms without anything": (
        _norms(affine=False, track_running_stats=False),
        {"0": "0 3", "3": "3 8", "8": "8 10"},
    ),
    "norms with cumulative statistics": (_norms(momentum=None), {"0": "0 1 3", "3": "3 4 8", "8": "8 9 10"}),
    "without norms": (_WithoutNorms, {"stem": "stem one two wide", "one": "one two", "wide": "wide out"}),
}


@pytest.mark.parametrize("name", _TRAPS)
def test_a_trap_has_the_groups_found_by_hand(name: str):
    build, groups = _TRAPS[name]
    supernet = supernet_of(build)
    found = {group.name: {layer for layer in group.layers if layer} for group in supernet.space.groups}
    assert found == {group: set(layers.split()) for group, layers in groups.items()}
    assert all(group.unit == 1 for group in supernet.space.groups)
    assert_costs(supernet)


@_MODES
@pytest.mark.parametrize("name", _TRAPS)
def test_one_pass_of_a_trap_equals_the_extracted_nets(name: str, training: bool):
    assert_guarantee(supernet_of(_TRAPS[name][0]), training=training)


def test_a_convolution_of_one_channel_is_no_depthwise_one():
    supernet = supernet_of(_one_output)
    assert {layer: reason for layer, reason in _reasons(supernet.space).items() if layer != "6"} == {
        "2": "one channel cannot be fewer",
        "3": "one channel cannot be fewer",
    }
    small = supernet.extract(Widths({"0": 4, "4": 4}))
    assert [tuple(small.get_parameter(f"{layer}.weight").shape) for layer in (0, 2, 3, 4, 6)] == [
        *((4, 3, 3, 3), (1, 4, 1, 1), (1, 1, 3, 3), (4, 1, 1, 1), (4, 4, 1, 1)),
    ]
    assert supernet.space.macs(Widths({"0": 4, "4": 4})) == 36 * 3 * 9 * 4 + 36 * 4 + 16 * 9 + 16 * 4 + 16 * 4 * 4


def test_a_channel_multiplier_keeps_its_ratio():
    supernet = supernet_of(_multiplier)
    small = supernet.extract(Widths({"0": 4, "4": 8})).get_submodule("2")
    assert isinstance(small, nn.Conv2d)
    assert (small.in_channels, small.out_channels, small.groups, small.weight.shape) == (4, 8, 4, (8, 1, 3, 3))
    assert supernet.space.macs(Widths({"0": 4, "4": 8})) == 36 * 3 * 9 * 4 + 16 * 9 * 8 + 16 * 8 * 8 + 16 * 8 * 4
    assert supernet.space.params(Widths({"0": 4, "4": 8})) == 4 * 28 + 8 * 10 + 8 * 9 + 4 * 9


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_features_returned_beside_the_scores_are_frozen(form: str):
    class Net(_Net):
        def forward(self, x: torch.Tensor) -> Any:
            features = self.norm(self.a(x)).relu()
            scores = self.c(self.b(features).relu())
            return (scores, features) if form == "tuple" else {"scores": scores, "more": [features]}

    supernet = supernet_of(Net)
    assert _names(supernet.space) == ["b"]
    assert _reasons(supernet.space) == {"a": _OUTPUT, "c": _OUTPUT}
    assert_guarantee(supernet, training=True)


_HARD_CODED: dict[str, Between] = {
    "view": lambda x: x.view(-1, 512),
    "reshape": lambda x: torch.reshape(x, (x.shape[0], 512)),
    "two sizes": lambda x: x.view(x.size(0), 32, 16).flatten(1),
    "unflatten": lambda x: x.flatten(1).unflatten(1, (512,)),
}


@pytest.mark.parametrize("name", _HARD_CODED)
def test_a_size_written_into_the_code_freezes_its_group_with_a_reason(name: str):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, padding=1)
            self.c, self.d = nn.Linear(512, 12), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(self.c(_HARD_CODED[name](self.b(self.a(x).relu()).relu())).relu())

    supernet = supernet_of(Net)
    assert _names(supernet.space) == ["a", "c"]
    assert re.search("fails when it is narrower|changes shape|something else", _reasons(supernet.space)["b"])
    assert_guarantee(supernet, training=True)


def test_tied_parameters_stay_tied_and_are_counted_once():
    supernet = supernet_of(_TiedLinears)
    small = supernet.extract(Widths({"first": 4}))
    assert small.get_parameter("one.weight") is small.get_parameter("two.weight")
    assert small.get_parameter("norm1.weight") is small.get_parameter("norm2.weight")
    assert supernet.space.params(Widths({"first": 4})) == 4 * 28 + 4 * 4 + 2 * 4 + 3 * 4 + 4 * 5


@_MODES
def test_a_weight_also_used_transposed_keeps_the_guarantee(training: bool):
    supernet = supernet_of(_TransposedTie)
    assert _names(supernet.space) == ["first.0"]
    assert "the weight is computed" in _reasons(supernet.space)["encode"]
    assert_guarantee(supernet, training=training)


def test_what_needs_no_gradient_stays_so_and_gets_none():
    supernet = supernet_of(lambda: _Net(extra=nn.Conv2d(16, 16, 1)))
    fixed = ("a.weight", "norm.bias", "extra.weight")
    for name in fixed:
        supernet.model.get_parameter(name).requires_grad_(False)
    assert_guarantee(supernet, training=True)
    space = supernet.space
    supernet(batch(4), [space.smallest(), space.full()]).sum().backward()
    subnet, small = supernet.subnet(space.smallest()), supernet.extract(space.smallest())
    for module in (subnet, small):
        module(batch(4)).sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad is (name not in fixed)
        assert (parameter.grad is None) is (name in fixed)
        assert (supernet.model.get_parameter(name).grad is None) is (name in fixed)


class _TrainingScale(_Net):
    """A parameter that only training uses, outside of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16, 1, 1))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if self.training else x


class _HandWrittenNorm(nn.Module):
    """Batch statistics by hand, in training or always."""

    mean: torch.Tensor

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self.register_buffer("mean", torch.randn(1, 16, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - (x.mean((0, 2, 3), keepdim=True) if self.training or self.always else self.mean)


class _SizeInTraining(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], 16, 8, 8) if self.training else x


_OTHERWISE_IN_TRAINING: dict[str, Build] = {
    "a parameter": _TrainingScale,
    "a size": lambda: _Net(extra=_SizeInTraining()),
}


@pytest.mark.parametrize("name", _OTHERWISE_IN_TRAINING)
def test_code_that_only_training_runs_keeps_the_guarantee_though_the_modules_are_the_same(name: str):
    assert_guarantee(supernet_of(_OTHERWISE_IN_TRAINING[name]), training=True)


@pytest.mark.parametrize("always", [True, False])
def test_batch_statistics_by_hand_are_refused_or_per_subnet(always: bool):
    try:
        supernet = supernet_of(lambda: _Net(extra=_HandWrittenNorm(always)))
    except InputError as error:
        assert "computes something else" in str(error)
        return
    assert_guarantee(supernet, training=True)


_VIEWS: dict[str, tuple[Between, Callable[[torch.Tensor], Any]]] = {
    "the base": (lambda x: x.transpose(2, 3), lambda x: x.add_(1)),
    "another view": (lambda x: x.transpose(2, 3), lambda x: x.flatten(2).add_(1)),
    "a part": (lambda x: x.transpose(2, 3), lambda x: x[:, :8].add_(1)),
}


@_MODES
@pytest.mark.parametrize("name", _VIEWS)
def test_a_view_of_a_tensor_changed_in_place_keeps_the_guarantee(name: str, training: bool):
    side, change = _VIEWS[name]
    assert_guarantee(supernet_of(lambda: _InPlace(change, side)), training=training)


# Several inputs and outputs -------------------------------------------------------------------------------------------


class _Scores(NamedTuple):
    fine: torch.Tensor
    coarse: torch.Tensor


class _ManyInputs(nn.Module):
    """An image, a second one of another size, and a vector."""

    def __init__(self, inputs: str, outputs: str) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.left, self.right = conv_bn(3, 16), conv_bn(2, 12)
        self.vector, self.mix, self.out = nn.Linear(5, 16), conv_bn(28, 8), nn.Conv2d(8, 4, 1)

    def run(self, image: torch.Tensor, other: torch.Tensor, vector: torch.Tensor) -> Any:
        x = self.left(image).relu() * self.vector(vector).sigmoid()[:, :, None, None]
        y = F.interpolate(self.right(other).relu(), scale_factor=2.0)
        fine = self.out(self.mix(torch.cat([x, y], 1)).relu())
        coarse = fine.mean((2, 3))
        return {
            "dict": lambda: {"fine": fine, "coarse": coarse},
            "tuple": lambda: (fine, coarse),
            "named tuple": lambda: _Scores(fine, coarse),
            "nested": lambda: [fine, None, {"more": (coarse, 3), "ratio": 0.5}, "text", []],
        }[self.outputs]()

    def forward(self, *args: Any) -> Any:
        if self.inputs == "tensors":
            return self.run(args[0], args[1], args[2])
        if self.inputs == "dict":
            return self.run(args[0], args[1]["other"], args[1]["vector"])
        return self.run(args[0]["image"], args[1][0][0], args[1][1]["vector"])

    def make(self, size: int) -> tuple[Any, ...]:
        image, other, vector = batch(size, 3, 8, 8), batch(size, 2, 4, 4), batch(size, 5)
        if self.inputs == "tensors":
            return image, other, vector
        if self.inputs == "dict":
            return image, {"other": other, "vector": vector}
        return {"image": image}, ([other], {"vector": vector})


_INPUTS = ("tensors", "dict", "nested")
_OUTPUTS = ("dict", "tuple", "named tuple", "nested")
_FORMS = [*((form, "tuple") for form in _INPUTS), *(("dict", form) for form in _OUTPUTS)]


@_MODES
@pytest.mark.parametrize(("inputs", "outputs"), _FORMS)
def test_several_inputs_and_outputs_keep_their_structure_and_the_guarantee(inputs: str, outputs: str, training: bool):
    make = _ManyInputs(inputs, outputs).make
    supernet = supernet_of(lambda: _ManyInputs(inputs, outputs), make(2))
    assert {group.name: set(group.layers) for group in supernet.space.groups} == {
        "left.0": {"left.0", "left.1", "vector", "mix.0"},
        "right.0": {"right.0", "right.1", "mix.0"},
        "mix.0": {"mix.0", "mix.1", "out"},
    }
    assert_costs(supernet, make(2))
    assert_guarantee(supernet, make, training=training)


@_MODES
@pytest.mark.parametrize(("inputs", "outputs"), _FORMS)
def test_several_inputs_and_outputs_need_no_batch_that_the_subnets_divide(inputs: str, outputs: str, training: bool):
    make = _ManyInputs(inputs, outputs).make
    supernet = supernet_of(lambda: _ManyInputs(inputs, outputs), make(2))
    for size in (7, 8):
        assert_equal_one_by_one(supernet, make(size), settings_of(supernet.space)[-1], training=training)


def test_inputs_of_different_batch_sizes_are_refused_with_their_shapes():
    model = built(lambda: _ManyInputs("dict", "tuple"))
    assert isinstance(model, _ManyInputs)
    image, others = model.make(4)
    wrong = (image, {**others, "vector": batch(3, 5)})
    words = "all inputs must be tensors of one batch, shape (B, ...); got shapes [(4, 3, 8, 8), (4, 2, 4, 4), (3, 5)]"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        psenet.trace(model, wrong)
    space = psenet.trace(model, (image, others), divisor=4)
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        psenet.Supernet(model, space)(wrong, [space.full(), space.smallest()])


# Opaque modules -------------------------------------------------------------------------------------------------------


class _Router(nn.Module):
    """What happens to a sample depends on its values."""

    def __init__(self, num: int = 16) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(num), nn.Conv2d(num, num, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in self.conv(self.norm(x)):
            if float(row.detach().sum()) > 0:
                row = row.flip(0)
            rows.append(row)
        return torch.stack(rows)


class _Routed(_Net):
    def __init__(self, router: nn.Module | None = None) -> None:
        super().__init__(extra=_Router() if router is None else router)
        self.before, self.after = conv_bn(3, 8), conv_bn(16, 12)
        self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.middle(self.norm(self.a(self.before(x).relu())))
        return self.c(self.b(self.after(x).relu()).relu())


def test_control_flow_on_data_is_refused_with_its_line_and_the_way_out():
    lines, first = inspect.getsourcelines(_Router.forward)
    offset = next(number for number, line in enumerate(lines) if "if float" in line)
    place = f"at {__file__}:{first + offset} (`if float(row.detach().sum()) > 0:`, in extra)"
    with pytest.raises(InputError, match=re.escape(place)) as caught:
        supernet_of(_Routed)
    assert str(caught.value).startswith("the model cannot be traced ")
    assert str(caught.value).endswith("leave that module as it is with opaque=['extra']")


def test_what_an_opaque_module_touches_is_frozen_and_the_rest_is_elastic():
    supernet = supernet_of(_Routed, opaque=["extra"])
    assert {group.name: set(group.layers) for group in supernet.space.groups} == {
        "before.0": {"before.0", "before.1", "a"},
        "after.0": {"after.0", "after.1", "b"},
        "b": {"b", "c"},
    }
    reasons = _reasons(supernet.space)
    assert set(reasons) == {"a", "extra", "c"}
    assert reasons["a"] == "goes into an opaque module (psenet.opaque.default in extra)"
    assert reasons["extra"] == "comes out of an opaque module (psenet.opaque.default in extra)"


_SIZES = [1, 2]
_BEFORE_AND_AFTER = 64 * (27 * 8 + 8 * 16 + 16 * 12 * 9 + 12 * 8 + 8 * 4)
_ROUTER = 16 * 16 * 9
"""MACs of its convolution, for one pixel."""


@pytest.mark.parametrize("size", _SIZES)
def test_convolutions_in_an_opaque_module_are_counted_for_one_sample(size: int):
    supernet = supernet_of(_Routed, batch(size), opaque=["extra"])
    by_hand = _BEFORE_AND_AFTER + 64 * _ROUTER
    assert supernet.space.macs(supernet.space.full()) == by_hand
    shares = {frozen.layer: frozen.macs_share for frozen in supernet.space.frozen}
    assert shares["extra"] == pytest.approx(64 * _ROUTER / by_hand, rel=1e-12)
    assert_costs(supernet)


@pytest.mark.parametrize("size", _SIZES)
def test_convolutions_in_an_opaque_module_are_counted_at_each_of_its_calls(size: int):
    space = supernet_of(_CallsTwice, batch(size), opaque=["extra"]).space
    assert space.macs(space.full()) == _BEFORE_AND_AFTER + 64 * _ROUTER + 16 * _ROUTER


@_MODES
def test_an_opaque_module_keeps_the_guarantee_and_its_norms_their_statistics_per_subnet(training: bool):
    assert_guarantee(supernet_of(_Routed, opaque=["extra"]), training=training)


def test_a_model_with_an_opaque_module_is_not_changed():
    model = built(_Routed).train()
    before = {path: (id(module), sorted(vars(module)), module.training) for path, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    psenet.trace(model, batch(2), divisor=4, opaque=["extra"])
    after = {path: (id(module), sorted(vars(module)), module.training) for path, module in model.named_modules()}
    assert after == before and not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="if float"):
        psenet.trace(model, batch(2), divisor=4)


class _ManyParts(nn.Module):
    """An opaque module with several arguments and results, called twice at different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = _Router()

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        return {"y": self.router(x * scale), "number": 2, "pooled": x.mean((2, 3)), "nothing": None}


class _CallsTwice(_Routed):
    def __init__(self) -> None:
        super().__init__(_ManyParts())

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        assert self.extra is not None
        large = self.extra(x, scale=x.sigmoid())
        small = self.extra(F.avg_pool2d(x, 2), scale=x[:, :, ::2, ::2])
        y = large["y"] * large["number"] + F.interpolate(small["y"], scale_factor=2.0)
        return y + small["pooled"][:, :, None, None]


@_MODES
@pytest.mark.parametrize("patterns", [["extra"], ["extra.router"], ["ex*"], ["extra", "extra.router"]], ids=str)
def test_an_opaque_module_may_be_called_twice_and_give_anything(patterns: list[str], training: bool):
    supernet = supernet_of(_CallsTwice, opaque=patterns)
    assert _names(supernet.space) == ["before.0", "after.0", "b"]
    assert_guarantee(supernet, training=training)


@_MODES
def test_a_weight_tied_into_an_opaque_module_is_frozen(training: bool):
    class Net(_Routed):
        def __init__(self) -> None:
            super().__init__()
            assert isinstance(self.extra, _Router)
            self.tied = nn.Conv2d(16, 16, 3, padding=1)
            self.tied.weight = self.extra.conv.weight
            self.after = conv_bn(16, 12)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.middle(self.norm(self.a(self.before(x).relu())))
            return self.c(self.b(self.after(self.tied(x.relu()).relu()).relu()).relu())

    supernet = supernet_of(Net, opaque=["extra"])
    assert _names(supernet.space) == ["before.0", "after.0", "b"]
    assert "tied" in _reasons(supernet.space)
    assert_guarantee(supernet, training=training)


@_MODES
@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_an_opaque_module_that_one_mode_alone_runs_keeps_the_guarantee(when: str, training: bool):
    class Net(_Routed):
        def middle(self, x: torch.Tensor) -> torch.Tensor:
            assert self.extra is not None
            return self.extra(x) + x if self.training is (when == "training") else x

    supernet = supernet_of(Net, opaque=["extra"])
    assert _names(supernet.space) == ["before.0", "after.0", "b"]
    assert_guarantee(supernet, training=training)


@_MODES
def test_two_opaque_modules_one_of_them_a_norm_keep_the_guarantee(training: bool):
    supernet = supernet_of(_Routed, opaque=["extra", "after.1"])
    assert _names(supernet.space) == ["before.0", "b"]
    assert_guarantee(supernet, training=training)


def test_an_opaque_pattern_that_matches_nothing_is_refused():
    words = "opaque: no module matches ['missing', 'x.*']; modules are named like ['a', 'norm', 'b']"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        supernet_of(_Routed, opaque=["missing", "extra", "x.*"])


def test_an_opaque_module_that_is_never_run_is_refused():
    class Net(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Conv2d(3, 3, 1)

    model = built(Net)
    with pytest.raises(InputError, match="^opaque: idle is not run by the model's forward$"):
        psenet.trace(model, batch(2), opaque=["idle"])
    assert not any("forward" in vars(module) for module in model.modules())
    assert _names(psenet.trace(model, batch(2), divisor=4)) == ["a", "b"]


# Rules of one's own ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("psenet_any_model::twice", mutates_args=())
def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("psenet_any_model::reverse", mutates_args=())
def _reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


@torch.library.custom_op("psenet_any_model::centre", mutates_args=())
def _centre(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(1, keepdim=True)


@torch.library.custom_op("psenet_any_model::parts", mutates_args=())
def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + 1, x.square()


for _op in (_twice, _reverse, _centre):
    _op.register_fake(lambda x: torch.empty_like(x))
_parts.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))
_twice.register_autograd(lambda context, gradient: gradient * 2)


def _passes(call: Call) -> Value:
    value = call.value(call["x"])
    return call.output(value.ids, zero=value.zero)


def _raises(call: Call) -> Value:
    raise KeyError("no such thing")


def _too_short(call: Call) -> Value:
    return call.output(call.value(call["x"]).ids[:, :5], zero=True)


def _too_few_axes(call: Call) -> Value:
    return call.output(call.value(call["x"]).ids.reshape(-1), zero=True)


def _other_shape(call: Call) -> Value:
    value = call.value(call["x"])
    return Value(value.ids, (*value.shape[:-1], 99), True)


def _two_values(call: Call) -> tuple[Value, ...]:
    return _passes(call), _passes(call)


def _no_value(call: Call) -> Value:
    return None  # pyright: ignore[reportReturnType]


def _ids_of_no_channel(call: Call) -> Value:
    return call.along(1, np.arange(10_000, 10_016), zero=True)


def _ids_that_are_no_integers(call: Call) -> Value:
    return call.output(call.value(call["x"]).ids + 0.5, zero=True)


def _channels_on_another_axis(call: Call) -> Value:
    value = call.value(call["x"])
    return call.output(np.swapaxes(value.ids, 1, 2), zero=value.zero)


def _zero_without_being_so(call: Call) -> tuple[Value, ...]:
    return tuple(Value(call.value(call["x"]).ids, shape, True, size) for shape, size in call.results())


def _as_it_is(call: Call) -> tuple[Value, ...]:
    value = call.value(call["x"])
    (shape, size), (_, _) = call.results()
    return Value(value.ids, shape, False, size), Value(value.ids, shape, value.zero, size)


def _run_twice(x: torch.Tensor) -> torch.Tensor:
    return _twice(x)


def _run_reverse(x: torch.Tensor) -> torch.Tensor:
    return _reverse(x)


def _run_centre(x: torch.Tensor) -> torch.Tensor:
    return _centre(x)


def _sum_of_parts(x: torch.Tensor) -> torch.Tensor:
    first, second = _parts(x)
    return first + second


@_MODES
def test_a_right_rule_makes_groups_elastic_and_keeps_the_guarantee(monkeypatch: pytest.MonkeyPatch, training: bool):
    assert _names(supernet_of(lambda: _Net(_run_twice)).space) == ["b"]
    monkeypatch.setitem(RULES, "psenet_any_model.twice.default", _passes)
    supernet = supernet_of(lambda: _Net(_run_twice))
    assert _names(supernet.space) == ["a", "b"]
    assert_guarantee(supernet, training=training)


@_MODES
def test_a_right_rule_for_several_results_makes_groups_elastic(monkeypatch: pytest.MonkeyPatch, training: bool):
    monkeypatch.setitem(RULES, "psenet_any_model.parts.default", _as_it_is)
    supernet = supernet_of(lambda: _Net(_sum_of_parts))
    assert _names(supernet.space) == ["a", "b"]
    with torch.no_grad():
        assert_guarantee(supernet, training=training, gradients=False)


_INVALID: dict[str, tuple[Between, Callable[[Call], Any], str]] = {
    "raises": (_run_twice, _raises, "fails at psenet_any_model.twice.default in the model itself: KeyError"),
    "wrong size": (_run_twice, _too_short, "the rule said [((2, 16, 8, 8), (1, 5, 1, 1))]"),
    "wrong rank": (_run_twice, _too_few_axes, "the rule said [((2, 16, 8, 8), (16,))]"),
    "wrong shape": (_run_twice, _other_shape, "the op returns [(2, 16, 8, 8)] at psenet_any_model.twice.default"),
    "too many": (_run_twice, _two_values, "must return a Value for each output"),
    "too few": (_sum_of_parts, _passes, "must return a Value for each output"),
    "nothing": (_run_twice, _no_value, "the rule said [None]"),
    "unknown ids": (_run_twice, _ids_of_no_channel, ""),
    "ids of another type": (_run_twice, _ids_that_are_no_integers, ""),
}


@pytest.mark.parametrize("case", _INVALID)
def test_an_invalid_rule_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, case: str):
    between, wrong, words = _INVALID[case]
    op = f"psenet_any_model.{'parts' if between is _sum_of_parts else 'twice'}.default"
    monkeypatch.setitem(RULES, op, wrong)
    with pytest.raises(InputError, match=f"^the rule '{wrong.__name__}' for {op} ") as caught:
        supernet_of(lambda: _Net(between))
    assert words in str(caught.value)


_WRONG: dict[str, tuple[Between, Callable[[Call], Any]]] = {
    "reverse": (_run_reverse, _passes),
    "centre": (_run_centre, _passes),
    "parts": (_sum_of_parts, _zero_without_being_so),
}


@pytest.mark.parametrize("name", _WRONG)
def test_a_wrong_rule_is_found_out_by_the_proof_and_named(monkeypatch: pytest.MonkeyPatch, name: str):
    between, wrong = _WRONG[name]
    monkeypatch.setitem(RULES, f"psenet_any_model.{name}.default", wrong)
    supernet = supernet_of(lambda: _Net(between), batch(2, 3, 16, 16))
    assert _names(supernet.space) == ["b"]
    suspect = f"the rule '{wrong.__name__}' for psenet_any_model.{name}.default"
    assert suspect in _reasons(supernet.space)["a"]
    with torch.no_grad():
        assert_guarantee(supernet, training=False, gradients=False)


def test_a_rule_that_puts_channels_on_another_axis_freezes_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RULES, "psenet_any_model.twice.default", _channels_on_another_axis)
    space = supernet_of(lambda: _Net(_run_twice), batch(2, 3, 16, 16)).space
    assert _names(space) == ["b"] and "a" in _reasons(space)


# Weights computed from a parameter ------------------------------------------------------------------------------------


class _StandardisedConv(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-5) * self.gain
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _computed(layer: Callable[..., nn.Module], linear: Callable[..., nn.Module] = nn.Linear) -> Build:
    """A net with the layer as the stem, as a depthwise, a grouped and an ordinary convolution."""

    def build() -> nn.Module:
        return nn.Sequential(
            *(layer(3, 16, 3), nn.ReLU(), layer(16, 16, 3, padding=1, groups=16), nn.Sigmoid()),
            *(layer(16, 24, 3, padding=1, groups=4), nn.BatchNorm2d(24), nn.SiLU(), layer(24, 12, 1, bias=False)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(12, 8), nn.Tanh(), nn.Linear(8, 4)),
        )

    return build


class _Centred(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - weight.mean((1, 2, 3), keepdim=True)


def _parametrised(*args: Any, **options: Any) -> nn.Module:
    layer = nn.Conv2d(*args, **options)
    parametrize.register_parametrization(layer, "weight", _Centred())
    return layer


_COMPUTED: dict[str, Build] = {
    "standardised": _computed(_StandardisedConv),
    "weight norm": _computed(
        lambda *args, **options: weight_norm(nn.Conv2d(*args, **options)),
        lambda *args: weight_norm(nn.Linear(*args)),
    ),
    "parametrised": _computed(_parametrised),
}


@pytest.mark.parametrize("name", _COMPUTED)
def test_computed_weights_are_elastic(name: str):
    space = supernet_of(_COMPUTED[name], divisor=1).space
    assert [(group.name, group.size, group.unit) for group in space.groups] == [
        *(("0", 16, 4), ("7", 12, 1), ("10", 8, 1)),
    ]
    assert _reasons(space) == {"12": _OUTPUT}


@_MODES
@pytest.mark.parametrize("name", _COMPUTED)
def test_one_pass_with_computed_weights_equals_the_extracted_nets(name: str, training: bool):
    assert_guarantee(supernet_of(_COMPUTED[name]), training=training)


@pytest.mark.parametrize("name", _COMPUTED)
def test_extracted_layers_with_computed_weights_say_their_size(name: str):
    supernet = supernet_of(_COMPUTED[name])
    small = supernet.extract(Widths({"0": 8, "7": 4, "10": 4}))
    sizes = {}
    for path, layer in small.named_modules():
        if isinstance(layer, nn.Conv2d):
            sizes[path] = (layer.in_channels, layer.out_channels, layer.groups)
        elif isinstance(layer, nn.Linear):
            sizes[path] = (layer.in_features, layer.out_features)
    assert sizes == {
        **{"0": (3, 8, 1), "2": (8, 8, 8), "4": (8, 12, 2), "7": (12, 4, 1)},
        **{"10": (4, 4), "12": (4, 4)},
    }
    copy.deepcopy(small)(batch(2))
    assert_costs(supernet)


class _ScaledByInput(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, self.weight * input.mean().tanh(), self.bias)


class _KernelOfEachSample(nn.Module):
    """Every sample makes its own mixture of two kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.kernels = nn.Linear(16, 2), nn.Parameter(torch.randn(2, 16 * 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = (self.route(x.mean((2, 3))).softmax(1) @ self.kernels).view(-1, 16, 1, 1)
        return F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=x.shape[0]).view(x.shape[0], 16, *x.shape[2:])


def test_a_weight_that_the_whole_batch_makes_freezes_what_it_reads():
    with pytest.raises(InputError, match="has no width that could vary") as caught:
        supernet_of(lambda: nn.Sequential(*(conv_bn(3, 16), _ScaledByInput(16, 16, 1), nn.ReLU()), *_tail()))
    assert "; 1: the weight is computed, not a parameter (aten.conv2d.default in 1); " in str(caught.value)


def _tail() -> list[nn.Module]:
    return [nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)]


@_MODES
def test_a_kernel_that_each_sample_makes_freezes_what_it_reads(training: bool):
    supernet = supernet_of(lambda: nn.Sequential(*(conv_bn(3, 16), _KernelOfEachSample(), nn.ReLU()), *_tail()))
    assert _names(supernet.space) == ["3"]
    assert _reasons(supernet.space)["0.0"] == "moves the batch axis (aten.reshape.default in 1)"
    assert _reasons(supernet.space)["1"] == "the weight is computed, not a parameter (aten.conv2d.default in 1)"
    assert_guarantee(supernet, training=training)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_know_a_layer_with_weight_norm_and_no_bias_by_its_path(option: str):
    def build() -> nn.Module:
        return nn.Sequential(weight_norm(nn.Conv2d(3, 16, 1, bias=False)), nn.ReLU(), *_tail())

    assert _names(supernet_of(build, **{option: ["0"]}).space) == (["0"] if option == "include" else ["2"])


class _CosineHead(nn.Module):
    """Both features and weights are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


@_MODES
def test_a_head_that_normalises_features_and_weights_keeps_the_guarantee(training: bool):
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), _CosineHead()]
    supernet = supernet_of(lambda: nn.Sequential(conv_bn(3, 12), nn.ReLU(), conv_bn(12, 16), *pool))
    assert _names(supernet.space) == ["0.0", "2.0"]
    assert_guarantee(supernet, training=training)


# Reductions over channels ---------------------------------------------------------------------------------------------


_REDUCTIONS: dict[str, Between] = {
    "mean": lambda x: x * x.mean(1, keepdim=True),
    "mean, as a function": lambda x: x * torch.mean(x, dim=1, keepdim=True),
    "mean over all but the batch": lambda x: x * x.mean((1, 2, 3), keepdim=True),
    "mean without its axis": lambda x: x * x.mean(1)[:, None],
    "sum": lambda x: x * x.sum(1, keepdim=True),
    "var": lambda x: x * x.var(1, keepdim=True),
    "var of the population": lambda x: x * x.var(1, correction=0, keepdim=True),
    "var, biased": lambda x: x * torch.var(x, 1, unbiased=False, keepdim=True),
    "std": lambda x: x * x.std(dim=1, keepdim=True),
    "amax": lambda x: x * x.amax(1, keepdim=True),
    "amin": lambda x: x * x.amin(dim=1, keepdim=True),
    "max": lambda x: x * x.max(1, keepdim=True)[0],
    "min": lambda x: x * x.min(dim=1, keepdim=True).values,
    "norm": lambda x: x * x.norm(dim=1, keepdim=True),
    "norm of the first order": lambda x: x * torch.norm(x, 1, dim=1, keepdim=True),
    "vector norm": lambda x: x * torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "normalize": lambda x: x * F.normalize(x, dim=1),
    "normalize to one": lambda x: F.normalize(x + 1, p=1.0, dim=1),
    "norm of the largest": lambda x: x * x.norm(p=float("inf"), dim=1, keepdim=True),
    "over a permuted axis": lambda x: x * x.permute(0, 2, 3, 1).std(-1)[:, None],
    "after a nonlinearity": lambda x: x * (x.sigmoid() + 1).mean(1, keepdim=True),
}


class _Reduction(nn.Module):
    def __init__(self, reduce: Between) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(x)


@_MODES
@pytest.mark.parametrize("name", _REDUCTIONS)
def test_a_reduction_over_channels_multiplied_back_is_elastic_and_equal(name: str, training: bool):
    supernet = supernet_of(lambda: _Net(extra=_Reduction(_REDUCTIONS[name])))
    assert _names(supernet.space) == ["a", "b"]
    assert_guarantee(supernet, training=training)


_SPELLINGS: dict[str, Between] = {
    "axis for dim": lambda x: x * x.mean(axis=1, keepdim=True),  # pyright: ignore[reportCallIssue]
    "var by position": lambda x: x * x.var(1, True, True),
    "std by position": lambda x: x * torch.std(x, 1, False, True),
    "mean of another type": lambda x: x * x.float().mean(1, keepdim=True, dtype=torch.float64),
}


@pytest.mark.parametrize("name", _SPELLINGS)
def test_a_reduction_spelt_otherwise_is_elastic_and_equal(name: str):
    supernet = supernet_of(lambda: _Net(extra=_Reduction(_SPELLINGS[name])))
    assert _names(supernet.space) == ["a", "b"]
    assert_guarantee(supernet, training=False)


@pytest.mark.parametrize("name", ["mean", "std", "max", "normalize"])
def test_a_reduction_in_the_model_itself_is_elastic_and_equal(name: str):
    supernet = supernet_of(lambda: _Net(_REDUCTIONS[name]))
    assert _names(supernet.space) == ["a", "b"]
    assert_guarantee(supernet, training=True)


_INDICES: dict[str, Between] = {
    "max": lambda x: x * x.max(1, keepdim=True)[1],
    "min": lambda x: x * (lambda least: least.values * least.indices)(x.min(dim=1, keepdim=True)),
    "argmax": lambda x: x * x.argmax(1, keepdim=True),
}


@pytest.mark.parametrize("name", _INDICES)
def test_which_channel_is_the_largest_freezes(name: str):
    supernet = supernet_of(lambda: _Net(extra=_Reduction(_INDICES[name])))
    assert _names(supernet.space) == ["b"]
    assert "in extra" in _reasons(supernet.space)["a"]
    assert_guarantee(supernet, training=True)


class _TwoReductions(nn.Module):
    """In the same module, a reduction over channels that vary and one over channels that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.c(self.b(y * y.mean(1, keepdim=True) + x.mean(1, keepdim=True)).relu())


@_MODES
def test_a_reduction_over_fixed_channels_as_many_as_a_ceiling_has_is_left_alone(training: bool):
    def make(size: int) -> torch.Tensor:
        return batch(size, 8, 8, 8)

    assert_guarantee(supernet_of(_TwoReductions, make(2)), make, training=training)


# Sizes kept as lists --------------------------------------------------------------------------------------------------


class _Split(nn.Module):
    """Parts of a concatenation are cut apart again, by sizes that the module keeps."""

    def __init__(self, kind: type[list] | type[tuple]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([conv_bn(3, num) for num in (8, 8, 16)])
        self.sizes = kind([8, 8, 16])
        self.readers = nn.ModuleList([nn.Conv2d(num, 4, 1) for num in (8, 8, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([part(x) for part in self.parts], 1).sigmoid()
        parts = x.split(self.sizes, 1)
        return torch.stack([reader(part) for reader, part in zip(self.readers, parts, strict=True)]).sum(0)


@pytest.mark.parametrize("kind", [list, tuple])
def test_sizes_of_a_split_follow_part_by_part(kind: type[list] | type[tuple]):
    supernet = supernet_of(lambda: _Split(kind))
    assert [(group.name, group.choices) for group in supernet.space.groups] == [
        *(("parts.0.0", (4, 8)), ("parts.1.0", (4, 8)), ("parts.2.0", (4, 8, 12, 16))),
    ]
    for widths in ((4, 8, 16), (8, 4, 8), (4, 4, 4), (8, 8, 12), (8, 8, 16)):
        small = supernet.extract(Widths(dict(zip(_names(supernet.space), widths, strict=True))))
        assert isinstance(small, _Split) and small.sizes == kind(widths)
        assert small(batch(2)).shape == (2, 4, 8, 8)
    assert isinstance(supernet.model, _Split) and supernet.model.sizes == kind([8, 8, 16])


@_MODES
@pytest.mark.parametrize("kind", [list, tuple])
def test_one_pass_of_a_split_by_a_list_equals_the_extracted_nets(kind: type[list] | type[tuple], training: bool):
    assert_guarantee(supernet_of(lambda: _Split(kind)), training=training)


class _SplitByNumbers(_Split):
    """Each size is a number of its own."""

    def __init__(self) -> None:
        super().__init__(list)
        self.first, self.second, self.third = self.sizes
        del self.sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([part(x) for part in self.parts], 1).sigmoid()
        parts = x.split([self.first, self.second, self.third], 1)
        return torch.stack([reader(part) for reader, part in zip(self.readers, parts, strict=True)]).sum(0)


def test_every_setting_of_a_split_by_equal_numbers_runs():
    supernet = supernet_of(_SplitByNumbers)
    choices = [group.choices for group in supernet.space.groups]
    for widths in itertools.product(*choices):
        small = supernet.extract(Widths(dict(zip(_names(supernet.space), widths, strict=True))))
        assert small(batch(2)).shape == (2, 4, 8, 8)


# Calls and layers that are seldom seen --------------------------------------------------------------------------------


class _ByKeyword(_Net):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = (self.norm(input=x) if self.layer == "norm" else self.norm(x)).sigmoid()
        return self.c((self.b(input=x) if self.layer == "convolution" else self.b(x)).relu())


@pytest.mark.parametrize("layer", ["norm", "convolution"])
def test_a_layer_called_by_keyword_is_elastic_and_equal(layer: str):
    supernet = supernet_of(lambda: _ByKeyword(layer))
    assert _names(supernet.space) == ["a", "b"]
    assert_guarantee(supernet, training=True)


def test_an_output_without_samples_is_refused():
    class Net(_Net):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return {"scores": y, "penalty": y.square().mean()}

    with pytest.raises(InputError):
        supernet_of(Net)


def test_a_buffer_that_the_forward_counts_up_is_written_by_no_pass():
    class Net(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def middle(self, x: torch.Tensor) -> torch.Tensor:
            self.get_buffer("calls").add_(1)
            return x

    supernet = supernet_of(Net)
    supernet.subnet(supernet.space.full())(batch(2))
    assert int(supernet.model.get_buffer("calls")) == 0
    supernet(batch(4), [supernet.space.full(), supernet.space.smallest()])
    assert int(supernet.model.get_buffer("calls")) == 0


def test_an_instance_norm_without_tensors_is_elastic_and_says_its_size():
    supernet = supernet_of(lambda: _Net(extra=nn.InstanceNorm2d(16)))
    assert _names(supernet.space) == ["a", "b"]
    layer = supernet.extract(supernet.space.smallest()).get_submodule("extra")
    assert isinstance(layer, nn.InstanceNorm2d) and layer.num_features == 4


class _NormsInAList(nn.Module):
    """Calls modules of a list and normalises over channels itself, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / (1 + x.var(1, keepdim=True))
        for norm in self.norms:
            x = norm(x.movedim(1, -1)).movedim(-1, 1)
        return x * x.mean(1, keepdim=True)


@_MODES
def test_a_module_that_reduces_beside_norms_in_a_list_is_elastic_and_equal(training: bool):
    supernet = supernet_of(lambda: _Net(extra=_NormsInAList()))
    assert _names(supernet.space) == ["a", "b"]
    assert_guarantee(supernet, training=training)


class _Frames(nn.Module):
    """Takes frames out of the batch's samples, and puts them back."""

    def __init__(self, norm: nn.Module, *, frames_first: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 1), norm, nn.Conv2d(16, 16, 1))
        self.frames_first = frames_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = (2, 0, 1, 3) if self.frames_first else (0, 2, 1, 3)
        frames = x.reshape(x.shape[0], 16, 4, -1).permute(order)
        y = self.inner(frames.reshape(x.shape[0] * 4, 16, 1, -1)).reshape(frames.shape)
        return y.permute([order.index(axis) for axis in range(4)]).reshape(x.shape)


@_MODES
@pytest.mark.parametrize("frames_first", [True, False])
def test_channels_of_tensors_without_samples_on_axis_0_are_frozen(frames_first: bool, training: bool):
    supernet = supernet_of(lambda: _Net(extra=_Frames(nn.Sigmoid(), frames_first=frames_first)))
    assert _names(supernet.space) == ["b"]
    assert "the samples are not on axis 0" in _reasons(supernet.space)["extra.inner.0"]
    assert_guarantee(supernet, training=training)


@_MODES
def test_a_batch_norm_over_several_rows_of_each_sample_has_statistics_for_each_subnet(training: bool):
    supernet = supernet_of(lambda: _Net(extra=_Frames(nn.BatchNorm2d(16))))
    assert _names(supernet.space) == ["extra.inner.0", "b"]
    assert_guarantee(supernet, training=training)


def test_a_batch_norm_over_samples_that_do_not_stand_one_after_the_other_is_refused():
    with pytest.raises(InputError, match="the 2 samples do not stand one after the other: subnets in one pass cannot"):
        supernet_of(lambda: _Net(extra=_Frames(nn.BatchNorm2d(16), frames_first=True)))


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))
    model.lock = threading.Lock()  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"cannot be copied \(TypeError: cannot pickle .*lock.*\), and psenet"):
        psenet.trace(model, torch.randn(2, 3, 8, 8))


class _BiasFromCoordinates(nn.Module):
    """Adds a faint bias that a little network computes from a buffer (as relative positions in attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("coordinates", torch.rand(7, 2, dtype=torch.float64))
        self.mlp = nn.Sequential(nn.Linear(2, 32), nn.Sigmoid(), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-5 * self.mlp(self.get_buffer("coordinates")).mean()


@_MODES
def test_what_is_computed_from_parameters_by_layers_stays_at_full_width(training: bool):
    supernet = supernet_of(lambda: _Net(extra=_BiasFromCoordinates()))
    assert _names(supernet.space) == ["a", "b"]
    assert "is computed from parameters, once for all subnets" in _reasons(supernet.space)["extra.mlp.0"]
    assert_guarantee(supernet, training=training)


class _PlainTensor(nn.Module):
    """Keeps a constant as a plain attribute, neither parameter nor buffer: it comes before the input in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) * self.constant


@_MODES
def test_a_constant_of_another_size_is_not_taken_for_the_samples(training: bool):
    supernet = supernet_of(lambda: _Net(extra=_PlainTensor()))
    assert _names(supernet.space) == ["a", "extra.conv", "b"]
    assert_guarantee(supernet, training=training)


def test_the_ops_that_are_counted_are_those_that_can_be_masked():
    assert {_AS_TRACED.get(name, name) for name in _MASKED} == COUNTED_OPS


@_MODES
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_an_instance_norm_with_running_statistics_is_elastic_and_equal(affine: bool, training: bool):
    supernet = supernet_of(lambda: _Net(extra=nn.InstanceNorm2d(16, affine=affine, track_running_stats=True)))
    assert _names(supernet.space) == ["a", "b"]
    assert_guarantee(supernet, training=training)


class _Cut(_Net):
    """A fraction of the channels is worked on, its size computed from the shape; b reads what is left."""

    def __init__(self, cut: Between, num_left: int) -> None:
        super().__init__()
        self.cut, self.b = cut, nn.Conv2d(num_left, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.cut(self.a(x).relu())).relu())


_FRACTIONS: dict[str, tuple[Between, int]] = {
    "first half": (lambda x: x[:, : x.shape[1] // 2], 8),
    "all but a quarter": (lambda x: x[:, x.shape[1] // 4 :], 12),
    "halves": (lambda x: torch.cat([x[:, x.shape[1] // 2 :].sigmoid(), x[:, : x.shape[1] // 2]], 1), 16),
    "narrowed": (lambda x: x.narrow(1, x.shape[1] // 4, x.shape[1] // 2), 8),
}


@pytest.mark.parametrize("name", _FRACTIONS)
def test_channels_cut_at_a_fraction_of_their_number_are_elastic_at_every_width(name: str):
    supernet = supernet_of(lambda: _Cut(*_FRACTIONS[name]), divisor=1)
    space = supernet.space
    assert _names(space) == ["a", "b"] and space.groups[0].unit in (2, 4)
    for width in space.groups[0].choices:
        assert_equal_one_by_one(supernet, batch(4), [Widths({"a": width, "b": 3}), space.full()], training=False)


def test_a_cut_at_a_number_that_a_module_keeps_leaves_both_parts_free():
    class Net(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.b = 4, nn.Conv2d(4, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)[:, : self.size]).relu())

    assert _names(supernet_of(Net, divisor=1).space) == ["a[0:4]", "a[4:16]", "b"]


def test_a_convolution_along_channels_leaves_the_last_of_several_groups_free():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(24, 4, 1)
            self.along = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.a(x), self.b(x)], 1)
            gate = self.along(x.mean((2, 3)).unsqueeze(1)).sigmoid()
            return self.c(x * gate.transpose(1, 2).unsqueeze(-1))

    supernet = supernet_of(Net)
    assert _names(supernet.space) == ["b"]
    assert _reasons(supernet.space)["a"] == "dropping its channels would make others neighbours"
    assert_guarantee(supernet, training=True)


def test_channels_that_meet_fixed_ones_after_a_pool_are_frozen_by_the_sum():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.out = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(8, 8, 1),
                nn.Conv2d(8, 4, 1),
            )
            self.pool = nn.AvgPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.c(self.pool(self.a(x).flip(1)) + self.b(self.pool(x))))

    reasons = _reasons(supernet_of(Net).space)
    assert reasons["a"].startswith("moves channels")
    assert reasons["b"] == "meets channels that always stay (aten.add.Tensor in the model itself)"


class _RarelyDropped(_Net):
    """Stochastic depth, so rare that most passes drop nothing."""

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1) > 0.1
        return x * keep.to(x.dtype)


def test_a_net_that_rarely_drops_something_in_training_is_elastic_whatever_the_random_numbers():
    for seed in range(10):
        torch.manual_seed(seed)
        assert _names(supernet_of(_RarelyDropped).space) == ["a", "b"]
