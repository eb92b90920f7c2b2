"""The supernet: one set of full-width weights that every subnet shares."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from psenet.errors import InputError
from psenet.inputs import Inputs, num_samples
from psenet.memory_format import ImageLayout
from psenet.parallel.skeleton import ParallelSkeleton
from psenet.slicing import (
    SlicePlan,
    load_slices,
    narrow_attributes,
    narrow_module,
    slice_state,
    sliced_shapes,
    state_of,
)
from psenet.space import WidthSpace
from psenet.widths import Widths

DEFAULT_STRATA = (1.0, 0.875, 0.75, 0.625, 0.5)

_MAX_SKELETONS = 24


class Supernet(nn.Module):
    """A width-elastic copy of a model.

    Args:
        model: The user's model; it is copied and not changed.
        space: Its width space, from `psenet.trace`.
        strata: Keep ratios of the ceilings at which several subnets are computed together; 1.0 is always among them.
        channels_last: Memory layout of images in a pass; None for channels-last where the model can read it, which is
            faster on CPUs.
        compiled: Compile the pass of each ceiling with torch.compile at its first use, which takes about a minute.
            Meant for GPUs; slower on the CPUs measured. Compared with the plain pass before it is used.

    Example:
        >>> import psenet, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
        >>> x = torch.randn(4, 3, 8, 8)
        >>> space = psenet.trace(model, x)
        >>> supernet = psenet.Supernet(model, space)
        >>> supernet(x, [space.full(), space.smallest()]).shape  # samples 0 and 2 full, 1 and 3 smallest
        torch.Size([4, 4, 4, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        space: WidthSpace,
        *,
        strata: Sequence[float] = DEFAULT_STRATA,
        channels_last: bool | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.compiled = compiled
        self.model = copy.deepcopy(model)
        self.space = space
        ceilings = {space.uniform(keep_ratio): None for keep_ratio in sorted({*strata, 1.0}, reverse=True)}
        self.strata: tuple[Widths, ...] = tuple(sorted(ceilings, key=space.macs))
        self._skeletons: OrderedDict[Widths, ParallelSkeleton] = OrderedDict()
        self._layout = ImageLayout(self.model, channels_last=channels_last)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the skeletons out of copies: their layers refer to each other, and they are quickly made again."""
        return {**self.__dict__, "_skeletons": OrderedDict()}

    def forward(self, x: Inputs, widths: Widths | Sequence[Widths], *, from_right: bool = False) -> Any:
        """Run one subnet on the whole batch, or several on interleaved parts of it.

        Several are computed in one pass at the lowest stratum that holds them all. Outputs and gradients are those of
        the subnets run one by one: batch statistics are per subnet. Running statistics are read (in eval mode) but
        never written; `psenet.evaluate.recalibrate` gives a subnet its own.

        Args:
            x: Input, shape (B, ...), or a tuple of the model's arguments with B samples each.
            widths: One subnet, or n of them: sample j goes through `widths[j % n]`.
            from_right: Keep the last channels of every group instead of the first; for one subnet.

        Returns:
            What the model returns, samples in the order of `x`.

        Raises:
            InputError: Widths are not of this space, there are none, or more than samples; inputs of different sizes;
                several subnets from the right.
        """
        subnets = [widths] if isinstance(widths, Widths) else list(widths)
        n, batch_size = len(subnets), num_samples(x)
        if not 1 <= n <= batch_size:
            raise InputError(f"a batch of {batch_size} samples takes 1 to {batch_size} subnets; got {n}")
        if from_right and n > 1:
            raise InputError(f"from_right is for a single subnet; got {n}")
        skeleton = self._skeleton(subnets[0] if n == 1 else self.ceiling(subnets))
        return skeleton(state_of(self.model), self._layout(x), subnets, from_right=from_right)

    def ceiling(self, widths: Sequence[Widths]) -> Widths:
        """Return the lowest stratum that holds all of these subnets.

        Raises:
            InputError: Widths are not of this space.
        """
        for setting in widths:
            self.space.check(setting)
        tops = self.space.to_array(widths).max(axis=0)
        for stratum, row in zip(self.strata, self.space.to_array(self.strata), strict=True):
            if (row >= tops).all():
                return stratum
        raise AssertionError("the highest stratum is the full model")

    def subnet(self, widths: Widths, *, from_right: bool = False) -> nn.Module:
        """Return a plain module that shares the supernet's weights.

        Its parameters are re-sliced from the supernet at every call, so it always shows the current weights and its
        gradients reach them. Its buffers (batch-norm statistics) are its own copies: using it in train mode or
        recalibrating it changes nothing else. It cannot be deep-copied or saved as weights; `extract` can.

        Args:
            widths: The subnet.
            from_right: Keep the last channels of every group instead of the first.
        """
        state, plan = state_of(self.model), SlicePlan(self.space, widths, from_right=from_right)
        module = self._narrow(widths, device="meta")
        slices = plan(state)
        owners = {name: _owner(module, name) for name in slices}
        buffers = {name for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
        for name in buffers:
            layer, local = owners[name]
            layer._buffers[local] = slices[name].detach().clone()

        def refresh(_module: nn.Module, _args: object) -> None:
            for name, tensor in plan(state_of(self.model)).items():
                if name not in buffers:
                    layer, local = owners[name]
                    layer._parameters[local] = tensor  # pyright: ignore[reportArgumentType]

        refresh(module, ())
        module.register_forward_pre_hook(refresh)
        return module.train(self.training)

    def extract(self, widths: Widths) -> nn.Module:
        """Return a plain module of this subnet that owns a copy of its weights and needs no psenet."""
        state = state_of(self.model)
        module = self._narrow(widths)
        load_slices(module, slice_state(state, self.space, widths))
        return module.train(self.training)

    def _narrow(self, widths: Widths, device: str | None = None) -> nn.Module:
        shapes = sliced_shapes(state_of(self.model), self.space, widths)
        attributes = narrow_attributes(self.model, self.space, widths)
        return narrow_module(self.model, shapes, attributes=attributes, device=device)

    def _skeleton(self, ceiling: Widths) -> ParallelSkeleton:
        skeleton = self._skeletons.get(ceiling)
        if skeleton is None:
            skeleton = self._skeletons[ceiling] = ParallelSkeleton(
                self.model, self.space, ceiling, compiled=self.compiled and ceiling in self.strata
            )
            if len(self._skeletons) > _MAX_SKELETONS:
                self._skeletons.popitem(last=False)
        self._skeletons.move_to_end(ceiling)
        if skeleton.module.training != self.training:
            skeleton.module.train(self.training)
        return skeleton


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return module.get_submodule(path), local
