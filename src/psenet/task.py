"""What a network is for: how it is trained and how it is judged. The default is classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from psenet.errors import InputError
from psenet.evaluate import ScoreFn, accuracy, batch_difference, paired_difference, soft_accuracy
from psenet.training.config import TrainConfig
from psenet.training.losses import LossFn, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Task:
    """The loss and the score of a user's own task, with outputs and labels of any structure.

    Batches are pairs (x, labels): x is a tensor, or a tuple of the model's arguments; labels are whatever the functions
    read. Give all that differs from classification.

    Raises:
        InputError: A loss without a score: accuracy would be taken of outputs that are no logits.

    Example:
        >>> import torch
        >>> def squared_error(outputs, targets):
        ...     return (outputs - targets).square().flatten(1).mean(1)  # one loss per sample
        >>> def score(module, batches):
        ...     return -float(torch.stack([squared_error(module(x), y).mean() for x, y in batches]).mean())
        >>> Task(loss_fn=squared_error, score_fn=score, score_name="minus squared error", score_unit="").score_name
        'minus squared error'
    """

    loss_fn: LossFn | None = None
    """(outputs, labels) to one loss per sample, shape (B,); None for cross entropy of logits (B, classes, ...)."""
    score_fn: ScoreFn | None = None
    """(module, batches) to a score, higher is better; the module comes in eval mode. None for top-1 accuracy."""
    search_score_fn: ScoreFn | None = None
    """What candidates are compared by, if by something else: best a smooth relative of the score, since on little data
    many candidates have equal ones. None for `score_fn`, or for the mean probability of the true class."""
    score_name: str = "accuracy"
    """As tables and the report call the score."""
    score_unit: str = "%"
    """Behind its numbers."""

    def __post_init__(self) -> None:
        if self.loss_fn is not None and self.score_fn is None:
            raise InputError("a task with a loss of its own needs a score_fn of its own: (module, batches) to a number")

    def loss(self, config: TrainConfig) -> LossFn:
        """Return the loss that a training uses."""
        return self.loss_fn or cross_entropy(config.label_smoothing)

    @property
    def score(self) -> ScoreFn:
        """What nets are judged by."""
        return self.score_fn or accuracy

    def difference(self, module: nn.Module, other: nn.Module, batches: Sequence[Any]) -> tuple[float, float]:
        """Return by how much a module's score exceeds another's, and the standard error of that."""
        if self.score_fn is None:
            return paired_difference(module, other, batches)
        return batch_difference(module, other, batches, self.score_fn)

    @property
    def search_score(self) -> ScoreFn:
        """What candidates are compared by."""
        return self.search_score_fn or self.score_fn or soft_accuracy

    @property
    def search_score_name(self) -> str:
        """What candidates are compared by, for a person."""
        if self.search_score_fn is None and self.score_fn is None:
            return "mean probability of the true class, in percent,"
        return self.score_name if self.search_score_fn is None else "search score of the task"

    def show(self, score: float, *, signed: bool = False) -> str:
        """Return a score for a person: `98.76 %`."""
        return f"{score:+.2f} {self.score_unit}".strip() if signed else f"{score:.2f} {self.score_unit}".strip()


CLASSIFICATION = Task()
