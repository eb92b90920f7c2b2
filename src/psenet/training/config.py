"""The settings of one training: baseline, supernet or fine-tuning."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from psenet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; every kind of training here takes the same settings."""

    epochs: int = 10
    """Passes over the training data."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW; norms and biases get no weight decay."""
    learning_rate: float = 0.1
    """Peak of the cosine schedule, which falls to zero over all steps."""
    weight_decay: float = 5e-4
    """Decay of convolution and linear weights."""
    momentum: float = 0.9
    """SGD momentum (AdamW uses its own betas)."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises linearly, 0 to below 1."""
    label_smoothing: float = 0.0
    """Label smoothing of the default loss, 0 to below 1."""
    distill_weight: float = 0.0
    """Share of the loss that follows the teacher's soft targets instead of the labels, 0 to 1; needs a teacher."""
    distill_temperature: float = 1.0
    """Temperature of the soft targets."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast type, as in accelerate."""
    checkpoint_steps: int = 500
    """Steps between checkpoints within an epoch; there is one after every epoch, too."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {what}; got {getattr(self, name)!r}"
            for name, holds, what in (
                ("epochs", _is_count(self.epochs), "an integer of at least 0"),
                ("optimizer", self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
                ("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite"),
                ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
                ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
                ("warmup_ratio", 0 <= self.warmup_ratio < 1, "at least 0 and below 1"),
                ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
                ("distill_weight", 0 <= self.distill_weight <= 1, "between 0 and 1"),
                ("distill_temperature", 0 < self.distill_temperature < math.inf, "above 0 and finite"),
                ("mixed_precision", self.mixed_precision in ("no", "fp16", "bf16"), "'no', 'fp16' or 'bf16'"),
                ("checkpoint_steps", _is_count(self.checkpoint_steps, 1), "an integer of at least 1"),
            )
            if not holds
        ]
        if problems:
            raise InputError("training settings: " + "; ".join(problems))

    def as_dict(self) -> dict[str, object]:
        """Return the settings by name, for a run's record."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
