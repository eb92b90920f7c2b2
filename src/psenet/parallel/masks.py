"""Which samples and channels belong to which subnet, and 0/1 masks over them.

Inside a pass the samples of one subnet stand in one block: first all those of subnet 0, then those of subnet 1.

Legend: n subnets, B batch, C channels of one axis at the ceiling, A channels of all masked axes together.
"""

from collections.abc import Sequence

import numpy as np
import torch

from psenet.errors import InputError
from psenet.space import WidthSpace
from psenet.tracing.layout import Layout, unit_index
from psenet.widths import Widths

MASK = "psenet_mask"
"""Name of the buffer that holds a layer's mask of a step, bool of shape (n, C)."""


class Blocks:
    """The samples of n subnets: from the order of a batch, where sample j is of subnet j mod n, to blocks and back.

    Args:
        num_subnets: n.
        batch_size: B, at least n; the sizes of two blocks differ by one where n does not divide it.
    """

    def __init__(self, num_subnets: int, batch_size: int) -> None:
        self.num_subnets = num_subnets
        self.batch_size = batch_size
        self.sizes = [len(range(first, batch_size, num_subnets)) for first in range(num_subnets)]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, ...) in blocks, in the memory layout of x."""
        n = self.num_subnets
        return x if n == 1 else torch.cat([x[first::n] for first in range(n)])

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, ...) from blocks in the order of the batch.

        Raises:
            InputError: The samples are not on axis 0.
        """
        if self.num_subnets == 1:
            return x
        if x.shape[:1] != (self.batch_size,):
            raise InputError(
                f"an output has the shape {tuple(x.shape)}; of {self.batch_size} samples, every output that depends on "
                "the input must have one row each, on axis 0"
            )
        order = self.gather(torch.arange(self.batch_size))
        return x.index_select(0, order.argsort().to(x.device))

    def by_sample(self, per_subnet: torch.Tensor) -> torch.Tensor:
        """Return (n, ...) as (B, ...): to every sample what is its subnet's."""
        if len({*self.sizes}) == 1:
            return per_subnet.repeat_interleave(self.sizes[0], dim=0)
        return per_subnet.repeat_interleave(torch.tensor(self.sizes, device=per_subnet.device), dim=0)

    def of_rows(self, num_rows: int) -> "Blocks":
        """Return the blocks of a tensor that has several rows for each sample on axis 0, one sample after the other."""
        return self if num_rows == self.batch_size else _Rows(self, num_rows // self.batch_size)

    def mask_over(self, mask_nC: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Return a mask as 0 and 1, broadcastable to x of shape (B, ...), its channels on this axis of x."""
        shape = [1] * x.ndim
        shape[0], shape[axis % x.ndim] = self.batch_size, mask_nC.shape[1]
        return self.by_sample(mask_nC).reshape(shape).to(x.dtype)


class _Rows(Blocks):
    """Blocks of rows: every sample counts several times."""

    def __init__(self, blocks: Blocks, rows: int) -> None:
        super().__init__(blocks.num_subnets, blocks.batch_size * rows)
        self.sizes = [size * rows for size in blocks.sizes]


class Current:
    """What the layers of our own copy share during one pass."""

    def __init__(self) -> None:
        self.blocks = Blocks(1, 1)


class MaskTable:
    """Index tables from which the masks of a step are one comparison, on the device where they are needed.

    Args:
        space: The width space.
        layouts: The axes to mask.
        ceiling: The widths at which the step is computed.
    """

    def __init__(self, space: WidthSpace, layouts: Sequence[Layout], ceiling: Widths) -> None:
        units = space.units(ceiling)
        indices = [unit_index(layout, units) for layout in layouts]
        self._space = space
        self._group_A = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(group_C for group_C, _ in indices)]))
        self._unit_A = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(unit_C for _, unit_C in indices)]))
        self._sizes = [len(group_C) for group_C, _ in indices]

    def masks(self, widths: Sequence[Widths], device: torch.device) -> list[torch.Tensor]:
        """Return one bool mask of shape (n, C) per axis: True where the subnet keeps the channel."""
        if self._unit_A.device != device:
            self._group_A, self._unit_A = self._group_A.to(device), self._unit_A.to(device)
        # Frozen channels have the group -1, the last column, of which everything is kept.
        kept_nG = self._space.units_array(widths)
        units_nG = torch.from_numpy(np.pad(kept_nG, ((0, 0), (0, 1)), constant_values=np.iinfo(np.int64).max))
        keep_nA = self._unit_A < units_nG.to(device, non_blocking=True)[:, self._group_A]
        return list(keep_nA.split(self._sizes, dim=1))
