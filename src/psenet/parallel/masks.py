"""0/1 masks of several subnets over the channels of a ceiling.

Legend: n subnets, C channels of one axis at the ceiling, A channels of all masked axes together.
"""

from collections.abc import Sequence

import numpy as np
import torch

from psenet.space import WidthSpace
from psenet.tracing.layout import Layout, unit_index
from psenet.widths import Widths


def mask_over(mask_nC: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a mask as 0 and 1, broadcastable to x seen as (B / n, n, ...), its channels on this axis of x."""
    shape = [1] * (x.ndim + 1)
    shape[1], shape[axis % x.ndim + 1] = mask_nC.shape
    return mask_nC.reshape(shape).to(x.dtype)


class MaskTable:
    """Index tables from which the masks of a step are one comparison.

    Args:
        space: The width space.
        layouts: The axes to mask.
        ceiling: The widths at which the step is computed.
    """

    def __init__(self, space: WidthSpace, layouts: Sequence[Layout], ceiling: Widths) -> None:
        units = space.units(ceiling)
        indices = [unit_index(layout, units) for layout in layouts]
        self._space = space
        self._group_A = np.concatenate([np.zeros(0, np.int64), *(group_C for group_C, _ in indices)])
        self._unit_A = np.concatenate([np.zeros(0, np.int64), *(unit_C for _, unit_C in indices)])
        self._sizes = [len(group_C) for group_C, _ in indices]

    def masks(self, widths: Sequence[Widths], device: torch.device) -> list[torch.Tensor]:
        """Return one bool mask of shape (n, C) per axis: True where the subnet keeps the channel."""
        units_nG = np.array([(*self._space.units(setting), np.iinfo(np.int64).max) for setting in widths])
        keep_nA = torch.from_numpy(self._unit_A[None] < units_nG[:, self._group_A])
        return list(keep_nA.to(device, non_blocking=True).split(self._sizes, dim=1))
