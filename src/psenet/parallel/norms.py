"""Batch norm of several subnets in one pass: torch's own batch norm block by block, into one output.

The statistics are those of each subnet's samples. The 0/1 mask is folded into scale and shift, so dropped channels
come out as exact zeros, without a pass over the features. Native batch norms write their blocks into one tensor;
slicing and concatenating through autograd would copy every feature twice more.

Legend: n subnets, B batch, C channels at the ceiling.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from psenet.errors import InputError
from psenet.parallel.masks import MASK, Blocks, Current


def batch_norm(
    x: torch.Tensor,
    mask_nC: torch.Tensor,
    blocks: Blocks,
    *,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalise every subnet's block by its own statistics, or all by given ones; dropped channels become zero.

    Args:
        x: Features in blocks, shape (B, C, ...), or with several rows for each sample.
        mask_nC: True where a subnet keeps the channel.
        blocks: Which samples belong to which subnet.
        weight: Scale, shape (C,), or None.
        bias: Shift, shape (C,), or None.
        statistics: Running mean and variance to use in place of those of the blocks (eval mode).
        eps: Added to the variance.

    Raises:
        InputError: A block has one value per channel, which has no variance.
    """
    blocks = blocks.of_rows(x.shape[0])
    if statistics is not None:
        mean, variance = (None if tensor is None else tensor.detach() for tensor in statistics)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps) * blocks.mask_over(mask_nC, x, 1)
    if min(blocks.sizes) * math.prod(x.shape[2:]) == 1:
        raise InputError(
            f"a batch of {blocks.batch_size} samples gives some of {blocks.num_subnets} subnets one value per channel, "
            f"which has no variance (features of shape {tuple(x.shape)}): take fewer subnets or larger batches "
            "(drop_last=True leaves out a short last one)"
        )
    x = _dense(x)
    if torch.compiler.is_compiling():
        return _written_out(x, mask_nC, blocks, weight, bias, eps)
    return _BlockNorm.apply(x, weight, bias, mask_nC, blocks.sizes, eps)  # pyright: ignore[reportReturnType]


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return x in a memory layout that torch's batch norm writes to: of others it takes garbage for statistics."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    if x.is_contiguous() or x.is_contiguous(memory_format=last):
        return x
    return x.contiguous(memory_format=last if x.stride(1) == 1 else torch.contiguous_format)


class _BlockNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mask_nC: torch.Tensor,
        sizes: list[int],
        eps: float,
    ) -> torch.Tensor:
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        mask_nC = mask_nC.to(dtype)
        scale_nC = mask_nC if weight is None else mask_nC * weight
        shift_nC = torch.zeros_like(mask_nC) if bias is None else mask_nC * bias
        out = torch.empty_like(x)
        mean_nC, invstd_nC = torch.empty_like(mask_nC), torch.empty_like(mask_nC)
        rows = zip(*(table.unbind() for table in (scale_nC, shift_nC, mean_nC, invstd_nC)), strict=True)
        for block, result, (scale_C, shift_C, *statistics) in zip(x.split(sizes), out.split(sizes), rows, strict=True):
            torch.native_batch_norm(block, scale_C, shift_C, None, None, True, 0.0, eps, out=(result, *statistics))
        ctx.save_for_backward(x, scale_nC, mask_nC, mean_nC, invstd_nC)
        ctx.sizes, ctx.eps, ctx.dtypes = sizes, eps, [None if t is None else t.dtype for t in (weight, bias)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        x, scale_nC, mask_nC, mean_nC, invstd_nC = ctx.saved_tensors
        rows = zip(*(table.unbind() for table in (scale_nC, mean_nC, invstd_nC)), strict=True)
        found = [
            torch.ops.aten.native_batch_norm_backward(
                grad_block, block, scale_C, None, None, mean_C, invstd_C, True, ctx.eps, [True, True, True]
            )
            for grad_block, block, (scale_C, mean_C, invstd_C) in zip(
                grad.split(ctx.sizes), x.split(ctx.sizes), rows, strict=True
            )
        ]
        grad_x, *grads_nC = (join(parts) for join, parts in zip(_JOINS, zip(*found, strict=True), strict=True))
        grad_weight, grad_bias = (
            None if dtype is None else (grad_nC * mask_nC).sum(0).to(dtype)
            for grad_nC, dtype in zip(grads_nC, ctx.dtypes, strict=True)
        )
        return grad_x, grad_weight, grad_bias, None, None, None


_JOINS = (torch.cat, torch.stack, torch.stack)


def _written_out(
    x: torch.Tensor,
    mask_nC: torch.Tensor,
    blocks: Blocks,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Return the same in plain arithmetic, which a compiler fuses with what stands around it."""
    if len({*blocks.sizes}) > 1:
        parts = zip(mask_nC.split(1), x.split(blocks.sizes), strict=True)
        return torch.cat([_written_out(part, mask, Blocks(1, len(part)), weight, bias, eps) for mask, part in parts])
    split = x.unflatten(0, (blocks.num_subnets, -1))
    inner = [1] * (x.ndim - 2)
    wide = split.float() if x.dtype in (torch.float16, torch.bfloat16) else split
    variance, mean = torch.var_mean(wide, [1, *range(3, split.ndim)], correction=0, keepdim=True)
    mask = mask_nC.reshape(blocks.num_subnets, 1, -1, *inner).to(variance.dtype)
    scale = torch.rsqrt(variance + eps) * mask
    scale = scale if weight is None else scale * weight.reshape(-1, *inner)
    shift = -mean * scale if bias is None else bias.reshape(-1, *inner) * mask - mean * scale
    return (split * scale + shift).to(x.dtype).flatten(0, 1)


def normalise_blocks(layer: nn.Module, current: Current) -> None:
    """Make a batch norm of our own copy normalise block by block. It gets a buffer `MASK` for the masks of a step."""
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    layer.register_buffer(MASK, torch.empty(0, dtype=torch.bool, device="meta"), persistent=False)

    def forward(input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        has_statistics = layer.running_mean is not None or layer.running_var is not None
        return batch_norm(
            input,
            layer.get_buffer(MASK),
            current.blocks,
            weight=layer.weight,
            bias=layer.bias,
            statistics=(layer.running_mean, layer.running_var) if has_statistics and not layer.training else None,
            eps=layer.eps,
        )

    layer.forward = forward
