"""`prune`: the whole way from a model to a smaller one, stage by stage, each resumable.

baseline -> supernet -> search -> fine-tune -> test -> export -> result
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from psenet.artifact import load, write_bytes
from psenet.budget import Budget, Limits, uniform_widths
from psenet.config import PruneConfig
from psenet.devices import on_device
from psenet.errors import InputError
from psenet.estimate import estimate_seconds, say_duration
from psenet.evaluate import SupernetScore, accuracy, paired_difference, recalibrate, soft_accuracy
from psenet.evolution import Evaluation, SearchProgress, search
from psenet.export import ExportReport, export_model
from psenet.history import History
from psenet.importance import order_channels
from psenet.inputs import Inputs, num_samples, tensors_in
from psenet.latency import measure_latency
from psenet.predictor import Predictor
from psenet.prior import Prior
from psenet.progress import progress_bar
from psenet.reading import trace
from psenet.result import FORMAT, hardware, net_record, versions
from psenet.rundir import RunDirectory, read_json, write_json
from psenet.slicing import narrow_attributes
from psenet.space import WidthSpace
from psenet.supernet import Supernet
from psenet.training.loop import make_accelerator
from psenet.training.plain import train_model
from psenet.training.supernet import train_supernet
from psenet.widths import Widths

Say = Callable[[str], None]

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
    description: Mapping[str, str] | None = None,
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
        description: `model` and `data` as a person would name them, for the record.
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
    limits = budget.resolve(space)
    config.check(space, limits)
    recipe = {
        **names,
        "input_shape": _shape_of(example_input),
        "batch_size": train_loader.batch_size,
        "batches": {name: None if loader is None else len(loader) for name, loader in given.items()},
        "budget": _plain_budget(budget),
        "settings": config.as_dict(),
    }
    folder = RunDirectory(Path(tempfile.mkdtemp(prefix="psenet-") if out is None else out), recipe, resume=resume)
    _seed(config, 0, train_loader)
    run = _Run(
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
        say=say or (lambda line: None),
        show_progress=show_progress,
        device=make_accelerator().device,
    )
    return run.run()


@dataclass(frozen=True, kw_only=True)
class _Finalist:
    """A net of the budget, before and after fine-tuning."""

    widths: Widths
    module: nn.Module
    before: nn.Module


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The stages in order. Each finds its finished result in the run directory, or makes it."""

    model: nn.Module
    example: Inputs
    loaders: Loaders
    budget: Budget
    limits: Limits
    space: WidthSpace
    config: PruneConfig
    folder: RunDirectory
    names: dict[str, str]
    say: Say
    show_progress: bool
    device: torch.device
    """Where nets are trained and scored; between the stages they are on the CPU."""

    def run(self) -> PruneResult:
        finished = self._finished()
        if finished is not None:
            return finished
        self._announce()
        baseline = self._baseline()
        supernet, history = self._supernet(baseline)
        best, num_evaluated = self._search(supernet, history)
        searched = uniform = self._finalist("searched", best.widths, supernet, baseline)
        plain_widths = uniform_widths(self.space, self.limits)
        if plain_widths != best.widths:
            uniform = self._finalist("uniform", plain_widths, supernet, baseline)
        nets = {"searched": searched, "uniform": uniform}
        kept = self._choose(searched, uniform)
        pruned = nets[kept]
        self.say("testing, measuring latency, exporting")
        record = self._figures(baseline, nets, kept)
        report = export_model(
            pruned.module,
            self.example,
            self.folder.path / "model",
            widths=pruned.widths,
            details=self._details(pruned.widths),
        )
        for problem in report.problems:
            self.say(f"export: {problem}")
        record |= {
            "search": {
                "num_evaluations": num_evaluated,
                "best_score": best.score,
                "history": len(history),
                "kept": kept,
            },
            "export": report.as_dict(),
        }
        write_json(self.folder.file("result.json"), record)
        return PruneResult(model=pruned.module, widths=pruned.widths, space=self.space, record=record, export=report)

    @property
    def _focus(self) -> Limits | None:
        return self.limits if self.config.focus else None

    # Stages -------------------------------------------------------------------------------------------------------

    def _finished(self) -> PruneResult | None:
        """Return what a finished run found: test data is not used again, and nothing is measured anew."""
        path, folder = self.folder.path / "result.json", self.folder.path / "model"
        if not path.exists():
            return None
        self.say("this run is finished; its figures are shown again")
        record = read_json(path)
        return PruneResult(
            model=load(folder, lambda: copy.deepcopy(self.model)).eval(),
            widths=Widths(record["widths"]),
            space=self.space,
            record=record,
            export=ExportReport.from_dict(record["export"], folder),
        )

    def _announce(self) -> None:
        """Say what will be done and how long it will take."""
        space, full = self.space, self.space.full()
        least = space.macs(space.smallest()) / space.macs(full)
        self.say(
            f"{self.names['model']}: {space.macs(full) / 1e6:.1f}M MACs, {space.params(full) / 1e6:.2f}M parameters, "
            f"{len(space.groups)} channel groups, reachable down to {least:.0%} of the MACs"
        )
        self.say(f"budget: {self.limits.describe(space)}")
        seconds = self._estimate()
        stages = ", ".join(f"{stage} {say_duration(time)}" for stage, time in seconds.items() if time > 0)
        self.say(f"expected time: about {say_duration(sum(seconds.values()))} ({stages})")

    def _estimate(self) -> dict[str, float]:
        """Return the seconds that each stage should take when it starts from nothing."""
        config, epoch = self.config, len(self.loaders.train)
        generator = self.loaders.train.generator
        state = None if generator is None else generator.get_state()
        batch = next(iter(self.loaders.train))
        if generator is not None and state is not None:
            generator.set_state(state)
        supernet, full = Supernet(self.model, self.space), self.space.macs(self.space.full())
        return estimate_seconds(
            self.model,
            supernet,
            (batch[0], batch[1]),
            steps={
                "baseline": 0 if config.trained else config.baseline.epochs * epoch,
                "supernet": config.supernet.epochs * epoch,
                "finetune": 2 * config.finetune.epochs * epoch,
            },
            num_subnets=config.num_subnets,
            strategy=config.strategy,
            focus=self._focus,
            num_calibration=_num_images(self.loaders.calibration),
            num_validation=_num_images(self.loaders.validation),
            num_evaluations=config.num_evaluations,
            keep_ratio=(self.limits.macs or full) / full,
            device=self.device,
        )

    def _baseline(self) -> nn.Module:
        """Return the trained full model, its channels ordered by importance."""
        path = self.folder.file("stages/baseline.safetensors")
        if not path.exists():
            with self.folder.stage("baseline"):
                self._seed(1)
                if not self.config.trained:
                    self.say("training the baseline")
                    train_model(
                        self.model,
                        self.loaders.train,
                        config=self.config.baseline,
                        checkpoint=self.folder.checkpoint("baseline"),
                        description="baseline",
                        show_progress=self.show_progress,
                    )
                _save_state(order_channels(self.model, self.space), path)
        _load_state(self.model, path)
        self.say(f"baseline: {self._score(self.model, accuracy):.2f} % on validation data")
        return self.model.eval()

    def _supernet(self, baseline: nn.Module) -> tuple[Supernet, History]:
        path, history_path = self.folder.file("stages/supernet.safetensors"), self.folder.file("stages/history.npz")
        supernet = Supernet(baseline, self.space, compiled=self.config.compiled)
        if path.exists() and history_path.exists():
            _load_state(supernet.model, path)
            return supernet, History.load(history_path, self.space)
        self.say(f"training the supernet ({self.config.strategy})")
        with self.folder.stage("supernet"):
            self._seed(2)
            history = train_supernet(
                supernet,
                self.loaders.train,
                num_subnets=self.config.num_subnets,
                strategy=self.config.strategy,
                focus=self._focus,
                config=self.config.supernet,
                teacher=baseline if self.config.supernet.distill_weight else None,
                seed=self.config.seed,
                checkpoint=self.folder.checkpoint("supernet"),
                show_progress=self.show_progress,
            )
            history.save(history_path)
            _save_state(supernet.model, path)
        return supernet, history

    def _search(self, supernet: Supernet, history: History) -> tuple[Evaluation, int]:
        self.say(f"searching, {self.config.num_evaluations} candidates")
        total = self.config.num_evaluations
        with (
            self.folder.stage("search"),
            on_device(supernet, self.device),
            progress_bar("search", total=total, show=self.show_progress) as advance,
        ):

            def progress(state: SearchProgress) -> None:
                advance(state.num_done, f"best {state.best.score:.2f}" if state.best else "")

            self._seed(3)
            found = search(
                self.space,
                self.limits,
                SupernetScore(supernet, self.loaders.calibration, self.loaders.validation, score_fn=soft_accuracy),
                prior=Prior.fit(history, self.space) if len(history) else None,
                predictor=Predictor.fit(history, self.space),
                first=[uniform_widths(self.space, self.limits)],
                num_evaluations=total,
                seed=self.config.seed,
                storage=self.folder.file("stages/study.journal"),
                progress=progress,
            )
        best = found.best
        write_json(self.folder.file("stages/search.json"), {"widths": dict(best.widths), "score": best.score})
        self.say(
            f"winner: score {best.score:.2f} at {best.macs / 1e6:.1f}M MACs, best of {len(found.evaluated)}; "
            "the score is the mean probability of the true class on validation data, in percent"
        )
        if found.predicted_rank_correlation is not None:
            self.say(
                f"candidates were chosen by predicted score; predictions before scoring rank like the scores with rho "
                f"{found.predicted_rank_correlation:.2f}"
            )
        return best, len(found.evaluated)

    def _finalist(self, name: str, widths: Widths, supernet: Supernet, baseline: nn.Module) -> _Finalist:
        """Extract a net and fine-tune it; its fine-tuned weights are the stage's result."""
        net = supernet.extract(widths).eval()
        with on_device(net, self.device):
            recalibrate(net, self.loaders.calibration)
        before, path = copy.deepcopy(net), self.folder.file(f"stages/{name}.safetensors")
        if not path.exists():
            self.say(f"fine-tuning the {name} net")
            with self.folder.stage("finetune"):
                self._seed(4)
                train_model(
                    net,
                    self.loaders.train,
                    config=self.config.finetune,
                    teacher=baseline,
                    checkpoint=self.folder.checkpoint(name),
                    description=f"fine-tune {name}",
                    show_progress=self.show_progress,
                )
                _save_state(net, path)
        _load_state(net, path)
        return _Finalist(widths=widths, module=net.eval(), before=before)

    def _choose(self, searched: _Finalist, uniform: _Finalist) -> str:
        """Return "searched" if that net is the better one on validation data, else "uniform".

        The search took the best of many candidates on these very data, so a part of its lead is luck. It has to lead by
        more than a standard error to be kept: what cannot be told apart from the plain net is not worth its trouble.
        """
        if searched is uniform:
            score = self._score(searched.module, accuracy)
            self.say(f"fine-tuned, on validation data: {score:.2f} %; the search returned the uniform widths")
            return "searched"
        with on_device(searched.module, self.device), on_device(uniform.module, self.device):
            lead, error = paired_difference(searched.module, uniform.module, self.loaders.validation)
        kept = "searched" if lead > error else "uniform"
        shown = f"{self._score(uniform.module, accuracy):.2f} %, the searched one {lead:+.2f} points (+- {error:.2f})"
        self.say(f"fine-tuned, on validation data: the uniform net {shown}; the {kept} one is kept")
        return kept

    def _score(self, net: nn.Module, score_fn: Callable[[nn.Module, Any], float], batches: Any = None) -> float:
        with on_device(net, self.device):
            return score_fn(net, self.loaders.validation if batches is None else batches)

    def _figures(self, baseline: nn.Module, nets: Mapping[str, _Finalist], kept: str) -> dict[str, Any]:
        """Measure everything the result says. The only place that sees test data, once for each net."""
        space, seconds = self.space, self.folder.seconds()
        different = nets if nets["searched"] is not nets["uniform"] else {kept: nets[kept]}
        modules = {"baseline": baseline.cpu(), **{name: net.module for name, net in different.items()}}
        latency = measure_latency(modules, self.example)
        test = self.loaders.validation if self.loaders.test is None else self.loaders.test
        full = net_record(
            space, space.full(), latency=latency["baseline"], accuracy=self._score(baseline, accuracy, test)
        )
        records = {
            name: net_record(
                space,
                net.widths,
                latency=latency[name],
                accuracy=self._score(net.module, accuracy, test),
                before_finetune=self._score(net.before, accuracy, test),
            )
            for name, net in different.items()
        }
        return {
            "format": FORMAT,
            **self.names,
            "budget": _plain_budget(self.budget),
            "accuracy_on": "validation data" if self.loaders.test is None else "test data",
            "seed": self.config.seed,
            "versions": versions(),
            "hardware": hardware(),
            "baseline": full,
            "pruned": records[kept],
            **{name: records.get(name, records[kept]) for name in nets},
            "widths": dict(nets[kept].widths),
            **{f"{name}_widths": dict(net.widths) for name, net in nets.items()},
            "full_widths": dict(space.full()),
            "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
            "settings": self.config.as_dict(),
        }

    def _details(self, widths: Widths) -> dict[str, object]:
        shape = _shape_of(self.example) if isinstance(self.example, torch.Tensor) else None
        return {
            "model": self.names["model"],
            "input_shape": shape,
            "in_channels": shape and shape[0],
            "attributes": narrow_attributes(self.model, self.space, widths),
        }

    def _seed(self, stage: int) -> None:
        _seed(self.config, stage, self.loaders.train)


def _seed(config: PruneConfig, stage: int, train: DataLoader) -> None:
    """Start a stage from a random state that does not depend on what was before it."""
    torch.manual_seed(config.seed * 16 + stage)
    if train.generator is not None:
        train.generator.manual_seed(config.seed * 16 + stage)


def _plain_budget(budget: Budget) -> dict[str, int | str]:
    return {name: value for name, value in vars(budget).items() if value is not None}


def _shape_of(example: Inputs) -> Any:
    """Return the shape of one sample, or the shapes of all its tensors."""
    shapes = [tuple(tensor.shape[1:]) for tensor in tensors_in(example)]
    return shapes[0] if isinstance(example, torch.Tensor) else shapes


def _num_images(batches: Sequence[Any]) -> int:
    return sum(num_samples(batch[0]) for batch in batches)


def _batches(calibration: DataLoader | None, train: DataLoader) -> list[Any]:
    return list(itertools.islice(train, _CALIBRATION_BATCHES)) if calibration is None else list(calibration)


def _save_state(module: nn.Module, path: Path) -> None:
    from safetensors.torch import save

    # Tied tensors must not share memory in a safetensors file.
    write_bytes(path, save({name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}))


def _load_state(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(f"{path} is damaged; delete it and resume to make it again: {error}") from error
