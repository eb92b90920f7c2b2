"""Start a run: everything that can be refused is refused here, before any hour is spent."""

import copy
import functools
import itertools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from psenet import ranks
from psenet.budget import Budget
from psenet.config import PruneConfig
from psenet.errors import InputError
from psenet.files import write_atomically
from psenet.inputs import Inputs, tensors_in
from psenet.latency_model import NUM_SUBNETS, LatencyModel
from psenet.logbook import Logbook
from psenet.logs import Logs, check_tensorboard
from psenet.progress import progress_bar
from psenet.reading import trace
from psenet.report.money import ReturnFigures
from psenet.report.text import Language
from psenet.rundir import RunDirectory, changed_settings, check_folder, read_json
from psenet.space import WidthSpace
from psenet.stages.figures import plain_budget
from psenet.stages.run import Loaders, Run, Say, seed_stage
from psenet.task import CLASSIFICATION, Task
from psenet.training.loop import check_shares, make_accelerator

_CALIBRATION_BATCHES = 8
_LATENCY = "stages/latency.npz"
TRAINED = ("stages/baseline.safetensors", "stages/supernet.safetensors", "stages/history.npz")
_OF_BUDGET = (
    *("budget.", "settings.num_evaluations", "settings.num_front_evaluations", "settings.early_stopping"),
    *("settings.finetune.", "settings.latency."),
)
"""Settings that training does not depend on."""


def silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `prune` is given."""

    model: nn.Module
    example_input: Inputs
    train_loader: DataLoader
    val_loader: DataLoader
    budget: Budget
    test_loader: DataLoader | None = None
    calibration_loader: DataLoader | None = None
    config: PruneConfig = field(default_factory=PruneConfig)
    task: Task = CLASSIFICATION
    names: Mapping[str, str] = field(default_factory=dict)
    """`model` and `data` as a person would name them."""
    workers: int = 1
    """Processes that score candidates."""
    command: str | None = None
    """The command line that asks for this; None from Python."""
    language: Language = "en"
    """Of the report."""
    returns: ReturnFigures = field(default_factory=ReturnFigures)
    """What the report works the return out from."""
    say: Say = silent
    show_progress: bool = False

    @property
    def loaders(self) -> dict[str, DataLoader | None]:
        """All loaders by what they are for."""
        return {
            "train": self.train_loader,
            "calibration": self.calibration_loader,
            "validation": self.val_loader,
            "test": self.test_loader,
        }


def start_run(
    job: Job, out: str | Path | None = None, *, resume: bool = False, trained_in: str | Path | None = None
) -> Run:
    """Check a job and make its run directory.

    Args:
        job: What to do.
        out: The run directory. None: a new temporary folder.
        resume: Continue the run in `out`, if there is one.
        trained_in: Another run of the same model, data and training, whose trained supernet this one takes.

    Raises:
        InputError: The model, the budget, a loader or a folder cannot be used.
    """
    config = job.config
    device = make_accelerator().device  # of several processes, also what joins them
    if config.tensorboard:
        check_tensorboard()
    for name, loader in job.loaders.items():
        if loader is not None and len(loader) == 0:
            raise InputError(f"the {name} loader has no batches")
    if not any(parameter.requires_grad for parameter in job.model.parameters()):
        raise InputError(
            "the model must have parameters to train; all of its have requires_grad=False: call requires_grad_(True)"
        )
    check_shares(job.train_loader)
    space = trace(
        job.model,
        job.example_input,
        divisor=config.divisor,
        min_ratio=config.min_ratio,
        exclude=config.exclude or None,
        opaque=config.opaque,
    )
    recipe = _recipe_of(job)
    out = Path(ranks.from_main(lambda: tempfile.mkdtemp(prefix="psenet-")) if out is None else out)
    ranks.in_main(lambda: check_folder(out, recipe, resume=resume))
    if trained_in is not None:
        ranks.in_main(lambda: _check_trained(Path(trained_in), recipe, config))
    config.check(space)  # before any time is spent on measuring
    latency = None
    if job.budget.latency_ms is not None:
        measured = space
        latency = ranks.from_main(lambda: _latency_model(out / _LATENCY, job, measured))
        space = space.with_latency(latency)
    limits = job.budget.resolve(space)
    if config.focus:
        config.check(space, focus=limits)
    folder = RunDirectory(out, recipe, resume=resume)
    if latency is not None:
        ranks.in_main(lambda: latency.save(folder.file(_LATENCY)))
    if trained_in is not None:
        ranks.in_main(lambda: _take_trained(Path(trained_in), folder))
    seed_stage(config, 0, job.train_loader)
    return Run(
        model=copy.deepcopy(job.model),
        example=job.example_input,
        loaders=_loaders(job),
        budget=job.budget,
        limits=limits,
        space=space,
        config=config,
        task=job.task,
        folder=folder,
        logs=Logs(out / "logs" if config.tensorboard and ranks.is_main() else None),
        names=_names(job),
        command=job.command,
        workers=job.workers,
        language=job.language,
        returns=job.returns,
        log=Logbook(out / "run.log" if ranks.is_main() else None, job.say if ranks.is_main() else silent),
        show_progress=job.show_progress and ranks.is_main(),
        device=device,
        num_ranks=ranks.num_ranks(),
    )


def shape_of(example: Inputs) -> Any:
    """Return the shape of one sample, or the shapes of all its tensors."""
    shapes = [tuple(tensor.shape[1:]) for tensor in tensors_in(example)]
    return shapes if isinstance(example, tuple) else shapes[0]


def _names(job: Job) -> dict[str, str]:
    return {"model": type(job.model).__name__, "data": "loaders", **job.names}


def _recipe_of(job: Job) -> dict[str, Any]:
    """Return what makes two runs the same one."""
    return {
        **_names(job),
        "input_shape": shape_of(job.example_input),
        "batch_size": job.train_loader.batch_size,
        "batches": {name: None if loader is None else len(loader) for name, loader in job.loaders.items()},
        "budget": plain_budget(job.budget),
        "settings": job.config.as_dict(),
    }


def _loaders(job: Job) -> Loaders:
    calibration = job.calibration_loader
    first = itertools.islice(job.train_loader, _CALIBRATION_BATCHES) if calibration is None else calibration
    return Loaders(
        train=job.train_loader, calibration=list(first), validation=list(job.val_loader), test=job.test_loader
    )


# Trained before -------------------------------------------------------------------------------------------------------


def _check_trained(source: Path, recipe: Mapping[str, Any], config: PruneConfig) -> None:
    """Make sure that another run's supernet is the one that this run would train.

    Raises:
        InputError: It is of other settings, for another budget only, or not trained to its end.
    """
    if not (source / "recipe.json").is_file():
        raise InputError(f"{source} must be a run directory made by psenet; it holds no recipe.json")
    missing = [name for name in TRAINED if not (source / name).is_file()]
    if missing:
        raise InputError(
            f"the run in {source} has no trained supernet yet ({missing[0]} is missing): finish its training first"
        )
    changes = changed_settings(read_json(source / "recipe.json"), recipe, beside=_OF_BUDGET)
    if changes:
        raise InputError(f"the supernet in {source} was trained with other settings: {changes}; train one of its own")
    if config.focus:
        raise InputError(
            f"the supernet in {source} was trained for its own budget only (focus): train one without focus to search "
            "several budgets"
        )


def _take_trained(source: Path, folder: RunDirectory) -> None:
    """Copy the results of training, and the time it took, unless they are there."""
    for name in TRAINED:
        target = folder.file(name)
        if not target.exists():
            with (source / name).open("rb") as original:
                write_atomically(target, functools.partial(shutil.copyfileobj, original))
    folder.take_seconds(source, ("baseline", "supernet"))


def _latency_model(path: Path, job: Job, space: WidthSpace) -> LatencyModel:
    """Return the latency model of a run that goes on, or measure one."""
    if path.exists():
        return LatencyModel.load(path, space)
    runner = job.config.latency
    job.say(f"measuring latency by {runner.engine} on {runner.device}, for the budget on it")
    with progress_bar("latency", total=NUM_SUBNETS[runner.engine], show=job.show_progress) as advance:
        latency = LatencyModel.measure(
            job.model,
            space,
            job.example_input,
            runner=runner,
            seed=job.config.seed,
            progress=lambda done, total: advance(done, ""),
        )
    job.say(latency.describe())
    return latency
