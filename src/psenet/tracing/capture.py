"""A model's graph by `torch.export`, what runs in its forward, and the line of the user's code where that fails."""

import io
import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from psenet.errors import InputError, first_line
from psenet.inputs import Inputs, as_arguments, map_tensors, tensors_in
from psenet.slicing import run_on_copied_buffers

_TORCH = f"{Path(torch.__file__).parent}/"


def what_runs(model: nn.Module, inputs: Inputs) -> list[str]:
    """Run the model once, changing neither it nor the inputs nor the random state.

    Returns:
        The modules and functions that run, in order, and the number of outputs.

    Raises:
        InputError: The forward fails, or an output has no samples.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(), _noting(model) as calls:
            copies = map_tensors(torch.clone, inputs)  # the user's forward may change its input in place
            outputs = run_on_copied_buffers(model, as_arguments(copies))
    except Exception as error:  # the user's forward may raise anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))
        raise InputError(f"the model refuses an input of shape {shapes}: {type(error).__name__}: {error}") from error
    shapes = [tuple(tensor.shape) for tensor in tensors_in(outputs)]
    if () in shapes:
        raise InputError(f"every output must have the samples on axis 0; the outputs have shapes {shapes}")
    return [*calls, f"{len(shapes)} outputs"]


def capture(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Return the model's graph.

    Raises:
        InputError: torch.export cannot read the model; the message has the line of the user's code.
    """
    # Where a module cannot be captured, torch prints the graph so far to stderr besides raising the error.
    try:
        with redirect_stderr(io.StringIO()):
            return torch.export.export(model, as_arguments(inputs), strict=False)
    except Exception as error:  # torch.export raises many private types
        mode = " in training mode" if model.training else ""
        place, path = _place_in_model(error, model)
        way_out = f"opaque=[{path!r}]" if path else "opaque=[...], naming the module that does it"
        raise InputError(
            f"the model cannot be traced{mode}{place}: {first_line(error)}. What it does there depends on the data or "
            f"is unknown to torch.export: rewrite it, or leave that module as it is with {way_out}"
        ) from error


class _Functions(TorchFunctionMode):
    """Notes the torch functions that are called on floating-point tensors (norms count their steps in training)."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if not isinstance(first, torch.Tensor) or first.is_floating_point():
            self._calls.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@contextmanager
def _noting(model: nn.Module) -> Iterator[list[str]]:
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: calls.append(path))
        for path, module in model.named_modules()
    ]
    try:
        with _Functions(calls):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _place_in_model(error: BaseException, model: nn.Module) -> tuple[str, str]:
    """Return the line of the user's code where tracing failed, and the innermost module that it belongs to."""
    paths = {id(module): path for path, module in model.named_modules()}
    place, innermost = "", ""
    cause: BaseException | None = error
    while cause is not None and not place:
        for frame, line in traceback.walk_tb(cause.__traceback__):
            file = frame.f_code.co_filename
            first = frame.f_code.co_varnames[:1]  # self, by whatever name
            owner = paths.get(id(frame.f_locals.get(first[0]))) if first else None
            if owner is None or file.startswith(_TORCH):
                continue
            code = linecache.getline(file, line).strip()
            place = f" at {file}:{line} (`{code}`" + (f", in {owner})" if owner else ")")
            innermost = owner
        cause = cause.__cause__ or cause.__context__
    return place, innermost
