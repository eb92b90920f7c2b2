import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import psenet
from architectures import (
    ARCHITECTURES,
    TIMM_SIDES,
    Architecture,
    timm_architecture,
    traced,
)
from psenet.errors import InputError
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


# Refusals -------------------------------------------------------------------------------------------------------------


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
