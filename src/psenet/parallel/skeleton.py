"""One forward pass for n subnets: a narrow module at their ceiling, with per-subnet norms and masks.

Sample j belongs to subnet j mod n, so a batch (B, C, ...) seen as (B / n, n * C, ...) has the subnets side by side on
the channel axis, without a copy. Hooks on our own copy of the module do the rest:

- A batch norm runs on that view with n * C features: one native call, statistics per subnet. Its scale and shift are
  those of the layer, repeated n times and multiplied by the 0/1 masks, so dropped channels leave it as exact zeros.
- A layer that reads across channels which are not zero by then (see `psenet.tracing`) gets its input masked.
- A module that computes norms or means over channels computes them over the kept ones (see `psenet.parallel.ops`).
- A layer that computes its weights is run subnet by subnet (see `psenet.parallel.alone`).

Legend: n subnets, B batch, C channels at the ceiling.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from psenet.inputs import Inputs, as_arguments, tensors_in
from psenet.parallel.alone import AloneLayer
from psenet.parallel.masks import MaskTable, mask_over
from psenet.parallel.ops import MASK, mask_ops
from psenet.slicing import State, narrow_attributes, narrow_module, slice_state, sliced_shapes, state_of
from psenet.space import WidthSpace
from psenet.widths import Widths

_MASK = "psenet_mask"


class ParallelSkeleton:
    """The model's module tree at one ceiling, prepared for n subnets at a time. Holds no weights.

    Args:
        model: The full-width module.
        space: Its width space.
        ceiling: The widths at which the pass is computed.
        num_subnets: n.
    """

    def __init__(self, model: nn.Module, space: WidthSpace, ceiling: Widths, *, num_subnets: int) -> None:
        self.ceiling = ceiling
        self.num_subnets = num_subnets
        self._space = space
        self._plans = space.wiring.masks
        self._folded = [plan.kind == "norm" and _is_batch_norm(model, plan.module) for plan in self._plans]
        norms = [plan.module for plan, folded in zip(self._plans, self._folded, strict=True) if folded]
        own = {name for path in norms for name in _norm_tensors(path)}  # copied when they are folded
        self._buffers = [
            name for name, tensor in state_of(model).items() if not isinstance(tensor, nn.Parameter) and name not in own
        ]
        self._table = MaskTable(space, [plan.layout for plan in self._plans], ceiling)
        shapes = sliced_shapes(state_of(model), space, ceiling)
        for plan, folded in zip(self._plans, self._folded, strict=True):
            if folded:
                for name in _norm_tensors(plan.module):
                    if name in shapes:
                        shapes[name] = (shapes[name][0] * num_subnets,)
        attributes = narrow_attributes(model, space, ceiling)
        self.module = narrow_module(model, shapes, attributes=attributes, device="meta")
        self._alone: dict[str, AloneLayer] = {}
        for plan, folded in zip(self._plans, self._folded, strict=True):
            layer = self.module.get_submodule(plan.module)
            if folded:
                _prepare_norm(layer, num_subnets)
            elif plan.kind == "alone_in":
                self._alone[plan.module] = AloneLayer(model, space, plan.module, plan.axis)
                layer.forward = self._alone[plan.module].forward
            elif plan.kind == "alone_out":
                pass  # said together with what it takes
            elif plan.kind == "masked_input":
                layer.register_buffer(_MASK, torch.empty(0, dtype=torch.bool, device="meta"), persistent=False)
                _change_input(layer, _mask_input(layer, plan.axis, num_subnets))
            else:
                mask_ops(layer, plan.axis, plan.ops, plan.masked)

    def __call__(self, state: Mapping[str, torch.Tensor], inputs: Inputs, widths: Sequence[Widths]) -> Any:
        """Run the pass.

        Args:
            state: The full-width parameters and buffers.
            inputs: What the model takes, B samples, B a multiple of n; sample j goes through `widths[j % n]`.
            widths: n subnets below the ceiling.

        Returns:
            The model's output, samples in the order of the inputs.
        """
        masks = self._table.masks(widths, tensors_in(inputs)[0].device)
        tensors = slice_state(state, self._space, self.ceiling)
        for name in self._buffers:  # what a forward writes into them is for nobody
            tensors[name] = tensors[name].clone()
        kept_by = {(plan.module, plan.kind): mask_nC for plan, mask_nC in zip(self._plans, masks, strict=True)}
        for path, layer in self._alone.items():
            layer.prepare(state, widths, kept_by[path, "alone_in"], kept_by[path, "alone_out"])
        for plan, folded, mask_nC in zip(self._plans, self._folded, masks, strict=True):
            if folded:
                self._fold(tensors, plan.module, mask_nC)
            elif plan.module in self._alone:
                continue
            else:
                name = _MASK if plan.kind == "masked_input" else MASK
                tensors[f"{plan.module}.{name}" if plan.module else name] = mask_nC
        # Each tied name comes with its slice.
        return functional_call(self.module, tensors, as_arguments(inputs), tie_weights=False)

    def _fold(self, tensors: State, path: str, mask_nC: torch.Tensor) -> None:
        """Repeat a norm's tensors for the n subnets and fold the mask into scale and shift."""
        n = self.num_subnets
        weight, bias, mean, variance = _norm_tensors(path)
        for name in (weight, bias):
            if name in tensors:
                tensors[name] = (tensors[name] * mask_nC).reshape(-1)
        if weight not in tensors:  # a norm without scale and shift still has to drop channels
            tensors[f"{path}.{_MASK}"] = mask_nC
        for name in (mean, variance):
            if name in tensors:
                tensors[name] = tensors[name].detach().repeat(n)
        tensors.pop(f"{path}.num_batches_tracked", None)


def _is_batch_norm(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), nn.modules.batchnorm._BatchNorm)


def _norm_tensors(path: str) -> tuple[str, str, str, str]:
    return f"{path}.weight", f"{path}.bias", f"{path}.running_mean", f"{path}.running_var"


def _prepare_norm(layer: nn.Module, num_subnets: int) -> None:
    """Put the hooks on a batch norm of our own copy."""
    if "num_batches_tracked" in layer._buffers:
        layer._buffers["num_batches_tracked"] = None
    if layer.weight is None:
        layer.register_buffer(_MASK, torch.empty(0, dtype=torch.bool, device="meta"), persistent=False)
        layer.register_forward_hook(_mask_output(num_subnets))
    _change_input(layer, _subnets_to_channels(num_subnets))
    layer.register_forward_hook(_channels_to_subnets(num_subnets))


def _change_input(layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensor that a layer gets, by position or by name."""

    def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    layer.register_forward_pre_hook(hook, with_kwargs=True)


def _subnets_to_channels(n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.reshape(x.shape[0] // n, n * x.shape[1], *x.shape[2:])


def _channels_to_subnets(n: int) -> Callable:
    def hook(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return out.reshape(out.shape[0] * n, out.shape[1] // n, *out.shape[2:])

    return hook


def _mask_output(n: int) -> Callable:
    def hook(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        mask_nC = layer.get_buffer(_MASK)
        return out * mask_nC.reshape(1, -1, *[1] * (out.ndim - 2)).to(out.dtype)

    return hook


def _mask_input(layer: nn.Module, axis: int, n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        mask = mask_over(layer.get_buffer(_MASK), x, axis)
        by_subnet = x.reshape(x.shape[0] // n, n, *x.shape[1:]) * mask
        return by_subnet.reshape(x.shape)

    return change
