"""What the stages of a run share: model, data, budget, settings, and the folder that keeps what is finished."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet import ranks
from psenet.budget import Budget, Limits
from psenet.config import PruneConfig
from psenet.devices import on_device
from psenet.evaluate import eval_mode
from psenet.inputs import Inputs
from psenet.logbook import Logbook
from psenet.logs import Logs
from psenet.report.money import ReturnFigures
from psenet.report.text import Language
from psenet.rundir import RunDirectory
from psenet.space import WidthSpace
from psenet.task import Task
from psenet.training.curves import Curves, EpochRecord, Recorder

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """The data of a run. The four sets must be disjoint."""

    train: DataLoader
    calibration: Sequence[Any]
    """Batches for the batch-norm statistics of candidates."""
    validation: Sequence[Any]
    """Batches for scoring candidates."""
    test: DataLoader | None
    """For the final figures, once."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Its model is its own copy, which the first stage trains."""

    model: nn.Module
    example: Inputs
    """One sample, or a tuple of the model's arguments with one sample each."""
    loaders: Loaders
    budget: Budget
    limits: Limits
    """The budget, worked out for the space."""
    space: WidthSpace
    config: PruneConfig
    task: Task
    folder: RunDirectory
    logs: Logs
    """For TensorBoard; they write nothing where they are not wanted."""
    names: dict[str, str]
    """`model` and `data` as a person would name them."""
    command: str | None
    """The command line that started this run or went on with it; None from Python."""
    workers: int
    """Processes that score candidates."""
    language: Language
    """Of its report."""
    returns: ReturnFigures
    """What its report works the return out from."""
    log: Logbook
    show_progress: bool
    device: torch.device
    """Where nets are trained and scored; between the stages they are on the CPU."""
    num_ranks: int = 1
    """Processes that train together."""

    @property
    def say(self) -> Say:
        """Tells a line to people, and to the log."""
        return self.log.say

    @property
    def focus(self) -> Limits | None:
        """What supernet training focuses on."""
        return self.limits if self.config.focus else None

    def score(self, net: nn.Module, batches: Any = None) -> float:
        """Return a net's score on the validation data, or on other batches."""
        with on_device(net, self.device), eval_mode(net), torch.no_grad():
            return self.task.score(net, self.loaders.validation if batches is None else batches)

    def recorder(self, training: str) -> Recorder | None:
        """Return what is told of every epoch of a training: the file of the run's curves, and the logs.

        Of several processes that train together only the main one has it.
        """
        if not ranks.is_main():
            return None
        keep = Curves(self.folder.file("stages/curves.json")).recorder(training)
        log = self.logs.recorder(training, num_samples=_samples_in_epoch(self.loaders.train))

        def record(epoch: EpochRecord) -> None:
            keep(epoch)
            log(epoch)

        return record

    def say_score(self, before: str, net: nn.Module, after: str) -> None:
        """Say a net's score on the validation data; of several processes the main one alone works it out."""
        if ranks.is_main():
            self.say(f"{before} {self.task.show(self.score(net))}{after}")

    def seed(self, stage: int) -> None:
        """Start a stage from a random state that does not depend on what was before it."""
        seed_stage(self.config, stage, self.loaders.train)


def seed_stage(config: PruneConfig, stage: int, train: DataLoader) -> None:
    """Set the random states (torch, Python, NumPy, the training data's order) for a stage of a run."""
    from accelerate.utils import set_seed

    seed = (config.seed * 16 + stage) % 2**32  # as much as NumPy takes
    set_seed(seed)
    if train.generator is not None:
        train.generator.manual_seed(seed)


def _samples_in_epoch(loader: DataLoader) -> int | None:
    """Return how many samples a loader gives in an epoch; None where its batches have no common size."""
    if loader.batch_size is None:
        return None
    whole = len(loader) * loader.batch_size
    return whole if loader.drop_last else min(whole, len(loader.sampler))  # pyright: ignore[reportArgumentType]
