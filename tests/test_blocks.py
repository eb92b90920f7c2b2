import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import psenet
from architectures import traced
from psenet.cost import PeakCost, ProductCost
from psenet.errors import InputError
from psenet.parallel.masks import Blocks, MaskTable
from psenet.space import ChannelGroup, SpaceCosts, WidthSpace
from psenet.tracing.layout import Run
from psenet.widths import Widths

_SIZES = pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 5), (2, 6), (3, 6), (3, 7), (3, 8), (4, 5), (5, 5)])


def _dealt(n: int, batch_size: int) -> list[list[int]]:
    """Deal the samples out like cards: by subnet, the samples it gets."""
    hands: list[list[int]] = [[] for _ in range(n)]
    for sample in range(batch_size):
        hands[sample % n].append(sample)
    return hands


def _order(n: int, batch_size: int) -> list[int]:
    return [sample for hand in _dealt(n, batch_size) for sample in hand]


# Samples --------------------------------------------------------------------------------------------------------------


def test_seven_samples_of_three_subnets_by_hand():
    blocks = Blocks(3, 7)
    assert blocks.sizes == [3, 2, 2]
    x = torch.tensor([10, 11, 12, 13, 14, 15, 16])
    assert blocks.gather(x).tolist() == [10, 13, 16, 11, 14, 12, 15]
    assert blocks.scatter(torch.tensor([10, 13, 16, 11, 14, 12, 15])).tolist() == x.tolist()
    assert blocks.by_sample(torch.tensor([5, 6, 7])).tolist() == [5, 5, 5, 6, 6, 7, 7]


@_SIZES
def test_gather_puts_the_samples_of_each_subnet_in_one_block(n: int, batch_size: int):
    blocks, x = Blocks(n, batch_size), torch.randn(batch_size, 3, 4)
    assert (blocks.num_subnets, blocks.batch_size) == (n, batch_size)
    assert blocks.sizes == [len(hand) for hand in _dealt(n, batch_size)]
    gathered = blocks.gather(x)
    for place, sample in enumerate(_order(n, batch_size)):
        assert torch.equal(gathered[place], x[sample])
    for block, hand in zip(gathered.split(blocks.sizes), _dealt(n, batch_size), strict=True):
        assert torch.equal(block, torch.stack([x[sample] for sample in hand]))


@_SIZES
@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)])
def test_scatter_brings_the_samples_back(n: int, batch_size: int, shape: tuple[int, ...]):
    x = torch.randn(batch_size, *shape)
    in_blocks = torch.stack([x[sample] for sample in _order(n, batch_size)])
    assert torch.equal(Blocks(n, batch_size).scatter(in_blocks), x)


@given(st.data())
def test_gather_and_scatter_undo_each_other(data: st.DataObject):
    batch_size = data.draw(st.integers(1, 20))
    blocks = Blocks(data.draw(st.integers(1, batch_size)), batch_size)
    x = torch.arange(batch_size)
    assert torch.equal(blocks.scatter(blocks.gather(x)), x) and torch.equal(blocks.gather(blocks.scatter(x)), x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_samples_of_any_type_are_put_in_order(dtype: torch.dtype):
    x = torch.tensor([1, 0, 0, 1, 0]).to(dtype)
    gathered = Blocks(2, 5).gather(x)
    assert gathered.dtype == dtype and gathered.tolist() == torch.tensor([1, 0, 0, 0, 1]).to(dtype).tolist()
    assert torch.equal(Blocks(2, 5).scatter(gathered), x)


def test_one_subnet_gets_the_tensor_itself_back():
    x = torch.randn(4, 3)
    assert Blocks(1, 4).gather(x) is x and Blocks(1, 4).scatter(x) is x


@pytest.mark.parametrize("shape", [(), (3, 2), (8, 2), (1, 7)], ids=str)
def test_an_output_without_the_samples_on_axis_0_is_refused(shape: tuple[int, ...]):
    with pytest.raises(InputError, match="of 7 samples, every output that depends on the input must have one row each"):
        Blocks(3, 7).scatter(torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((6, 3, 4, 5), torch.channels_last),
        ((7, 3, 4, 5), torch.channels_last),
        ((7, 2, 3, 4, 5), torch.channels_last_3d),
        ((7, 3, 4, 5), torch.contiguous_format),
        ((7, 2, 3, 4, 5), torch.contiguous_format),
        ((7, 3), torch.contiguous_format),
    ],
    ids=str,
)
def test_gather_keeps_the_memory_layout(shape: tuple[int, ...], memory_format: torch.memory_format):
    x, blocks = torch.randn(shape).contiguous(memory_format=memory_format), Blocks(3, shape[0])
    gathered = blocks.gather(x)
    assert gathered.stride() == x.stride()
    assert torch.equal(blocks.scatter(gathered), x)


def test_gradients_go_back_to_the_samples_they_belong_to():
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    blocks, factors = Blocks(3, 7), torch.arange(1.0, 8.0, dtype=torch.float64)[:, None]
    (gradient,) = torch.autograd.grad((blocks.gather(x) * factors).sum(), x)
    # Samples 0, 3, 6 come first, then 1 and 4, then 2 and 5.
    assert gradient[:, 0].tolist() == [1, 4, 6, 2, 5, 7, 3]
    (gradient,) = torch.autograd.grad((blocks.scatter(x) * factors).sum(), x)
    assert gradient[:, 0].tolist() == [1, 4, 7, 2, 5, 3, 6]


# What belongs to a subnet, over its samples ---------------------------------------------------------------------------


@_SIZES
def test_every_sample_gets_what_is_its_subnets(n: int, batch_size: int):
    per_subnet = torch.randn(n, 3, 2)
    by_sample = Blocks(n, batch_size).by_sample(per_subnet)
    assert by_sample.shape == (batch_size, 3, 2)
    for place, sample in enumerate(_order(n, batch_size)):
        assert torch.equal(by_sample[place], per_subnet[sample % n])


@pytest.mark.parametrize("batch_size", [4, 5])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3,), 1), ((3,), -1), ((3, 4, 5), 1), ((4, 5, 3), 3), ((4, 5, 3), -1), ((4, 3, 5), -2), ((2, 3, 4, 5), 2)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_over_features_has_its_channels_on_the_axis_asked_for(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, batch_size: int
):
    mask_nC = torch.tensor([[True, False, True], [False, True, True]])
    x = torch.ones(batch_size, *shape, dtype=dtype)
    mask = Blocks(2, batch_size).mask_over(mask_nC, x, axis)
    assert mask.dtype == dtype and mask.ndim == x.ndim
    masked = x * mask
    assert masked.shape == x.shape
    for place, sample in enumerate(_order(2, batch_size)):
        for channel in range(3):
            kept = float(mask_nC[sample % 2, channel])
            assert (masked[place].select(axis - 1 if axis > 0 else axis, channel) == kept).all()


# The masks of a step --------------------------------------------------------------------------------------------------


def _space() -> WidthSpace:
    """Two groups: `a` of 4 channels in units of 2, `b` of 3 channels."""
    none = SpaceCosts(macs=ProductCost([], 2), params=ProductCost([], 2), memory=PeakCost([], 2))
    return WidthSpace([ChannelGroup("a", 4, (2, 4), (), 2), ChannelGroup("b", 3, (1, 2, 3), ())], none)


_LAYOUTS = (
    (Run(0, 2, 4),),
    (Run(1, 1, 3), Run(None, 1, 2), Run(0, 4, 8)),
    (Run(None, 1, 2),),
)
"""Channels a0 a0 a1 a1; b0 b1 b2, two frozen ones, a0 four times, a1 four times; two frozen ones."""


def test_masks_are_those_written_by_hand():
    table = MaskTable(_space(), _LAYOUTS, Widths({"a": 4, "b": 3}))
    widths = [Widths({"a": 2, "b": 2}), Widths({"a": 4, "b": 1}), Widths({"a": 4, "b": 3})]
    masks = table.masks(widths, torch.device("cpu"))
    assert [mask.dtype for mask in masks] == [torch.bool] * 3
    assert [mask.int().tolist() for mask in masks] == [
        [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
        [
            [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
            [1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        ],
        [[1, 1], [1, 1], [1, 1]],
    ]


def test_masks_at_a_lower_ceiling_have_its_channels_alone():
    table = MaskTable(_space(), _LAYOUTS, Widths({"a": 2, "b": 2}))
    masks = table.masks([Widths({"a": 2, "b": 1}), Widths({"a": 2, "b": 2})], torch.device("cpu"))
    assert [mask.int().tolist() for mask in masks] == [
        [[1, 1], [1, 1]],
        [[1, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]],
        [[1, 1], [1, 1]],
    ]


def test_a_table_gives_the_masks_of_each_step_anew():
    table = MaskTable(_space(), _LAYOUTS[:1], Widths({"a": 4, "b": 3}))
    narrow, wide = Widths({"a": 2, "b": 1}), Widths({"a": 4, "b": 1})
    cpu = torch.device("cpu")
    steps = [table.masks(widths, cpu)[0].int().tolist() for widths in ([narrow], [wide, narrow], [narrow])]
    assert steps == [[[1, 1, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 0, 0]]]


def test_a_model_without_anything_to_mask_has_no_masks():
    assert (
        MaskTable(_space(), (), Widths({"a": 4, "b": 3})).masks([Widths({"a": 2, "b": 1})], torch.device("cpu")) == []
    )


def test_the_masks_of_a_model_keep_as_many_channels_as_the_extracted_layers_have():
    model, space = traced("mobilenet_v3")
    supernet = psenet.Supernet(model, space)
    plans = [plan for plan in space.wiring.masks if plan.kind == "norm"]
    widths = [space.smallest(), space.uniform(0.6), space.full()]
    masks = MaskTable(space, [plan.layout for plan in plans], space.full()).masks(widths, torch.device("cpu"))
    assert len(plans) == sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    for number, setting in enumerate(widths):
        small = supernet.extract(setting)
        for plan, mask_nC in zip(plans, masks, strict=True):
            layer = small.get_submodule(plan.module)
            assert isinstance(layer, nn.BatchNorm2d)
            kept = mask_nC[number].int().tolist()
            assert kept == [1] * layer.num_features + [0] * (len(kept) - layer.num_features)


@settings(deadline=None)
@given(st.data())
def test_masks_of_any_layouts_are_what_a_count_of_units_says(data: st.DataObject):
    sizes = [4, 3]
    groups = [ChannelGroup(f"g{n}", size, tuple(range(1, size + 1)), ()) for n, size in enumerate(sizes)]
    none = SpaceCosts(macs=ProductCost([], 2), params=ProductCost([], 2), memory=PeakCost([], 2))
    runs = st.tuples(st.integers(-1, 1), st.integers(1, 3))
    drawn = data.draw(st.lists(st.lists(runs, min_size=1, max_size=4), max_size=3))
    layouts = [
        tuple(Run(None, 1, times) if group < 0 else Run(group, times, times * sizes[group]) for group, times in axis)
        for axis in drawn
    ]
    ceiling = [data.draw(st.integers(1, size)) for size in sizes]
    subnets = data.draw(st.lists(st.tuples(*(st.integers(1, top) for top in ceiling)), min_size=1, max_size=3))
    table = MaskTable(WidthSpace(groups, none), layouts, Widths({"g0": ceiling[0], "g1": ceiling[1]}))
    masks = table.masks([Widths({"g0": a, "g1": b}) for a, b in subnets], torch.device("cpu"))
    for axis, mask_nC in zip(drawn, masks, strict=True):
        for kept, mask_C in zip(subnets, mask_nC.tolist(), strict=True):
            expected = []
            for group, times in axis:
                units = range(ceiling[group]) if group >= 0 else [0]
                expected += [group < 0 or unit < kept[group] for unit in units for _ in range(times)]
            assert mask_C == expected
