"""The settings of `prune`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from psenet.budget import Limits
from psenet.errors import InputError
from psenet.export import ExportChoice
from psenet.runners import EAGER, Runner
from psenet.space import WidthSpace
from psenet.training.config import TrainConfig
from psenet.training.loop import make_accelerator
from psenet.training.strategies import make_strategy

_RANGES: Mapping[str, tuple[int, int | None]] = {
    "seed": (0, 2**32 - 1),  # what every generator takes
    "num_evaluations": (1, None),
    "num_front_evaluations": (0, None),
    "num_subnets": (1, None),
    "divisor": (1, None),
}


def _is_within(value: object, least: int, most: int | None) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value >= least and (most is None or value <= most)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The settings of `prune` beside model, data and budget.

    Raises:
        InputError: A number is out of range; all offenders are named.
    """

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
    export: ExportChoice = ExportChoice()
    """Which programs are made of the pruned net."""
    seed: int = 0
    """Of everything random."""
    tensorboard: bool = False
    """Write logs for TensorBoard into the run directory. No part of `as_dict`: a run may go on with or without."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be an integer of at least {least}{f' and at most {most}' if most else ''}; got {value!r}"
            for name, (least, most) in _RANGES.items()
            if not _is_within(value := getattr(self, name), least, most)
        ]
        if not (isinstance(self.min_ratio, int | float) and 0 < self.min_ratio <= 1):
            problems.append(f"min_ratio must be above 0 and at most 1; got {self.min_ratio!r}")
        if problems:
            raise InputError("; ".join(problems))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values: those that decide what the run gives."""
        plain: dict[str, Any] = {}
        nested: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "tensorboard":
                continue
            if isinstance(value, TrainConfig):
                nested[name] = value.as_dict()
            elif isinstance(value, Runner | ExportChoice):
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
            InputError: The strategy is unknown or has no focus, a device is missing or lacks the precision.
        """
        make_strategy(self.strategy, space, num_subnets=self.num_subnets, seed=self.seed, focus=focus)
        self.latency.check()
        for training in (self.baseline, self.supernet, self.finetune):
            make_accelerator(training.mixed_precision)
