"""Open what a finished run has made: the baseline and the pruned net, ready to run.

The original model is rebuilt by the name that the recipe holds, so the run must be one of the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from psenet.artifact import load, read_description
from psenet.errors import InputError
from psenet.models import build_model, check_trusted
from psenet.rundir import read_json
from psenet.weights_file import read_weights

_PROBED_CLASSES = 2


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The nets of a run, in eval mode on the CPU, and what they take."""

    path: Path
    """The run directory."""
    model: str
    """The original model, as given to the command line."""
    input_shape: tuple[int, ...]
    """Shape of one sample, without the batch."""
    baseline: nn.Module
    pruned: nn.Module
    record: Mapping[str, Any]
    """The figures, as in `result.json`."""
    recipe: Mapping[str, Any]
    """What the run was asked to do, as in `recipe.json`."""


def load_run(path: str | Path, *, factory: str | None = None) -> FinishedRun:
    """Open a run directory that `psenet prune` has finished.

    Args:
        path: The run directory.
        factory: `my.module:factory`, as the run was started with. It is imported only if it is named here.

    Raises:
        InputError: There is no run, it is not finished, its files are damaged, or its model cannot be built here.
    """
    path = Path(path)
    if not (path / "recipe.json").is_file():
        raise InputError(f"{path} must be a run directory made by psenet prune; it holds no recipe.json")
    if not (path / "result.json").is_file():
        raise InputError(
            f"the run in {path} is not finished: it has no result.json; continue it with psenet prune ... --resume"
        )
    recipe = read_json(path / "recipe.json")
    record = read_json(path / "result.json", remedy=f"delete it and make it again: psenet export {path}")
    if not isinstance(record, dict):
        raise InputError(f"{path / 'result.json'} must hold the figures of a run; got a {type(record).__name__}")
    spec, shape = (recipe.get(name) if isinstance(recipe, dict) else None for name in ("model", "input_shape"))
    if not (isinstance(spec, str) and ":" in spec):
        raise InputError(
            f"the model of the run in {path} must have a name to be built by, such as timm:NAME or my.module:factory; "
            f"its recipe has {spec!r}"
        )
    check_trusted(spec, factory, f"the run in {path}")
    if not (isinstance(shape, list) and shape and all(isinstance(size, int) for size in shape)):
        raise InputError(f"the run in {path} must be of a model with one input; its recipe has the shapes {shape!r}")
    baseline = _baseline(spec, path / "stages" / "baseline.safetensors", in_channels=shape[0])
    return FinishedRun(
        path=path,
        model=spec,
        input_shape=tuple(shape),
        pruned=load(path, lambda: baseline).eval(),
        baseline=baseline.eval(),
        record=record,
        recipe=recipe,
    )


def load_rival(run: FinishedRun) -> tuple[str, nn.Module] | None:
    """Return the net that the run fine-tuned beside its pruned one and did not keep.

    Returns:
        `"uniform"` or `"searched"`, and the net in eval mode on the CPU; None where the search found the uniform widths
        itself, where the run did not keep the net, and where rebuilding it takes a trace (a model with numbers of its
        own that count channels).

    Raises:
        InputError: The net's weights are damaged or of another model.
    """
    kept = run.record.get("search", {}).get("kept")
    name = {"searched": "uniform", "uniform": "searched"}.get(kept)
    weights = run.path / "stages" / f"{name}.safetensors"
    if name is None or not weights.is_file() or read_description(run.path).attributes:
        return None
    return name, load(weights, lambda: run.baseline).eval()


def _baseline(spec: str, weights: Path, *, in_channels: int) -> nn.Module:
    """Return the original model with its trained weights.

    The recipe does not hold the number of classes; the weights do, where a model of another number differs from them.
    """
    state, _ = read_weights(weights, advice="delete it, and result.json, and resume the run to make them again")
    model = build_model(spec, num_classes=_PROBED_CLASSES, in_channels=in_channels)
    classes = {len(state[name]) for name, tensor in model.state_dict().items() if _differs(state.get(name), tensor)}
    if len(classes) == 1:
        model = build_model(spec, num_classes=classes.pop(), in_channels=in_channels)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{spec} does not build the model that this run pruned: {error}") from error
    return model


def _differs(saved: torch.Tensor | None, built: torch.Tensor) -> bool:
    return saved is not None and saved.ndim > 0 and saved.ndim == built.ndim and len(saved) != len(built)
