"""Batch norm of several subnets at once, compared with torch's own on each subnet's samples and channels."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from psenet.errors import InputError
from psenet.parallel.masks import Blocks
from psenet.parallel.norms import _written_out, batch_norm

NUM_CHANNELS = 5
EPS = 1e-3
KEPT = [[True, True, True, False, False], [True] * 5, [True, False, False, True, False]]
"""Of three subnets; the third one's channels do not stand in one piece, as behind a concatenation."""
_SHAPES = {"2-D": (), "3-D": (6,), "4-D": (3, 4), "5-D": (2, 3, 2)}
_BATCHES = [(1, 4), (2, 4), (2, 5), (3, 6), (3, 8)]
"""n and B; the uneven ones have blocks of 3 and 2, and of 3, 3 and 2 samples."""
_AFFINE = pytest.mark.parametrize(
    ("has_weight", "has_bias"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["weight and bias", "no bias", "no weight", "neither"],
)


@dataclass
class _Case:
    """Features in blocks, and what normalises them."""

    blocks: Blocks
    mask: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    grad: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what has a gradient."""
        named = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def gradients(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = self.tensors()
        found = torch.autograd.grad(out, list(tensors.values()), self.grad, allow_unused=True, materialize_grads=True)
        return dict(zip(tensors, found, strict=True))

    def normalised(self) -> torch.Tensor:
        return batch_norm(self.x, self.mask, self.blocks, weight=self.weight, bias=self.bias, eps=EPS)


def _in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return a copy that is contiguous, or has its channels last."""
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _case(
    n: int,
    batch_size: int,
    shape: tuple[int, ...] = (3, 4),
    *,
    layout: str = "contiguous",
    has_weight: bool = True,
    has_bias: bool = True,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> _Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, grad = (_in_layout(random(batch_size, NUM_CHANNELS, *shape), layout).to(dtype) for _ in range(2))
    weight, bias = random(NUM_CHANNELS) + 1, random(NUM_CHANNELS)
    weight, bias = (tensor.to(weight_dtype or dtype).requires_grad_() for tensor in (weight, bias))
    return _Case(
        blocks=Blocks(n, batch_size),
        mask=torch.tensor(KEPT[:n]),
        x=(x * 2 + 3).requires_grad_(),
        weight=weight if has_weight else None,
        bias=bias if has_bias else None,
        grad=grad,
    )


def _alone(
    case: _Case, *, statistics: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None), training: bool = True
) -> torch.Tensor:
    """Return what torch's batch norm makes of each block's samples and kept channels alone; zero elsewhere."""
    out = torch.zeros_like(case.x)
    start = 0
    for number, kept in enumerate(KEPT[: case.blocks.num_subnets]):
        stop = start + len(range(number, case.blocks.batch_size, case.blocks.num_subnets))
        channels = [channel for channel in range(NUM_CHANNELS) if kept[channel]]
        mean, variance, weight, bias = (
            None if tensor is None else tensor[channels] for tensor in (*statistics, case.weight, case.bias)
        )
        y = F.batch_norm(case.x[start:stop, channels], mean, variance, weight, bias, training=training, eps=EPS)
        place = torch.zeros(NUM_CHANNELS, len(channels), dtype=y.dtype)
        for position, channel in enumerate(channels):
            place[channel, position] = 1.0
        spread = torch.einsum("bc...,dc->bd...", y, place)
        out = torch.cat([out[:start], spread, out[stop:]])
        start = stop
    return out


def _assert_close(ours: torch.Tensor, expected: torch.Tensor, *, tolerance: float = 1e-9, what: str = "output") -> None:
    assert ours.shape == expected.shape, what
    scale = max(expected.double().abs().max().item(), 1e-3)
    error = (ours.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def _assert_same_gradients(case: _Case, out: torch.Tensor, expected: torch.Tensor) -> None:
    ours, theirs = case.gradients(out), case.gradients(expected)
    for name, gradient in ours.items():
        _assert_close(gradient, theirs[name], what=f"gradient of {name}")


def _assert_same_as_alone(case: _Case) -> None:
    out, expected = case.normalised(), _alone(case)
    _assert_close(out, expected)
    _assert_same_gradients(case, out, expected)


# Statistics of each block's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), _BATCHES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", _SHAPES)
def test_it_equals_torchs_batch_norm_of_each_subnet_alone(kind: str, layout: str, n: int, batch_size: int):
    _assert_same_as_alone(_case(n, batch_size, _SHAPES[kind], layout=layout))


@_AFFINE
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_scale_and_shift_are_optional(has_weight: bool, has_bias: bool, layout: str):
    _assert_same_as_alone(_case(3, 8, layout=layout, has_weight=has_weight, has_bias=has_bias))


def test_the_numbers_of_two_subnets_by_hand():
    # Of channel 0, subnet 0 has 1 and 3 (mean 2, variance 1), subnet 1 has 10 and 30 (20, 100); both keep it. Of
    # channel 1, subnet 0 has 5 and 7 (6, 1) and keeps it; subnet 1 does not.
    x = torch.tensor([[1.0, 5.0], [3.0, 7.0], [10.0, 4.0], [30.0, -4.0]])
    mask_nC = torch.tensor([[True, True], [True, False]])
    weight, bias = torch.tensor([2.0, 3.0]), torch.tensor([0.5, 1.0])
    out = batch_norm(x, mask_nC, Blocks(2, 4), weight=weight, bias=bias, eps=0.0)
    torch.testing.assert_close(out, torch.tensor([[-1.5, -2.0], [2.5, 4.0], [-1.5, 0.0], [2.5, 0.0]]))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_dropped_channels_are_exact_zeros_and_get_no_gradient(layout: str):
    case = _case(3, 8, layout=layout)
    out = case.normalised()
    gradient = case.gradients(out)["x"]
    for number, (block, of_block) in enumerate(zip(out.split([3, 3, 2]), gradient.split([3, 3, 2]), strict=True)):
        for channel in range(NUM_CHANNELS):
            assert bool((block[:, channel] == 0).all()) is not KEPT[number][channel]
            assert bool((of_block[:, channel] == 0).all()) is not KEPT[number][channel]


def test_a_channel_that_no_subnet_keeps_has_a_gradient_of_zero():
    case = _case(1, 4)
    gradients = case.gradients(case.normalised())
    for name in ("weight", "bias"):
        assert (gradients[name][3:] == 0).all() and (gradients[name][:3] != 0).all()


@pytest.mark.parametrize(("n", "batch_size"), [(2, 4), (2, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@_AFFINE
def test_the_gradient_is_that_of_finite_differences(
    has_weight: bool, has_bias: bool, layout: str, n: int, batch_size: int
):
    case = _case(n, batch_size, (2, 2), layout=layout, has_weight=has_weight, has_bias=has_bias)
    names = list(case.tensors())

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, tensors, strict=True))
        return batch_norm(
            given["x"], case.mask, case.blocks, weight=given.get("weight"), bias=given.get("bias"), eps=EPS
        )

    assert torch.autograd.gradcheck(run, list(case.tensors().values()))


def test_what_needs_no_gradient_gets_none():
    case = _case(2, 4)
    assert case.weight is not None and case.bias is not None
    case.weight.requires_grad_(False)
    out, expected = case.normalised(), _alone(case)
    for ours, theirs in zip(
        torch.autograd.grad(out, [case.x, case.bias], case.grad),
        torch.autograd.grad(expected, [case.x, case.bias], case.grad),
        strict=True,
    ):
        _assert_close(ours, theirs)
    case.x.requires_grad_(False)
    case.bias.requires_grad_(False)
    assert not case.normalised().requires_grad
    with torch.no_grad():
        _assert_close(case.normalised(), expected.detach())


# Memory layout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (2, 5), (3, 6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", ["4-D", "5-D"])
def test_output_and_gradient_have_the_memory_layout_of_the_features(kind: str, layout: str, n: int, batch_size: int):
    case = _case(n, batch_size, _SHAPES[kind], layout=layout)
    formats = {"4-D": torch.channels_last, "5-D": torch.channels_last_3d}
    memory_format = torch.contiguous_format if layout == "contiguous" else formats[kind]
    out = case.normalised()
    assert out.is_contiguous(memory_format=memory_format)
    assert case.gradients(out)["x"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("of_grad", ["contiguous", "channels last", "expanded"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_gradient_that_comes_back_may_lie_in_any_way(layout: str, of_grad: str):
    case = _case(3, 8, layout=layout)
    if of_grad == "expanded":  # as from a sum or a mean over space
        case.grad = case.grad.mean((2, 3), keepdim=True).expand_as(case.grad)
    else:
        case.grad = _in_layout(case.grad, of_grad)
    _assert_same_as_alone(case)


def _cut(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the same values as a part of a larger tensor."""
    whole = torch.cat([x, torch.full_like(x, 7.0)], axis)
    return whole.narrow(axis, 0, x.shape[axis])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_features_may_be_a_part_of_a_larger_tensor(layout: str, axis: int):
    case = _case(3, 8, layout=layout)
    with torch.no_grad():
        cut = _cut(case.x, axis)
    assert torch.equal(cut, case.x)
    case.x = cut.requires_grad_()
    _assert_same_as_alone(case)


def test_blocks_of_one_sample_with_several_values_a_channel_are_normalised():
    _assert_same_as_alone(_case(3, 4))  # blocks of 2, 1 and 1
    _assert_same_as_alone(_case(3, 3, layout="channels last"))
    _assert_same_as_alone(_case(2, 2, (2,)))


# Other precisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", _SHAPES)
def test_half_precision_features_with_float32_weights_equal_torchs_batch_norm(
    kind: str, dtype: torch.dtype, layout: str
):
    case = _case(3, 8, _SHAPES[kind], layout=layout, dtype=dtype, weight_dtype=torch.float32)
    out = case.normalised()
    assert out.dtype == dtype
    # In float64, what is left is the rounding of the result.
    exact = _case(3, 8, _SHAPES[kind], layout=layout)
    exact.x = case.x.detach().double().requires_grad_()
    exact.grad = case.grad.double()
    expected = _alone(exact)
    rounding = torch.finfo(dtype).eps
    _assert_close(out, expected, tolerance=2 * rounding)
    ours, theirs = case.gradients(out), exact.gradients(expected)
    assert [gradient.dtype for gradient in ours.values()] == [dtype, torch.float32, torch.float32]
    for name, gradient in ours.items():
        _assert_close(gradient, theirs[name], tolerance=4 * rounding, what=f"gradient of {name}")


def test_half_precision_statistics_are_those_of_float32():
    # In bfloat16, which has 8 bits, sums of 4096 values would stop growing long before their end.
    x = (torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) + 4).bfloat16()
    out = batch_norm(x, torch.ones(1, 1).bool(), Blocks(1, 2), weight=None, bias=None)
    exact = x.double()
    exact = (exact - exact.mean()) / (exact.var(correction=0) + 1e-5).sqrt()
    _assert_close(out, exact, tolerance=2**-8)


def test_weights_of_half_precision_have_gradients_of_half_precision():
    case = _case(2, 4, dtype=torch.bfloat16)
    gradients = case.gradients(case.normalised())
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients.values())
    exact = _case(2, 4)
    exact.x, exact.weight, exact.bias = (
        tensor.detach().double().requires_grad_() for tensor in case.tensors().values()
    )
    exact.grad = case.grad.double()
    for name, expected in exact.gradients(_alone(exact)).items():
        _assert_close(gradients[name], expected, tolerance=2**-6, what=f"gradient of {name}")


# Given statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [*_BATCHES, (3, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", _SHAPES)
def test_given_statistics_take_the_place_of_those_of_the_blocks(kind: str, layout: str, n: int, batch_size: int):
    case = _case(n, batch_size, _SHAPES[kind], layout=layout)
    statistics = (torch.randn(NUM_CHANNELS).double(), torch.rand(NUM_CHANNELS).double() + 0.5)
    copies = [tensor.clone() for tensor in statistics]
    out = batch_norm(case.x, case.mask, case.blocks, weight=case.weight, bias=case.bias, statistics=statistics, eps=EPS)
    expected = _alone(case, statistics=statistics, training=False)
    _assert_close(out, expected)
    _assert_same_gradients(case, out, expected)
    assert kind in ("2-D", "3-D") or out.stride() == case.x.stride()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(statistics, copies, strict=True))


@_AFFINE
def test_given_statistics_do_without_scale_and_shift(has_weight: bool, has_bias: bool):
    case = _case(3, 8, has_weight=has_weight, has_bias=has_bias)
    statistics = (torch.randn(NUM_CHANNELS).double(), torch.rand(NUM_CHANNELS).double() + 0.5)
    out = batch_norm(case.x, case.mask, case.blocks, weight=case.weight, bias=case.bias, statistics=statistics, eps=EPS)
    expected = _alone(case, statistics=statistics, training=False)
    _assert_close(out, expected)
    _assert_same_gradients(case, out, expected)


# One value per channel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch_size", "shape"), [(1, 1, ()), (2, 2, ()), (2, 3, ()), (3, 5, (1,)), (1, 1, (1, 1)), (3, 4, (1, 1))]
)
def test_one_value_per_channel_is_refused(n: int, batch_size: int, shape: tuple[int, ...]):
    case = _case(n, batch_size, shape)
    message = f"a batch of {batch_size} samples gives some of {n} subnets one value per channel, which has no variance"
    with pytest.raises(InputError, match=message) as refused:
        case.normalised()
    assert f"features of shape {tuple(case.x.shape)}" in str(refused.value)
    assert "take fewer subnets or larger batches" in str(refused.value)


# Written out ----------------------------------------------------------------------------------------------------------


def _assert_equal_to_alone(case: _Case, out: torch.Tensor, *, tolerance: float) -> None:
    expected = _alone(case)
    assert out.dtype == expected.dtype
    _assert_close(out, expected, tolerance=tolerance)
    ours, theirs = case.gradients(out), case.gradients(expected)
    for name, gradient in ours.items():
        assert gradient.dtype == theirs[name].dtype
        _assert_close(gradient, theirs[name], tolerance=tolerance, what=f"gradient of {name}")


def _written(case: _Case) -> torch.Tensor:
    return _written_out(case.x, case.mask, case.blocks, case.weight, case.bias, EPS)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 6), (2, 8), (3, 12)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", _SHAPES)
def test_the_arithmetic_written_out_for_a_compiler_is_the_same(kind: str, layout: str, n: int, batch_size: int):
    case = _case(n, batch_size, _SHAPES[kind], layout=layout, dtype=torch.float32)
    _assert_equal_to_alone(case, _written(case), tolerance=1e-5)


@_AFFINE
def test_the_arithmetic_written_out_does_without_scale_and_shift(has_weight: bool, has_bias: bool):
    case = _case(3, 6, has_weight=has_weight, has_bias=has_bias, dtype=torch.float32)
    _assert_equal_to_alone(case, _written(case), tolerance=1e-5)


def test_the_arithmetic_written_out_is_the_same_in_half_precision():
    case = _case(3, 6, dtype=torch.bfloat16, weight_dtype=torch.float32)
    _assert_equal_to_alone(case, _written(case), tolerance=2**-6)


def test_the_arithmetic_written_out_is_as_exact_as_the_other():
    case = _case(3, 6)
    written, out = _written(case), case.normalised()
    _assert_close(written, out)
    _assert_same_gradients(case, written, out)


@pytest.mark.parametrize(("n", "batch_size"), [(3, 6), (3, 8)], ids=["even blocks", "uneven blocks"])
def test_a_compiled_batch_norm_is_the_same(n: int, batch_size: int):
    case = _case(n, batch_size, dtype=torch.float32)

    def run(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        return batch_norm(x, case.mask, case.blocks, weight=weight, bias=bias, eps=EPS)

    out = torch.compile(run, backend="eager", fullgraph=True)(case.x, case.weight, case.bias)
    _assert_equal_to_alone(case, out, tolerance=1e-5)
