"""`prune`: the whole way from a model to a smaller one, stage by stage, each resumable.

baseline -> supernet -> search -> fine-tune -> test -> export -> result -> report
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from psenet import ranks
from psenet.artifact import load
from psenet.budget import Budget, uniform_widths
from psenet.config import PruneConfig
from psenet.errors import InputError, first_line
from psenet.export import ExportReport, export_model
from psenet.history import History
from psenet.inputs import Inputs
from psenet.report import report_name, write_report
from psenet.rundir import read_json, write_json
from psenet.slicing import narrow_attributes
from psenet.space import WidthSpace
from psenet.stages.figures import figures
from psenet.stages.finetune import Finalist, choose, fine_tuned
from psenet.stages.forecast import announce
from psenet.stages.run import Run, Say
from psenet.stages.search import SEARCHED, Search, search_best
from psenet.stages.start import TRAINED, Job, shape_of, silent, start_run
from psenet.stages.train import trained_baseline, trained_supernet
from psenet.supernet import Supernet
from psenet.task import CLASSIFICATION, Task
from psenet.widths import Widths

_RESULT = "result.json"


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
    task: Task | None = None,
    out: str | Path | None = None,
    config: PruneConfig | None = None,
    resume: bool = False,
    workers: int = 1,
    description: Mapping[str, str] | None = None,
    command: str | None = None,
    say: Say | None = None,
    show_progress: bool = False,
) -> PruneResult:
    """Prune a model to a budget.

    Args:
        model: Any traceable CNN; it is not changed. Without a `task` its outputs are logits (B, classes).
        example_input: One sample, shape (1, ...), or a tuple of the model's arguments with one sample each.
        train_loader: Batches (x, labels) to train on; x may be a tuple or list of arguments.
        val_loader: Batches to choose candidates by.
        budget: What the pruned net may cost.
        test_loader: Batches for the final figures; nothing else sees them. None: the figures are on `val_loader`, which
            chose the pruned net, so they flatter it; the record says so.
        calibration_loader: Batches for batch-norm statistics of candidates. None: a few training batches.
        task: The loss and the score of another task than classification.
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
    job = Job(
        model=model,
        example_input=example_input,
        train_loader=train_loader,
        val_loader=val_loader,
        test_loader=test_loader,
        calibration_loader=calibration_loader,
        budget=budget,
        config=config or PruneConfig(),
        task=task or CLASSIFICATION,
        names=description or {},
        command=command,
        workers=workers,
        say=say or silent,
        show_progress=show_progress,
    )
    return finish(start_run(job, out, resume=resume))


def finish(run: Run) -> PruneResult:
    """Do all stages of a run that are not done yet."""
    if _is_done(run, "export"):
        run.say("this run is finished; its figures are shown again")
        if not run.folder.has(report_name(run.language)):
            ranks.in_main(lambda: _write_report(run))
        return read_result(run)
    ranks.in_main(lambda: announce(run))
    products = _Products(run)
    with run.folder.at_work(), run.log.watch(run.command or "psenet.prune"), closing(run.logs):
        for stage in STAGES.values():
            stage.do(products)
    return read_result(run)


def run_stage(run: Run, name: str) -> None:
    """Do one stage of a run, or go on with it.

    Raises:
        InputError: There is no such stage, or one before it is not finished.
    """
    if name not in STAGES:
        raise InputError(f"a stage is one of {', '.join(STAGES)}; got {name!r}")
    for earlier in list(STAGES)[: list(STAGES).index(name)]:
        if not _is_done(run, earlier):
            raise InputError(
                f"the run in {run.folder.path} has not finished its stage {earlier!r}, which comes before {name!r}: "
                f"psenet {earlier} {run.folder.path}"
            )
    if _is_done(run, name):
        run.say(f"the stage {name!r} of this run is finished")
        return
    ranks.in_main(lambda: announce(run, stage=name))
    with run.folder.at_work(), run.log.watch(run.command or f"the stage {name}"), closing(run.logs):
        STAGES[name].do(_Products(run))


def read_result(run: Run) -> PruneResult:
    """Return what a finished run found: test data is not used again, and nothing is measured anew."""
    path, folder = run.folder.path / _RESULT, run.folder.path / "model"
    remedy = "delete it, and --resume tests and exports again"
    record = read_json(path, remedy=remedy)
    model = load(folder, lambda: copy.deepcopy(run.model)).eval()
    try:
        widths, export = Widths(record["widths"]), ExportReport.from_dict(record["export"], folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged; {remedy}: {first_line(error)}") from error
    return PruneResult(model=model, widths=widths, space=run.space, record=record, export=export)


# The stages -----------------------------------------------------------------------------------------------------------


class _Products:
    """What the stages of a run make; each is made once, or read where an earlier attempt has finished it."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def baseline(self) -> nn.Module:
        return trained_baseline(self.run)

    @cached_property
    def trained(self) -> tuple[Supernet, History]:
        return trained_supernet(self.run, self.baseline)

    @cached_property
    def search(self) -> Search:
        supernet, history = self.trained
        return search_best(self.run, supernet=supernet, history=history)

    @cached_property
    def finalists(self) -> dict[str, Finalist]:
        searched = uniform = self._fine_tuned("searched", self.search.widths)
        plain_widths = uniform_widths(self.run.space, self.search.limits)
        if plain_widths != self.search.widths:
            uniform = self._fine_tuned("uniform", plain_widths)
        return {"searched": searched, "uniform": uniform}

    def _fine_tuned(self, name: str, widths: Widths) -> Finalist:
        supernet, _ = self.trained
        return fine_tuned(self.run, name, widths, supernet=supernet, baseline=self.baseline)

    @cached_property
    def result(self) -> dict[str, Any]:
        nets = self.finalists
        return ranks.from_main(lambda: self._finished(nets))

    def _finished(self, nets: dict[str, Finalist]) -> dict[str, Any]:
        run = self.run
        kept = choose(run, nets["searched"], nets["uniform"])
        run.say("testing, measuring latency, exporting")
        record = figures(run, baseline=self.baseline, nets=nets, kept=kept)
        report = _write_model(run, nets[kept])
        record |= {"search": {**self.search.record, "kept": kept}, "export": report.as_dict()}
        write_json(run.folder.file(_RESULT), record)
        _write_report(run)
        return record


def _write_report(run: Run) -> None:
    """Write the report of a run that is finished, and stays so whatever becomes of its report."""
    from jinja2 import TemplateError

    try:
        write_report(run.folder.path, language=run.language, figures=run.returns)
    except (OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, TemplateError) as error:
        run.say(
            f"the report could not be written: {first_line(error)}; the run is finished all the same, and "
            f"`psenet report {run.folder.path}` writes it again"
        )


def _write_model(run: Run, net: Finalist) -> ExportReport:
    shape = None if isinstance(run.example, tuple) else shape_of(run.example)
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


@dataclass(frozen=True)
class _Stage:
    do: Callable[[_Products], object]
    leaves: tuple[str, ...]
    """The files of a run that has finished it."""


STAGES: Mapping[str, _Stage] = {
    "train": _Stage(lambda products: products.trained, TRAINED),
    "search": _Stage(lambda products: products.search, (SEARCHED,)),
    "finetune": _Stage(lambda products: products.finalists, ("stages/searched.safetensors",)),
    "export": _Stage(lambda products: products.result, (_RESULT,)),
}
"""The stages of a run, in order."""


def _is_done(run: Run, stage: str) -> bool:
    return run.folder.has(*STAGES[stage].leaves)
