"""Which nets of finished runs are compared with which, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from psenet.comparison import Comparison, SampledDifferences, compare_answers, sampled_differences
from psenet.devices import on_device
from psenet.errors import InputError
from psenet.finished import FinishedRun, load_rival, load_run
from psenet.heldout import answers
from psenet.progress import progress_bar
from psenet.training.loop import make_accelerator

ERROR = 0.05
"""Chance that any of the intervals of a contest misses the true difference."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net of a run, and what to call it."""

    name: str
    module: nn.Module
    macs: int | None
    """MACs for one image, as the run says; None where it does not."""
    run: int
    """Which run it is of, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two nets that are compared, and what came of it."""

    first: str
    second: str
    comparison: Comparison
    sampled: SampledDifferences


def open_runs(paths: Sequence[Path], factory: str | None) -> list[FinishedRun]:
    """Open the run directories.

    Raises:
        InputError: One is given twice, or is no finished run.
    """
    real = [path.resolve() for path in paths]
    twice = [str(path) for number, path in enumerate(paths) if real[number] in real[:number]]
    if twice:
        raise InputError(f"a run cannot be compared with itself; given twice: {', '.join(twice)}")
    return [load_run(path, factory=factory) for path in paths]


def nets_of(runs: Sequence[FinishedRun]) -> tuple[list[Net], list[tuple[str, str]]]:
    """Return the nets to compare, and the pairs of their names.

    Of one run: its baseline, its pruned net, and the one that it did not keep. Of several: the pruned nets, each with
    every other, and each with the baseline of its run; runs whose baselines have the same weights share it.
    """
    if len(runs) == 1:
        return _nets_of_one(runs[0])
    labels = run_labels([run.path for run in runs])
    holders = [next(one for one in range(len(runs)) if _same_baseline(runs[one], run)) for run in runs]
    is_shared = len(set(holders)) == 1
    baselines = ["baseline" if is_shared else f"baseline of {labels[holder]}" for holder in holders]
    pruned = [f"pruned of {label}" for label in labels]
    nets = [
        Net(name=baselines[one], module=runs[one].baseline, macs=_macs(runs[one], "baseline"), run=one)
        for one in dict.fromkeys(holders)
    ]
    nets += [
        Net(name=name, module=run.pruned, macs=_macs(run, "pruned"), run=one)
        for one, (name, run) in enumerate(zip(pruned, runs, strict=True))
    ]
    pairs = [(pruned[one], pruned[other]) for other in range(len(runs)) for one in range(other + 1, len(runs))]
    return nets, [*pairs, *zip(pruned, baselines, strict=True)]


def _nets_of_one(run: FinishedRun) -> tuple[list[Net], list[tuple[str, str]]]:
    rival = load_rival(run)
    modules = {"baseline": run.baseline, "pruned": run.pruned} | ({} if rival is None else dict([rival]))
    nets = [Net(name=name, module=module, macs=_macs(run, name), run=0) for name, module in modules.items()]
    pairs = [("pruned", "baseline")]
    return nets, pairs if rival is None else [*pairs, ("pruned", rival[0]), (rival[0], "baseline")]


def run_labels(paths: Sequence[Path]) -> list[str]:
    """Return what to call runs: their folders' names where these differ, else the paths as given."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _same_baseline(run: FinishedRun, other: FinishedRun) -> bool:
    if (run.model, run.input_shape) != (other.model, other.input_shape):
        return False
    ours, others = run.baseline.state_dict(), other.baseline.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def _macs(run: FinishedRun, name: str) -> int | None:
    return run.record.get(name, {}).get("macs")


def answers_of(nets: Sequence[Net], images: Sequence[Any], *, show_progress: bool) -> dict[str, np.ndarray]:
    """Return by name which images each net gets right; each net runs once over all images.

    Args:
        nets: The nets.
        images: A data set for each run; see `psenet.heldout.HeldOut`.
        show_progress: Whether to show a progress bar.
    """
    device = make_accelerator().device
    right: dict[str, np.ndarray] = {}
    with progress_bar("nets", total=len(nets), show=show_progress) as advance:
        for number, net in enumerate(nets):
            with on_device(net.module, device):
                right[net.name] = answers(net.module, images[net.run], name=net.name)
            advance(number + 1, net.name)
    return right


def compared(
    names: Sequence[tuple[str, str]], right: dict[str, np.ndarray], samples: np.ndarray, *, seed: int
) -> list[Pair]:
    """Compare the pairs; they share the error of 5 % among them (Bonferroni), so that more pairs find no more by luck.

    Args:
        names: The pairs, by the names of their nets.
        right: By name, which images a net gets right.
        samples: Image numbers; see `psenet.comparison.draw_samples`.
        seed: Of the intervals.
    """
    confidence = 1 - ERROR / len(names)
    return [
        Pair(
            first=first,
            second=second,
            comparison=compare_answers(right[first], right[second], confidence=confidence, seed=seed),
            sampled=sampled_differences(right[first], right[second], samples),
        )
        for first, second in names
    ]
