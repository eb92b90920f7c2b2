import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode

import psenet
from architectures import (
    ARCHITECTURES,
    TIMM_SIDES,
    Architecture,
    Head,
    conv_bn,
    timm_architecture,
    traced,
)
from psenet.errors import InputError
from psenet.memory_format import ImageLayout
from psenet.widths import Widths

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
Run = Callable[[Widths, torch.Tensor], torch.Tensor]


@cache
def _supernet(name: str, dtype: torch.dtype) -> psenet.Supernet:
    model, space = traced(name)
    return psenet.Supernet(model, space).to(dtype)


def _architecture(name: str) -> Architecture:
    return ARCHITECTURES[name] if name in ARCHITECTURES else timm_architecture(name)


def _draw(supernet: psenet.Supernet, n: int, seed: int) -> list[Widths]:
    """Draw subnets; the first is often a bound, so that the highest and the lowest ceilings are met."""
    rng = np.random.default_rng(seed)
    space = supernet.space
    drawn = [space.sample(rng, space.uniform(float(rng.choice([0.5, 0.75, 1.0])))) for _ in range(n)]
    return [*drawn[1:], [space.full(), space.smallest(), drawn[0]][seed % 3]]


def _gradients(supernet: psenet.Supernet, y: torch.Tensor, weighting: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*supernet.named_parameters(), strict=True)
    gradients = torch.autograd.grad((y * weighting).sum(), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def _assert_close(ours: torch.Tensor, expected: torch.Tensor, *, floor: float, what: str) -> None:
    assert ours.shape == expected.shape, what
    scale = max(expected.abs().max().item(), floor)
    error = (ours - expected).abs().max().item() / scale
    assert error <= TOLERANCE[ours.dtype], f"{what}: relative error {error:.1e}"


def _assert_equal_to(supernet: psenet.Supernet, x: torch.Tensor, widths: list[Widths], run: Run, *, seed: int) -> None:
    """Compare one pass for all subnets with `run` for each of them: outputs, and gradients of a weighted sum."""
    n = len(widths)
    together = supernet(x, widths)
    apart = torch.zeros_like(together)
    weighting = torch.randn(together.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected: dict[str, torch.Tensor] = {}
    for number, setting in enumerate(widths):
        y = run(setting, x[number::n])
        apart[number::n] = y.detach()
        for name, gradient in _gradients(supernet, y, weighting[number::n].to(y)).items():
            expected[name] = expected.get(name, 0) + gradient
    _assert_close(together.detach(), apart, floor=1e-6, what="outputs")
    # A bias before a batch norm has no gradient but rounding, of which float32 has more: the floor covers it.
    share = 0.5 if x.dtype == torch.float32 else 0.01
    floor = share * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in _gradients(supernet, together, weighting.to(together)).items():
        _assert_close(gradient, expected[name], floor=floor, what=f"gradient of {name}")


def _check(name: str, dtype: torch.dtype, *, training: bool, n: int, seed: int, batch_size: int) -> None:
    supernet = _supernet(name, dtype).train(training)
    before = {key: tensor.clone() for key, tensor in supernet.state_dict().items()}
    x, widths = _architecture(name).batch(batch_size, seed=seed, dtype=dtype), _draw(supernet, n, seed)
    _assert_equal_to(supernet, x, widths, lambda setting, part: supernet.subnet(setting)(part), seed=seed)
    if not training:
        with torch.no_grad():
            together = supernet(x, widths)
            for number, setting in enumerate(widths):
                alone = supernet.extract(setting)(x[number::n])
                _assert_close(together[number::n], alone, floor=1e-6, what="outputs of the extracted net")
    for key, tensor in supernet.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} was changed"


# The guarantee --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_pass_equals_the_subnets_one_by_one(name: str, dtype: torch.dtype, training: bool):
    # Enough samples a subnet that batch statistics do not amplify rounding; 17 is not divisible by 3.
    for n, batch_size in ((1, 6), (2, 16), (3, 18), (4, 24), (3, 17)):
        seed = 10 * n + 2 * batch_size + training
        _check(name, dtype, training=training, n=n, seed=seed, batch_size=batch_size)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*TIMM_SIDES, pytest.param("densenet121", marks=pytest.mark.slow)])
def test_one_pass_of_a_timm_model_equals_its_subnets_one_by_one(name: str, training: bool):
    # float64: deep nets at a spatial size of one pixel and a batch of a few samples amplify rounding.
    _check(name, torch.float64, training=training, n=2, seed=5 + training, batch_size=12)


# An independent reference: dense masked arithmetic, written by hand ---------------------------------------------------


def _norm(layer: nn.Module, x: torch.Tensor, keep: int, training: bool) -> torch.Tensor:
    """Batch norm from its formula, dropped channels set to zero."""
    assert isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None
    mean = x.mean((0, 2, 3)) if training else layer.running_mean
    variance = x.var((0, 2, 3), correction=0) if training else layer.running_var
    y = (x - mean[:, None, None]) / (variance[:, None, None] + layer.eps).sqrt()
    y = y * layer.weight[:, None, None] + layer.bias[:, None, None]
    return y * (torch.arange(x.shape[1]) < keep).to(x)[:, None, None]


def _conv_norm(block: nn.Module, x: torch.Tensor, keep: int, training: bool) -> torch.Tensor:
    conv, norm = block.get_submodule("0"), block.get_submodule("1")
    assert isinstance(conv, nn.Conv2d)
    return _norm(norm, F.conv2d(x, conv.weight, None, conv.stride, conv.padding), keep, training)


def _masked_vgg(model: nn.Module, widths: Widths, x: torch.Tensor, training: bool) -> torch.Tensor:
    x = F.max_pool2d(_conv_norm(model.get_submodule("0"), x, widths["0.0"], training).relu(), 2)
    x = _conv_norm(model.get_submodule("3"), x, widths["3.0"], training).relu()
    x = _conv_norm(model.get_submodule("5"), x, widths["5.0"], training).relu()
    head = model.get_submodule("7.3")
    assert isinstance(head, nn.Linear)
    return x.mean((2, 3)) @ head.weight.T + head.bias


def _masked_resnet(model: nn.Module, widths: Widths, x: torch.Tensor, training: bool) -> torch.Tensor:
    outer = [widths["0.0"], widths["0.0"], widths["3.conv2.0"], widths["3.conv2.0"]]
    x = _conv_norm(model.get_submodule("0"), x, outer[0], training).relu()
    for number in (2, 3, 4):
        block, keep = model.get_submodule(str(number)), outer[number - 1]
        inner = _conv_norm(block.get_submodule("conv1"), x, widths[f"{number}.conv1.0"], training).relu()
        shortcut = _conv_norm(block.get_submodule("shortcut"), x, keep, training) if number == 3 else x
        x = (_conv_norm(block.get_submodule("conv2"), inner, keep, training) + shortcut).relu()
    head = model.get_submodule("5.3")
    assert isinstance(head, nn.Linear)
    return x.mean((2, 3)) @ head.weight.T + head.bias


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "masked"), [("vgg_bn", _masked_vgg), ("resnet_basic", _masked_resnet)])
def test_one_pass_equals_a_dense_masked_net_written_by_hand(name: str, masked: Callable, training: bool):
    supernet = _supernet(name, torch.float64).train(training)
    for seed in range(4):
        x, widths = ARCHITECTURES[name].batch(8, seed=seed), _draw(supernet, 4, seed)
        _assert_equal_to(
            supernet, x, widths, lambda setting, part: masked(supernet.model, setting, part, training), seed=seed
        )


# What is shared and what is not ---------------------------------------------------------------------------------------


def _fresh(name: str = "resnet_basic") -> psenet.Supernet:
    model, space = traced(name)
    return psenet.Supernet(model, space)


def test_the_users_model_is_copied():
    model, space = traced("vgg_bn")
    supernet = psenet.Supernet(model, space)
    ours, theirs = supernet.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not {tensor.data_ptr() for tensor in ours.values()} & {tensor.data_ptr() for tensor in theirs.values()}
    assert not model._forward_pre_hooks and not any(module._forward_hooks for module in model.modules())


def test_a_subnet_has_statistics_of_its_own():
    supernet = _fresh().train()
    widths = supernet.space.uniform(0.5)
    one, other = supernet.subnet(widths), supernet.subnet(widths)
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    one(ARCHITECTURES["resnet_basic"].batch(4))
    assert not torch.equal(one.get_buffer("0.1.running_mean"), other.get_buffer("0.1.running_mean"))
    assert int(one.get_buffer("0.1.num_batches_tracked")) == int(other.get_buffer("0.1.num_batches_tracked")) + 1
    for name, buffer in supernet.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_subnet_follows_the_supernets_weights_and_an_extracted_one_does_not():
    supernet = _fresh().eval()
    widths, x = supernet.space.smallest(), ARCHITECTURES["resnet_basic"].batch(4)
    subnet, extracted = supernet.subnet(widths), supernet.extract(widths)
    before = subnet(x)
    _assert_close(before, extracted(x), floor=1e-6, what="before the step")
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    before.square().sum().backward()
    optimizer.step()
    after = subnet(x)
    assert (after - before).abs().max() > 1e-3
    _assert_close(after, supernet.extract(widths)(x), floor=1e-6, what="after the step")
    assert torch.equal(extracted(x), before)


def test_gradients_through_a_subnet_reach_only_the_channels_it_keeps():
    supernet = _fresh("vgg_bn").eval()
    widths = Widths({"0.0": 8, "3.0": 12, "5.0": 32})
    supernet.subnet(widths)(ARCHITECTURES["vgg_bn"].batch(2)).sum().backward()
    gradient = supernet.model.get_parameter("3.0.weight").grad
    assert gradient is not None and gradient.shape == (24, 16, 3, 3)
    assert (gradient[:12, :8] != 0).any() and (gradient[12:] == 0).all() and (gradient[:, 8:] == 0).all()


def test_an_extracted_net_is_a_plain_module_that_owns_its_weights():
    supernet = _fresh("mobilenet_v2")
    extracted = supernet.extract(supernet.space.uniform(0.5))
    owned = {tensor.untyped_storage().data_ptr() for tensor in extracted.state_dict().values()}
    assert not owned & {tensor.untyped_storage().data_ptr() for tensor in supernet.state_dict().values()}
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in extracted.parameters())
    assert {type(module).__module__.partition(".")[0] for module in extracted.modules()} <= {"torch", "architectures"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in extracted.modules())
    copy.deepcopy(extracted).load_state_dict(extracted.state_dict())
    x = ARCHITECTURES["mobilenet_v2"].batch(2)
    extracted.eval()(x).sum().backward()
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_modules_take_over_the_supernets_mode():
    supernet = _fresh("vgg_bn")
    widths = supernet.space.smallest()
    for training in (True, False):
        supernet.train(training)
        assert supernet.subnet(widths).training is training and supernet.extract(widths).training is training


def test_samples_come_back_in_order_when_the_subnets_do_not_divide_the_batch():
    supernet = _supernet("vgg_bn", torch.float64).eval()
    x = ARCHITECTURES["vgg_bn"].batch(7)
    widths = [supernet.space.full(), supernet.space.smallest(), supernet.space.uniform(0.5)]
    with torch.no_grad():
        y = supernet(x, widths)
        for sample in range(7):
            alone = supernet.extract(widths[sample % 3])(x[sample : sample + 1])
            _assert_close(y[sample : sample + 1], alone, floor=1e-6, what=f"sample {sample}")


def test_the_ceiling_is_the_lowest_stratum_that_holds_the_subnets():
    supernet = _fresh()
    space = supernet.space
    assert supernet.ceiling([space.smallest()]) == space.uniform(0.5)
    assert supernet.ceiling([space.smallest(), space.uniform(0.75)]) == space.uniform(0.75)
    assert supernet.ceiling([space.full(), space.smallest()]) == space.full()
    one_wide = Widths({**space.smallest(), "3.conv2.0": 24})
    assert supernet.ceiling([one_wide]) == space.full()


# Channels from the right ----------------------------------------------------------------------------------------------


def _backwards(*parts: int, unit: int = 1) -> list[int]:
    """Return the order in which the units of every part come backwards, channels of a unit as they are."""
    order, start = [], 0
    for part in parts:
        firsts = range(start, start + part, unit)
        order += [first + channel for first in reversed(firsts) for channel in range(unit)]
        start += part
    return order


_REVERSALS = {
    "vgg_bn": {16: _backwards(16), 24: _backwards(24), 32: _backwards(32)},
    "vgg_without_norm": {16: _backwards(16), 24: _backwards(24)},
    "resnet_basic": {16: _backwards(16), 24: _backwards(24)},
    "resnet_bottleneck": {8: _backwards(8), 16: _backwards(16), 32: _backwards(32)},
    "mobilenet_v3": {8: _backwards(8), 16: _backwards(16), 24: _backwards(24), 32: _backwards(32)},
    "convnext": {16: _backwards(16), 24: _backwards(24), 32: _backwards(32), 48: _backwards(48)},
    "functional_norm": {16: _backwards(16), 24: _backwards(24)},
    # What reads a concatenation has its parts one after the other.
    "densenet": {8: _backwards(8), 16: _backwards(16), 24: _backwards(16, 8), 32: _backwards(16, 8, 8)},
    "split_by_concat": {8: _backwards(8), 16: _backwards(16), 24: _backwards(8, 16)},
    # Two channels of the second convolution come from one of the first; nine features from one channel.
    "channel_multiplier": {16: _backwards(16), 32: _backwards(32, unit=2)},
    "flatten_to_linear": {16: _backwards(16), 24: _backwards(24), 32: _backwards(32), 216: _backwards(216, unit=9)},
}
"""By the length of an axis, the order of its channels when those of every group stand backwards."""


def _reversed(tensor: torch.Tensor, orders: dict[int, list[int]]) -> torch.Tensor:
    for axis, length in enumerate(tensor.shape):
        if length in orders:
            tensor = tensor.index_select(axis, torch.tensor(orders[length]))
    return tensor


def _with_channels_reversed(supernet: psenet.Supernet, orders: dict[int, list[int]]) -> psenet.Supernet:
    other = copy.deepcopy(supernet)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(_reversed(tensor.clone(), orders))
    return other


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", _REVERSALS)
def test_a_subnet_from_the_right_is_one_from_the_left_of_the_net_with_its_channels_reversed(name: str, training: bool):
    supernet, orders = _supernet(name, torch.float64).train(training), _REVERSALS[name]
    other, x = _with_channels_reversed(supernet, orders), ARCHITECTURES[name].batch(6)
    full = supernet.space.full()
    # By hand or not, a net whose channels stand backwards is the same net.
    _assert_close(other(x, full).detach(), supernet(x, full).detach(), floor=1e-6, what="outputs of the full net")
    for seed in range(3):
        (widths,) = _draw(supernet, 1, seed=3 * seed + 2)
        y, expected = supernet(x, widths, from_right=True), other(x, widths)
        _assert_close(y, expected, floor=1e-6, what="outputs")
        weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ours, theirs = _gradients(supernet, y, weighting), _gradients(other, expected, weighting)
        floor = 0.01 * max(gradient.abs().max().item() for gradient in theirs.values())
        for parameter, gradient in ours.items():
            _assert_close(gradient, _reversed(theirs[parameter], orders), floor=floor, what=f"gradient of {parameter}")


def _assert_sides_equal_subnets(supernet: psenet.Supernet, x: torch.Tensor) -> None:
    """Compare passes from the left and from the right with the subnets that are plain modules."""
    for widths in (supernet.space.smallest(), supernet.space.uniform(0.7), supernet.space.full()):
        outputs = []
        for from_right in (False, True):
            y = supernet(x, widths, from_right=from_right)
            expected = supernet.subnet(widths, from_right=from_right)(x)
            _assert_close(y.detach(), expected.detach(), floor=1e-6, what=f"outputs, {from_right=}")
            weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            ours, theirs = _gradients(supernet, y, weighting), _gradients(supernet, expected, weighting)
            floor = 0.01 * max(gradient.abs().max().item() for gradient in theirs.values())
            for name, gradient in ours.items():
                _assert_close(gradient, theirs[name], floor=floor, what=f"gradient of {name}, {from_right=}")
            outputs.append(y.detach())
        assert torch.equal(*outputs) == (widths == supernet.space.full())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_pass_from_either_side_equals_the_subnet_from_there(name: str, training: bool):
    supernet = _supernet(name, torch.float64).train(training)
    _assert_sides_equal_subnets(supernet, ARCHITECTURES[name].batch(6))


class _Standardised(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(input, (self.weight - mean) * torch.rsqrt(variance + 1e-5), self.bias)


def _with_computed_weights(layer: Callable[[int, int, int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        *(layer(3, 16, 3), nn.ReLU(), layer(16, 24, 3), nn.BatchNorm2d(24), nn.Sigmoid(), layer(24, 16, 1), Head(16))
    )


_COMPUTED = {
    "standardised": _with_computed_weights(_Standardised),
    "weight norm": _with_computed_weights(lambda *sizes: weight_norm(nn.Conv2d(*sizes))),
}


def _small(build: Callable[[], nn.Module], **options: Any) -> psenet.Supernet:
    architecture = Architecture(build)
    model = architecture.model()
    return psenet.Supernet(model, psenet.trace(model, architecture.batch(2), divisor=4, **options))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", _COMPUTED)
def test_one_pass_with_computed_weights_equals_the_subnet_from_either_side(name: str, training: bool):
    supernet = _small(_COMPUTED[name]).train(training)
    assert len(supernet.space.groups) == 3
    _assert_sides_equal_subnets(supernet, Architecture(nn.Identity).batch(6))


def test_running_statistics_are_those_of_the_last_channels_from_the_right():
    supernet = _fresh("vgg_bn").eval()
    widths = Widths({"0.0": 8, "3.0": 12, "5.0": 32})
    subnet = supernet.subnet(widths, from_right=True)
    for name, buffer in subnet.named_buffers():
        whole = supernet.model.get_buffer(name)
        assert torch.equal(buffer, whole[-buffer.shape[0] :] if buffer.ndim else whole)
    assert subnet.get_buffer("0.1.running_mean").shape == (8,)


def test_one_subnet_from_the_right_may_stand_in_a_list():
    supernet = _supernet("vgg_bn", torch.float64).eval()
    x, widths = ARCHITECTURES["vgg_bn"].batch(3), supernet.space.smallest()
    assert torch.equal(supernet(x, [widths], from_right=True), supernet(x, widths, from_right=True))


@pytest.mark.parametrize("num_subnets", [2, 3])
def test_several_subnets_from_the_right_are_refused(num_subnets: int):
    supernet = _supernet("vgg_bn", torch.float64)
    x = ARCHITECTURES["vgg_bn"].batch(6)
    with pytest.raises(InputError, match=f"from_right is for a single subnet; got {num_subnets}"):
        supernet(x, [supernet.space.smallest()] * num_subnets, from_right=True)


# Copies ---------------------------------------------------------------------------------------------------------------

_COPIED: dict[str, Callable[[], psenet.Supernet]] = {
    **{name: lambda name=name: _fresh(name) for name in ("resnet_basic", "convnext", "rms_norms", "functional_norm")},
    "weight norm": lambda: _small(_COMPUTED["weight norm"]),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", _COPIED)
def test_a_copy_of_a_supernet_that_has_run_gives_the_same_and_is_independent(name: str, training: bool):
    supernet = _COPIED[name]().train(training)
    space, x = supernet.space, Architecture(nn.Identity, (3, 8, 8)).batch(6)
    calls: list[tuple[Any, bool]] = [([space.full(), space.smallest()], False), (space.uniform(0.5), True)]

    def run(module: psenet.Supernet) -> list[torch.Tensor]:
        return [module(x, widths, from_right=from_right).detach() for widths, from_right in calls]

    before = run(supernet)
    other = copy.deepcopy(supernet)
    assert other.training is training
    for ours, theirs in zip(run(other), before, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert not any(torch.equal(*pair) for pair in zip(run(other), before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(run(supernet), before, strict=True))
    other(x, space.smallest()).sum().backward()
    assert all(parameter.grad is None for parameter in supernet.parameters())
    assert any(parameter.grad is not None for parameter in other.parameters())


# Memory layout --------------------------------------------------------------------------------------------------------


class _Layouts(TorchFunctionMode):
    """Notes of every convolution whether what it reads is channels-last or contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d:
            is_last = args[0].is_contiguous(memory_format=torch.channels_last)
            self.seen.append("channels last" if is_last else "NCHW" if args[0].is_contiguous() else "other")
        return func(*args, **(kwargs or {}))


def _layouts(supernet: psenet.Supernet, x: Any, widths: Sequence[Widths]) -> list[str]:
    supernet(x, widths)  # the first pass tries it out
    with _Layouts() as noted:
        supernet(x, widths)
    return noted.seen


class _Viewing(nn.Module):
    """Views its last feature map as a vector, which needs NCHW."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv_bn(3, 16), conv_bn(16, 24, stride=2), nn.Linear(24 * 25, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.view(x.shape[0], -1))


def _reading() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), nn.ReLU(), conv_bn(16, 24, stride=2), nn.ReLU(), Head(24))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("build", "layout"), [(_reading, "channels last"), (_Viewing, "NCHW")])
def test_images_run_channels_last_where_the_model_can(build: Callable[[], nn.Module], layout: str, training: bool):
    supernet = _small(build).train(training)
    space, x = supernet.space, Architecture(build).batch(7)
    assert len(space.groups) == 2
    for n in (1, 2, 3):
        widths = [space.uniform(0.5), space.full(), space.smallest()][:n]
        assert _layouts(supernet, x, widths) == [layout] * 2
        _assert_equal_to(supernet, x, widths, lambda setting, part: supernet.subnet(setting)(part), seed=n)


def test_images_stay_as_they_come_where_that_is_asked_for():
    trying = _small(_reading)
    supernet = psenet.Supernet(trying.model, trying.space, channels_last=False).eval()
    x, widths = Architecture(_reading).batch(6), [supernet.space.smallest(), supernet.space.full()]
    assert _layouts(supernet, x, widths) == ["NCHW"] * 2
    _assert_close(supernet(x, widths), trying.eval()(x, widths), floor=1e-6, what="outputs")


def test_images_that_are_channels_last_already_make_no_difference():
    supernet = _small(_reading).eval()
    x, widths = Architecture(_reading).batch(5), [supernet.space.smallest(), supernet.space.full()]
    already = x.contiguous(memory_format=torch.channels_last)
    assert _layouts(supernet, already, widths) == ["channels last"] * 2
    assert torch.equal(supernet(already, widths), supernet(x, widths))


def test_the_trial_of_the_layout_changes_no_buffer_and_draws_nothing():
    def build() -> nn.Module:
        return nn.Sequential(conv_bn(3, 16), nn.Dropout(0.5), nn.ReLU(), conv_bn(16, 24), Head(24))

    supernet = _small(build).train()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    x, widths = Architecture(build).batch(4), supernet.space.smallest()
    outputs = []
    with torch.random.fork_rng():
        for _ in range(2):  # the first pass has the trial before it
            torch.manual_seed(3)
            outputs.append(supernet(x, widths))
    assert torch.equal(*outputs)
    assert all(torch.equal(buffer, before[name]) for name, buffer in supernet.named_buffers())


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x.view(x.shape[0], -1)


def test_the_layout_is_tried_out_once_on_two_samples_and_for_images_alone():
    model = _Counting()
    layout, x = ImageLayout(model), torch.randn(4, 3, 5, 5)
    for other in (x[0], x[:, 0, 0], (x,), {"x": x}, x[:, None]):
        assert layout(other) is other
    assert model.calls == 0
    assert layout(x) is x and layout(x) is x and model.calls == 1


def test_a_model_that_reads_channels_last_gets_images_so():
    layout, x = ImageLayout(nn.Conv2d(3, 4, 3)), torch.randn(4, 3, 5, 5)
    laid_out = layout(x)
    assert torch.equal(laid_out, x) and laid_out.is_contiguous(memory_format=torch.channels_last)
    assert layout(laid_out) is laid_out and x.is_contiguous()


def test_a_copy_of_the_layout_asks_its_own_model():
    layout = ImageLayout(_Counting())
    other = copy.deepcopy(layout)
    x = torch.randn(2, 3, 5, 5)
    assert other(x) is x
    assert (layout._model.calls, other._model.calls) == (0, 1)


# Norms of what does not lie in one piece ------------------------------------------------------------------------------


class _NormOf(nn.Module):
    """A batch norm reads its features as a view of others."""

    def __init__(self, norm: nn.Module, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem, self.norm, self.view = nn.Conv2d(3, 16, 3), norm, view
        self.mix, self.head = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.view(self.stem(x))).relu()
        return self.head(self.mix(x.flatten(2).mean(2)).relu())


_VIEWS: dict[str, Callable[[], nn.Module]] = {
    "a part of the pixels": lambda: _NormOf(nn.BatchNorm2d(16), lambda x: x[..., 1:, :-1]),
    "every second pixel": lambda: _NormOf(nn.BatchNorm2d(16), lambda x: x[..., ::2, ::2]),
    "transposed pixels": lambda: _NormOf(nn.BatchNorm2d(16), lambda x: x.transpose(2, 3)),
    "tokens": lambda: _NormOf(nn.BatchNorm1d(16), lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).tanh().transpose(1, 2)),
    "expanded": lambda: _NormOf(nn.BatchNorm2d(16), lambda x: x.mean(3, keepdim=True).expand(-1, -1, -1, 4)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", _VIEWS)
def test_one_pass_equals_the_subnets_where_a_norm_reads_a_view(name: str, training: bool):
    supernet = _small(_VIEWS[name]).train(training)
    space, x = supernet.space, Architecture(nn.Identity).batch(8)
    assert [group.size for group in space.groups] == [16, 24]
    for widths in ([space.uniform(0.5)], [space.full(), space.smallest(), space.uniform(0.7)]):
        _assert_equal_to(supernet, x, widths, lambda setting, part: supernet.subnet(setting)(part), seed=1)


# Outputs without samples ----------------------------------------------------------------------------------------------


class _Detector(nn.Module):
    """Scores of the samples, and anchors: constants, the same for every sample."""

    def __init__(self, num_anchors: int, *, in_forward: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(conv_bn(3, 16), nn.ReLU(), conv_bn(16, 24), nn.ReLU()), Head(24)
        self.num_anchors, self.in_forward = num_anchors, in_forward
        self.register_buffer("anchors", self._made())

    def _made(self) -> torch.Tensor:
        return torch.arange(2.0 * self.num_anchors, dtype=torch.float64).reshape(self.num_anchors, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        anchors = self._made() if self.in_forward else self.get_buffer("anchors")
        return {"scores": self.head(self.body(x)), "anchors": anchors}


def _assert_anchors_stay(num_anchors: int, *, in_forward: bool, batch_sizes: Sequence[int]) -> None:
    supernet = _small(lambda: _Detector(num_anchors, in_forward=in_forward)).eval()
    space, anchors = supernet.space, torch.arange(2.0 * num_anchors, dtype=torch.float64).reshape(num_anchors, 2)
    assert [group.size for group in space.groups] == [16, 24]
    for batch_size in batch_sizes:
        x = Architecture(nn.Identity).batch(batch_size)
        for widths in ([space.smallest()], [space.full(), space.smallest()]):
            outputs = supernet(x, widths)
            assert torch.equal(outputs["anchors"], anchors), f"{batch_size} samples, {len(widths)} subnets"
            for number, setting in enumerate(widths):
                alone = supernet.extract(setting)(x[number :: len(widths)])["scores"]
                _assert_close(outputs["scores"][number :: len(widths)], alone, floor=1e-6, what="scores")


@pytest.mark.parametrize("in_forward", [False, True], ids=["a buffer", "made in the forward"])
@pytest.mark.parametrize("num_anchors", [1, 4, 7])
def test_outputs_that_do_not_hold_the_samples_are_returned_as_they_are(num_anchors: int, in_forward: bool):
    _assert_anchors_stay(num_anchors, in_forward=in_forward, batch_sizes=[3, 5, 8])


@pytest.mark.parametrize("num_anchors", [2, 4, 5])
def test_outputs_without_samples_may_be_as_many_as_the_samples(num_anchors: int):
    _assert_anchors_stay(num_anchors, in_forward=False, batch_sizes=[num_anchors])


@pytest.mark.parametrize("num_anchors", [2, 3, 6, 12])
def test_a_model_with_any_number_of_constant_outputs_is_elastic(num_anchors: int):
    space = _small(lambda: _Detector(num_anchors)).space
    assert [group.size for group in space.groups] == [16, 24]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first_pass", [True, False])
def test_one_value_per_channel_is_refused_at_the_first_pass_and_later(is_first_pass: bool):
    def build() -> nn.Module:
        return nn.Sequential(conv_bn(3, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), conv_bn(16, 24), Head(24))

    supernet = _small(build).train()
    x = Architecture(build).batch(4)
    if not is_first_pass:
        supernet(x, supernet.space.full())
    message = "a batch of 1 samples gives some of 1 subnets one value per channel, which has no variance"
    with pytest.raises(InputError, match=message):
        supernet(x[:1], supernet.space.full())
    message = "a batch of 3 samples gives some of 2 subnets one value per channel, which has no variance"
    with pytest.raises(InputError, match=message):
        supernet(x[:3], [supernet.space.full(), supernet.space.smallest()])


@pytest.mark.parametrize("num_subnets", [0, 3])
def test_too_many_or_no_subnets_are_refused(num_subnets: int):
    supernet = _supernet("vgg_bn", torch.float32)
    x = ARCHITECTURES["vgg_bn"].batch(2, dtype=torch.float32)
    with pytest.raises(InputError, match=f"a batch of 2 samples takes 1 to 2 subnets; got {num_subnets}"):
        supernet(x, [supernet.space.full()] * num_subnets)


def test_widths_of_another_space_are_refused():
    supernet = _supernet("vgg_bn", torch.float32)
    x = ARCHITECTURES["vgg_bn"].batch(4, dtype=torch.float32)
    full = supernet.space.full()
    wrong = Widths({**full, "3.0": 7})
    other = Widths({"conv9": 8})
    for use in (lambda widths: supernet(x, widths), supernet.subnet, supernet.extract):
        with pytest.raises(InputError, match="7 is not a choice of group '3.0'"):
            use(wrong)
        with pytest.raises(InputError, match="no width for group '0.0'.*unknown group 'conv9'"):
            use(other)
    with pytest.raises(InputError, match="7 is not a choice of group '3.0'"):
        supernet(x, [full, wrong])
    with pytest.raises(InputError, match="unknown group 'conv9'"):
        supernet(x, [other, full])
