"""`prune`: the whole way from a model to a smaller one, stage by stage, each resumable.

baseline -> supernet -> search -> fine-tune -> test -> export -> result -> report
"""

import copy
import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet.artifact import load
from psenet.budget import Budget, uniform_widths
from psenet.config import PruneConfig
from psenet.errors import InputError, first_line
from psenet.export import ExportReport, export_model
from psenet.inputs import Inputs, tensors_in
from psenet.latency_model import NUM_SUBNETS, LatencyModel
from psenet.progress import progress_bar
from psenet.reading import trace
from psenet.report import write_report
from psenet.rundir import RunDirectory, check_folder, read_json, write_json
from psenet.slicing import narrow_attributes
from psenet.space import WidthSpace
from psenet.stages.figures import figures, plain_budget, search_record
from psenet.stages.finetune import Finalist, choose, fine_tuned
from psenet.stages.forecast import announce
from psenet.stages.run import Loaders, Run, Say, seed_stage
from psenet.stages.search import search_best
from psenet.stages.train import trained_baseline, trained_supernet
from psenet.training.loop import make_accelerator
from psenet.widths import Widths

_CALIBRATION_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What `prune` returns."""

    model: nn.Module
    """The pruned, fine-tuned, plain module."""
    widths: Widths
    """Its widths."""
    space: WidthSpace
    record: Mapping[str, Any]
    """The figures, as in `result.json` (see `psenet.result`)."""
    export: ExportReport


def prune(
    model: nn.Module,
    example_input: Inputs,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    budget: Budget,
    test_loader: DataLoader | None = None,
    calibration_loader: DataLoader | None = None,
    out: str | Path | None = None,
    config: PruneConfig | None = None,
    resume: bool = False,
    workers: int = 1,
    description: Mapping[str, str] | None = None,
    command: str | None = None,
    say: Say | None = None,
    show_progress: bool = False,
) -> PruneResult:
    """Prune a classification model to a budget.

    Args:
        model: Any traceable CNN, logits (B, classes); it is not changed.
        example_input: One sample, shape (1, ...), or a tuple of the model's arguments with one sample each.
        train_loader: Batches (x, labels) to train on; x may be a tuple or list of arguments.
        val_loader: Batches to choose candidates by.
        budget: What the pruned net may cost.
        test_loader: Batches for the final figures; nothing else sees them. None: the figures are on `val_loader`, which
            chose the pruned net, so they flatter it; the record says so.
        calibration_loader: Batches for batch-norm statistics of candidates. None: a few training batches.
        out: The run directory (see `psenet.rundir`). None: a new temporary folder, see `export.paths` of the result.
        config: All other settings; None for the defaults.
        resume: Continue the run in `out`, if there is one.
        workers: Score candidates in so many processes; see `psenet.search`.
        description: `model` and `data` as a person would name them, for the record.
        command: The command line, for the record.
        say: Gets a line for a person at each stage; None for silence.
        show_progress: Whether to show progress bars.

    Returns:
        The pruned model and its figures, also written to `out`.

    Raises:
        InputError: The model, the budget, a loader or the output folder cannot be used.
        TrainingDivergedError: A loss became NaN; the last good checkpoint stays and `resume` continues from it.
    """
    config = config or PruneConfig()
    names = {"model": type(model).__name__, "data": "loaders", **(description or {})}
    given = {"train": train_loader, "calibration": calibration_loader, "validation": val_loader, "test": test_loader}
    for name, loader in given.items():
        if loader is not None and len(loader) == 0:
            raise InputError(f"the {name} loader has no batches")
    space = trace(
        model,
        example_input,
        divisor=config.divisor,
        min_ratio=config.min_ratio,
        exclude=config.exclude or None,
        opaque=config.opaque,
    )
    recipe = {
        **names,
        "input_shape": _shape_of(example_input),
        "batch_size": train_loader.batch_size,
        "batches": {name: None if loader is None else len(loader) for name, loader in given.items()},
        "budget": plain_budget(budget),
        "settings": config.as_dict(),
    }
    say = say or (lambda line: None)
    out = Path(tempfile.mkdtemp(prefix="psenet-") if out is None else out)
    check_folder(out, recipe, resume=resume)
    config.check(space)  # before any time is spent on measuring
    latency = None
    if budget.latency_ms is not None:
        latency = _latency_model(out / "stages/latency.npz", model, space, example_input, config, say, show_progress)
        space = space.with_latency(latency)
    limits = budget.resolve(space)
    if config.focus:
        config.check(space, focus=limits)
    folder = RunDirectory(out, recipe, resume=resume)
    if latency is not None:
        latency.save(folder.file("stages/latency.npz"))
    seed_stage(config, 0, train_loader)
    run = Run(
        model=copy.deepcopy(model),
        example=example_input,
        loaders=Loaders(
            train=train_loader,
            calibration=_batches(calibration_loader, train_loader),
            validation=list(val_loader),
            test=test_loader,
        ),
        budget=budget,
        limits=limits,
        space=space,
        config=config,
        folder=folder,
        names=names,
        command=command,
        workers=workers,
        say=say,
        show_progress=show_progress,
        device=make_accelerator().device,
    )
    if (out / "result.json").exists():
        return _finished(run)
    return _run_stages(run)


def _run_stages(run: Run) -> PruneResult:
    """Run the stages in order."""
    announce(run)
    baseline = trained_baseline(run)
    supernet, history = trained_supernet(run, baseline)
    search = search_best(run, supernet=supernet, history=history)
    searched = uniform = fine_tuned(run, "searched", search.best.widths, supernet=supernet, baseline=baseline)
    plain_widths = uniform_widths(run.space, search.limits)
    if plain_widths != search.best.widths:
        uniform = fine_tuned(run, "uniform", plain_widths, supernet=supernet, baseline=baseline)
    nets = {"searched": searched, "uniform": uniform}
    kept = choose(run, searched, uniform)
    run.say("testing, measuring latency, exporting")
    record = figures(run, baseline=baseline, nets=nets, kept=kept)
    report = _export(run, nets[kept])
    record |= {"search": search_record(search, num_visits=len(history), kept=kept), "export": report.as_dict()}
    write_json(run.folder.file("result.json"), record)
    _write_report(run)
    pruned = nets[kept]
    return PruneResult(model=pruned.module, widths=pruned.widths, space=run.space, record=record, export=report)


def _finished(run: Run) -> PruneResult:
    """Return what a finished run found: test data is not used again, and nothing is measured anew."""
    run.say("this run is finished; its figures are shown again")
    record, folder = read_json(run.folder.path / "result.json"), run.folder.path / "model"
    if not (run.folder.path / "report.html").exists():
        _write_report(run)
    return PruneResult(
        model=load(folder, lambda: copy.deepcopy(run.model)).eval(),
        widths=Widths(record["widths"]),
        space=run.space,
        record=record,
        export=ExportReport.from_dict(record["export"], folder),
    )


def _write_report(run: Run) -> None:
    """Write the report of a run that is finished, and stays so whatever becomes of its report."""
    from jinja2 import TemplateError

    try:
        write_report(run.folder.path)
    except (OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, TemplateError) as error:
        run.say(
            f"the report could not be written: {first_line(error)}; the run is finished all the same, and "
            f"`psenet report {run.folder.path}` writes it again"
        )


def _export(run: Run, net: Finalist) -> ExportReport:
    shape = _shape_of(run.example) if isinstance(run.example, torch.Tensor) else None
    report = export_model(
        net.module,
        run.example,
        run.folder.path / "model",
        widths=net.widths,
        details={
            "model": run.names["model"],
            "input_shape": shape,
            "in_channels": shape and shape[0],
            "attributes": narrow_attributes(run.model, run.space, net.widths),
        },
    )
    for problem in report.problems:
        run.say(f"export: {problem}")
    return report


def _latency_model(
    path: Path,
    model: nn.Module,
    space: WidthSpace,
    example: Inputs,
    config: PruneConfig,
    say: Say,
    show_progress: bool,
) -> LatencyModel:
    """Return the latency model of a run that goes on, or measure one."""
    if path.exists():
        return LatencyModel.load(path, space)
    say(f"measuring latency by {config.latency.engine} on {config.latency.device}, for the budget on it")
    with progress_bar("latency", total=NUM_SUBNETS[config.latency.engine], show=show_progress) as advance:
        latency = LatencyModel.measure(
            model,
            space,
            example,
            runner=config.latency,
            seed=config.seed,
            progress=lambda done, total: advance(done, ""),
        )
    say(latency.describe())
    return latency


def _shape_of(example: Inputs) -> Any:
    """Return the shape of one sample, or the shapes of all its tensors."""
    shapes = [tuple(tensor.shape[1:]) for tensor in tensors_in(example)]
    return shapes[0] if isinstance(example, torch.Tensor) else shapes


def _batches(calibration: DataLoader | None, train: DataLoader) -> list[Any]:
    return list(itertools.islice(train, _CALIBRATION_BATCHES)) if calibration is None else list(calibration)
