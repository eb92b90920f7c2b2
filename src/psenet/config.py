"""The settings of `prune`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from psenet.budget import Limits
from psenet.errors import InputError
from psenet.runners import EAGER, Runner
from psenet.space import WidthSpace
from psenet.training.config import TrainConfig
from psenet.training.loop import make_accelerator
from psenet.training.strategies import make_strategy


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The settings of `prune` beside model, data and budget."""

    baseline: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=30))
    """How the full model is trained if it is not `trained`."""
    supernet: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=30, learning_rate=0.05))
    """How the supernet is trained, from the baseline's weights."""
    finetune: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10, learning_rate=0.02))
    """How the pruned and the uniform net are fine-tuned; distillation is from the baseline."""
    trained: bool = False
    """The model has trained weights: it is the baseline as it comes."""
    strategy: str = "parallel"
    """How the supernet is trained; see `psenet.training.make_strategy`."""
    num_subnets: int = 8
    """Subnets per parallel step."""
    focus: bool = False
    """Train mostly subnets near the budget; a supernet for one budget only."""
    compiled: bool = False
    """Compile the supernet's passes; see `psenet.Supernet`."""
    num_evaluations: int = 100
    """Candidates that the search scores."""
    early_stopping: bool = True
    """Score a candidate only until it is hopeless beside the best so far; see `psenet.search`."""
    num_front_evaluations: int = 24
    """Candidates scored besides over all costs, for the Pareto front of the report; 0 for none."""
    divisor: int = 8
    """Widths are multiples of this many channels."""
    min_ratio: float = 0.25
    """The smallest width as a share of a group's size."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that must not vary; see `psenet.trace`."""
    opaque: tuple[str, ...] = ()
    """Patterns of modules not to read at all; see `psenet.trace`."""
    latency: Runner = EAGER
    """What latency is measured by, for a budget on it and for the result: best what will run the net."""
    seed: int = 0
    """Of everything random."""
    tensorboard: bool = False
    """Write logs for TensorBoard into the run directory. No part of `as_dict`: a run may go on with or without."""

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values: those that decide what the run gives."""
        plain: dict[str, Any] = {}
        nested: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "tensorboard":
                continue
            if isinstance(value, TrainConfig):
                nested[name] = value.as_dict()
            elif isinstance(value, Runner):
                nested[name] = asdict(value)
            else:
                plain[name] = list(value) if isinstance(value, tuple) else value
        return plain | nested

    def check(self, space: WidthSpace, *, focus: Limits | None = None) -> None:
        """Refuse now what a stage would refuse hours later.

        Args:
            space: The width space of the model.
            focus: The budget, worked out for it, where training shall focus on it.

        Raises:
            InputError: A number is too small, the strategy is unknown or has no focus, a device is missing or lacks the
                precision.
        """
        least = {"seed": 0, "num_evaluations": 1, "num_front_evaluations": 0}
        given = {name: getattr(self, name) for name in least}
        problems = [
            f"{name} must be at least {least[name]}; got {value}"
            for name, value in given.items()
            if value < least[name]
        ]
        if problems:
            raise InputError("; ".join(problems))
        make_strategy(self.strategy, space, num_subnets=self.num_subnets, seed=self.seed, focus=focus)
        self.latency.check()
        for training in (self.baseline, self.supernet, self.finetune):
            make_accelerator(training.mixed_precision)
