"""How the subnets of one step are trained: together in one pass, or one after the other.

Legend: n subnets, B batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psenet.evaluate import eval_mode
from psenet.inputs import Inputs, as_arguments, num_samples, tensors_in
from psenet.training.config import TrainConfig
from psenet.training.losses import LossFn, mixed_loss, soft_cross_entropy
from psenet.widths import Widths


@dataclass(frozen=True)
class Objective:
    """What every subnet is trained for."""

    loss_fn: LossFn
    config: TrainConfig
    teacher: nn.Module | None = None

    def losses(self, outputs: Any, x: Inputs, labels: Any) -> torch.Tensor:
        """Return label loss and distillation mixed, shape (B,)."""
        taught = teach(self.teacher, x)
        return mixed_loss(self.loss_fn, self.config, outputs, labels, taught, num_samples=num_samples(x))


Backward = Callable[[torch.Tensor], None]
TrainSubnets = Callable[[nn.Module, Inputs, Any, Sequence[Widths], Objective, Backward], torch.Tensor]
"""`train(supernet, x, labels, widths, objective, backward)`: run the passes of one step, call `backward(loss)` as often
as needed, and return the mean loss of each subnet, detached, shape (n,); of fewer than n where a short last batch does
not feed them all."""


def train_together(
    supernet: nn.Module, x: Inputs, labels: Any, widths: Sequence[Widths], objective: Objective, backward: Backward
) -> torch.Tensor:
    """PSE-Net: every subnet gets a part of the batch, all in one pass."""  # noqa: D401
    # A last batch may be short, and the statistics of a batch norm want two samples a subnet.
    fed = list(widths)[: max(1, num_samples(x) // 2)]
    losses_B = objective.losses(supernet(x, fed), x, labels)
    backward(losses_B.mean())
    losses_B = losses_B.detach()
    return torch.stack([losses_B[first :: len(fed)].mean() for first in range(len(fed))])


def train_distilled(
    supernet: nn.Module, x: Inputs, labels: Any, widths: Sequence[Widths], objective: Objective, backward: Backward
) -> torch.Tensor:
    """Sandwich rule of Yu and Huang 2019: the first on the labels, the others on its outputs, each on the batch."""
    first, *others = widths
    outputs = supernet(x, first)
    loss = objective.losses(outputs, x, labels).mean()
    backward(loss)
    means, soft_targets = [loss.detach()], outputs.detach()
    for setting in others:
        outputs = supernet(x, setting)
        backward(soft_cross_entropy(outputs, soft_targets, temperature=objective.config.distill_temperature).mean())
        means.append(objective.loss_fn(outputs.detach(), labels).mean())
    return torch.stack(means)


def train_on_both_sides(
    supernet: nn.Module, x: Inputs, labels: Any, widths: Sequence[Widths], objective: Objective, backward: Backward
) -> torch.Tensor:
    """BCNet (Su et al. 2021): each on its first and on its last channels, each time on the whole batch."""  # noqa: D401
    means = []
    for setting in widths:
        sides = []
        for from_right in (False, True):
            loss = objective.losses(supernet(x, setting, from_right=from_right), x, labels).mean()
            backward(loss)
            sides.append(loss.detach())
        means.append(torch.stack(sides).mean())
    return torch.stack(means)


def teach(teacher: nn.Module | None, x: Inputs) -> Any:
    """Return the teacher's outputs on a batch, without gradients; None without a teacher."""
    if teacher is None:
        return None
    with torch.no_grad(), eval_mode(teacher.to(tensors_in(x)[0].device)):
        return teacher(*as_arguments(x))
