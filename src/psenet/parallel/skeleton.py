"""One forward pass for n subnets: a narrow module at their ceiling, with per-subnet norms and masks.

Sample j belongs to subnet j mod n. The batch is put in order once at the entrance, the samples of each subnet in one
block, and back at the exit. In between, changes to our own copy of the module do the rest:

- A batch norm normalises block by block. The 0/1 masks are folded into its scale and shift, so dropped channels leave
  it as exact zeros (see `psenet.parallel.norms`).
- A layer that reads across channels which are not zero by then (see `psenet.tracing`) gets its input masked.
- A module that computes norms or means over channels computes them over the kept ones (see `psenet.parallel.ops`).
- A layer that computes its weights is run subnet by subnet (see `psenet.parallel.alone`).

Everything that depends on the ceiling alone is worked out when a skeleton is made, not at every step.

Legend: n subnets, B batch, C channels at the ceiling.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from psenet.compiling import CheckedForward
from psenet.inputs import Inputs, as_arguments, map_samples, map_tensors, num_samples, tensors_in
from psenet.memory_format import guard_convolutions
from psenet.parallel.alone import AloneLayer
from psenet.parallel.masks import MASK, Blocks, Current, MaskTable
from psenet.parallel.norms import normalise_blocks
from psenet.parallel.ops import mask_ops
from psenet.slicing import SlicePlan, State, narrow_attributes, narrow_module, sliced_shapes, state_of
from psenet.space import MaskPlan, WidthSpace
from psenet.widths import Widths


class ParallelSkeleton:
    """The model's module tree at one ceiling, prepared for several subnets at a time. Holds no weights.

    Args:
        model: The full-width module.
        space: Its width space.
        ceiling: The widths at which the pass is computed.
        compiled: Compile the pass (see `psenet.compiling`).
    """

    def __init__(self, model: nn.Module, space: WidthSpace, ceiling: Widths, *, compiled: bool = False) -> None:
        self.ceiling = ceiling
        self._space = space
        self._plans = space.wiring.masks
        self._slices = SlicePlan(space, ceiling)
        self._table = MaskTable(space, [plan.layout for plan in self._plans], ceiling)
        self._buffers = [name for name, tensor in state_of(model).items() if not isinstance(tensor, nn.Parameter)]
        attributes = narrow_attributes(model, space, ceiling)
        shapes = sliced_shapes(state_of(model), space, ceiling)
        self.module = narrow_module(model, shapes, attributes=attributes, device="meta")
        self._current = Current()
        self._alone: dict[str, AloneLayer] = {}
        for plan in self._plans:
            self._prepare(model, plan)
        guard_convolutions(self.module)
        self._forward = CheckedForward(self.module) if compiled else self._plain_forward
        self._alone_names = {name for layer in self._alone.values() for name in layer.names}

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        inputs: Inputs,
        widths: Sequence[Widths],
        *,
        from_right: bool = False,
    ) -> Any:
        """Run the pass.

        Args:
            state: The full-width parameters and buffers.
            inputs: What the model takes, B samples; sample j goes through `widths[j % n]`.
            widths: n subnets below the ceiling, n at most B.
            from_right: Keep the last channels of every group instead of the first; for one subnet at its own widths.

        Returns:
            The model's output, samples in the order of the inputs.
        """
        blocks = self._current.blocks = Blocks(len(widths), num_samples(inputs))
        masks = self._table.masks(widths, tensors_in(inputs)[0].device)
        slices = SlicePlan(self._space, self.ceiling, from_right=True) if from_right else self._slices
        tensors = slices(state)
        for name in self._buffers:  # what a forward writes into them is for nobody
            tensors[name] = tensors[name].clone()
        for plan, mask_nC in zip(self._plans, masks, strict=True):
            if plan.module not in self._alone:
                tensors[f"{plan.module}.{MASK}" if plan.module else MASK] = mask_nC
        if self._alone:
            self._prepare_alone(state, widths, masks, from_right=from_right)
        outputs = self._forward(tensors, as_arguments(map_tensors(blocks.gather, inputs)))
        without = self._space.wiring.outputs_without_samples(training=self.module.training)
        return map_samples(blocks.scatter, outputs, without)

    def _plain_forward(self, tensors: State, arguments: tuple[Any, ...]) -> Any:
        return functional_call(self.module, tensors, arguments, tie_weights=False)  # each tied name has its slice

    def _prepare(self, model: nn.Module, plan: MaskPlan) -> None:
        layer = self.module.get_submodule(plan.module)
        if plan.kind == "norm" and _is_plain_batch_norm(layer):
            normalise_blocks(layer, self._current)
        elif plan.kind == "alone_in":
            self._alone[plan.module] = AloneLayer(model, plan.module, plan.axis, self._current)
            layer.forward = self._alone[plan.module].forward
        elif plan.kind == "alone_out":
            pass  # said together with what it takes
        elif plan.kind == "masked_input":
            layer.register_buffer(MASK, torch.empty(0, dtype=torch.bool, device="meta"), persistent=False)
            _change_input(layer, _mask_input(layer, plan.axis, self._current))
        else:
            mask_ops(layer, self._current, plan.axis, plan.ops, plan.masked)

    def _prepare_alone(
        self,
        state: Mapping[str, torch.Tensor],
        widths: Sequence[Widths],
        masks: Sequence[torch.Tensor],
        *,
        from_right: bool,
    ) -> None:
        own = {name: state[name] for name in self._alone_names}
        slices: list[State] = [SlicePlan(self._space, setting, own, from_right=from_right)(own) for setting in widths]
        kept_by = {(plan.module, plan.kind): mask_nC for plan, mask_nC in zip(self._plans, masks, strict=True)}
        for path, layer in self._alone.items():
            layer.prepare(slices, kept_by[path, "alone_in"], kept_by[path, "alone_out"])


def _is_plain_batch_norm(layer: nn.Module) -> bool:
    """Tell whether a layer is a batch norm and nothing else: no activation inside, no forward of its own."""
    return type(layer).forward is nn.modules.batchnorm._BatchNorm.forward


def _change_input(layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensor that a layer gets, by position or by name."""

    def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    layer.register_forward_pre_hook(hook, with_kwargs=True)


def _mask_input(layer: nn.Module, axis: int, current: Current) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * current.blocks.mask_over(layer.get_buffer(MASK), x, axis)
