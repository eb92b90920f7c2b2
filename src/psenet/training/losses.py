"""Per-sample losses. Every loss function here and from users returns one number per sample, shape (B,)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from psenet.errors import InputError
from psenet.evaluate import IGNORED
from psenet.training.config import TrainConfig

LossFn = Callable[[Any, Any], torch.Tensor]
"""`loss_fn(outputs, labels)` returns one loss per sample, shape (B,); outputs and labels are those of the task."""


def cross_entropy(label_smoothing: float = 0.0) -> LossFn:
    """Return cross entropy per sample for logits (B, classes, ...) and labels (B, ...).

    Of dense labels it is the mean over a sample's places; places labelled -100 do not count.
    """

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        if losses.ndim == 1:
            return losses
        counts_B = (labels != IGNORED).flatten(1).sum(1)
        return losses.flatten(1).sum(1) / counts_B.clamp(min=1)

    return loss_fn


def soft_cross_entropy(logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Return the distillation loss per sample (Hinton et al. 2015, scaled by the squared temperature).

    Args:
        logits: Shape (B, classes).
        teacher_logits: Shape (B, classes); no gradient flows into them.
        temperature: Above 0.

    Returns:
        Kullback-Leibler divergence from the teacher's softened distribution, shape (B,).
    """
    log_p = F.log_softmax(logits / temperature, dim=1)
    q = F.softmax(teacher_logits.detach() / temperature, dim=1)
    return F.kl_div(log_p, q, reduction="none").sum(1) * temperature**2


def mixed_loss(
    loss_fn: LossFn,
    config: TrainConfig,
    outputs: Any,
    labels: Any,
    teacher_outputs: Any,
    *,
    num_samples: int,
) -> torch.Tensor:
    """Return label loss and distillation mixed by `config.distill_weight`, shape (B,).

    Raises:
        InputError: The loss function does not return one number per sample, or there are no logits to distil.
    """
    losses_B = loss_fn(outputs, labels)
    if losses_B.shape != (num_samples,):
        raise InputError(
            f"loss_fn must return one loss per sample, shape ({num_samples},); got {tuple(losses_B.shape)} "
            "(use reduction='none' and average over everything but the batch)"
        )
    if teacher_outputs is None or config.distill_weight == 0:
        return losses_B
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
        raise InputError("distillation is for logits of shape (B, classes); set distill_weight=0 for other outputs")
    soft_B = soft_cross_entropy(outputs, teacher_outputs, temperature=config.distill_temperature)
    return (1 - config.distill_weight) * losses_B + config.distill_weight * soft_B
