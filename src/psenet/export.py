"""Write a pruned module in the forms that other programs read: safetensors, torch.export and ONNX.

The module is captured once with `torch.export`; the ONNX file is converted from that capture. Both programs are run
against the module before their file appears, so a file that is there computes what the module computes. What cannot
be made is reported and takes nothing else with it.
"""

import copy
import io
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from psenet.artifact import Description, save_weights
from psenet.errors import InputError
from psenet.evaluate import eval_mode
from psenet.files import write_bytes
from psenet.inputs import as_arguments, tensors_in
from psenet.widths import Widths

PROGRAM_NAME = "model.pt2"
ONNX_NAME = "model.onnx"
MAX_RELATIVE_DIFFERENCE = 1e-3

# torch.export raises RuntimeErrors of its own (UserError, GuardOnDataDependentSymNode, ...), torch.onnx
# OnnxExporterError, which is one too; what remains is what a module's forward raises when it meets symbolic shapes.
_CAPTURE_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
# Beyond it onnxscript's converter hands over to another one that does not know every operator.
_NEWEST_CONVERTED_OPSET = 25
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")

_PLAIN = ("onnx_max_relative_difference", "onnx_opset", "batch_is_dynamic")

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What came out of `export_model`."""

    paths: Mapping[str, Path]
    """The files written, by file name."""
    bytes: Mapping[str, int]
    """Their sizes."""
    onnx_max_relative_difference: float | None
    """Largest difference between ONNX Runtime and the module, relative to the largest output; None if not compared."""
    onnx_opset: int | None
    """Opset of the ONNX file; None without one."""
    batch_is_dynamic: bool
    """Whether the programs take any batch size; if not, only that of the example."""
    problems: tuple[str, ...] = ()
    """What could not be made, and why."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, for a run's record."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {"bytes": dict(self.bytes), **plain, "problems": list(self.problems)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], folder: Path) -> "ExportReport":
        """Rebuild a report from `as_dict` and the folder of the files."""
        return cls(
            paths={name: folder / name for name in plain["bytes"]},
            bytes=dict(plain["bytes"]),
            problems=tuple(plain["problems"]),
            **{name: plain[name] for name in _PLAIN},
        )


@dataclass(frozen=True, kw_only=True)
class ExportChoice:
    """Which programs are made; the weights are always written."""

    torch_export: bool = True
    """model.pt2, for torch.export.load and torch's ahead-of-time compiler."""
    onnx: bool = True
    """model.onnx, for ONNX Runtime and converters."""


class _ExportError(Exception):
    """One program cannot be made, or is not what the module is."""


def export_model(
    module: nn.Module,
    example_input: torch.Tensor | Inputs,
    folder: str | Path,
    *,
    widths: Widths,
    details: Mapping[str, object] | None = None,
    choice: ExportChoice | None = None,
) -> ExportReport:
    """Write `weights.safetensors`, `widths.json`, `model.pt2` and `model.onnx` into a folder.

    The last two take any batch size where the module allows it. Programs of an earlier export are removed first, so
    that the folder never mixes two models.

    Args:
        module: The plain module; exported as it is in eval mode, for CPU. Unchanged afterwards.
        example_input: An input that the module takes, batch included, or a tuple of inputs.
        folder: Where to write; made if it is not there.
        widths: The channels it keeps.
        details: See `psenet.artifact.save_weights`. `input_shape` is taken from a single example input if not given.
        choice: Which of the programs to make; None for both.

    Returns:
        The files, and what could not be made.

    Raises:
        InputError: `folder` is not a folder, or the details are not valid.
    """
    folder = Path(folder)
    inputs = as_arguments(example_input)
    known = dict(details or {})
    if len(inputs) == 1 and known.get("input_shape") is None:
        known["input_shape"] = tuple(inputs[0].shape[1:])
    Description.from_details(widths, known)
    if folder.is_dir():
        for name in (PROGRAM_NAME, ONNX_NAME):
            (folder / name).unlink(missing_ok=True)
    written = list(save_weights(module, folder, widths=widths, details=known))
    with eval_mode(module), torch.no_grad(), _quiet():
        example = tuple(value.detach().cpu() for value in inputs)
        programs = _write_programs(_on_cpu(module), example, folder, choice or ExportChoice())
    written += programs.written
    return ExportReport(
        paths={path.name: path for path in written},
        bytes={path.name: path.stat().st_size for path in written},
        onnx_max_relative_difference=programs.onnx_max_relative_difference,
        onnx_opset=programs.onnx_opset,
        batch_is_dynamic=programs.batch_is_dynamic,
        problems=tuple(programs.problems),
    )


def onnx_content(module: nn.Module, example_input: torch.Tensor | Inputs) -> bytes:
    """Return the ONNX file of a module in eval mode, for any batch size where the module allows it.

    Args:
        module: On the CPU; unchanged afterwards.
        example_input: An input that the module takes, batch included, or a tuple of inputs.

    Raises:
        InputError: The module cannot be exported; the message says why.
    """
    inputs = as_arguments(example_input)
    if not all(isinstance(value, torch.Tensor) for value in inputs):
        raise InputError("an ONNX export takes inputs that are tensors, not dicts or lists of them")
    problems: list[str] = []
    with eval_mode(module), torch.no_grad(), _quiet():
        program, _ = _capture(module, inputs, problems)
        if program is None:
            raise InputError("; ".join(problems))
        try:
            return _convert(program)[0]
        except _ExportError as error:
            raise InputError(f"the module cannot be exported to ONNX: {error}") from error


@dataclass
class _Programs:
    """What has come of the programs so far."""

    written: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    batch_is_dynamic: bool = False
    onnx_max_relative_difference: float | None = None
    onnx_opset: int | None = None


def _write_programs(module: nn.Module, inputs: Inputs, folder: Path, choice: ExportChoice) -> _Programs:
    done = _Programs()
    if not (choice.torch_export or choice.onnx):
        return done
    program, done.batch_is_dynamic = _capture(module, inputs, done.problems)
    if program is None:
        return done
    tries = [inputs, _other_batch(inputs)] if done.batch_is_dynamic else [inputs]
    if choice.torch_export:
        try:
            content = _serialize(program, module, tries)
            write_bytes(folder / PROGRAM_NAME, content)
            done.written.append(folder / PROGRAM_NAME)
        except _ExportError as error:
            done.problems.append(f"{PROGRAM_NAME}: {error}")
    if not choice.onnx:
        return done
    try:
        content, opset = _convert(program)
        done.onnx_max_relative_difference = _onnx_difference(content, module, tries)
        _require_close(done.onnx_max_relative_difference)
        write_bytes(folder / ONNX_NAME, content)
        done.written.append(folder / ONNX_NAME)
        done.onnx_opset = opset
    except _ExportError as error:
        done.problems.append(f"{ONNX_NAME}: {error}")
    return done


# torch.export ---------------------------------------------------------------------------------------------------------


def _capture(module: nn.Module, inputs: Inputs, problems: list[str]) -> tuple[ExportedProgram | None, bool]:
    """Return the captured module and whether it takes any batch size; add to `problems` what went wrong."""
    if all(value.ndim > 0 and value.shape[0] == inputs[0].shape[0] for value in inputs):
        # A batch of one would be taken for a constant, and the example is stored in the file: two samples do.
        two = tuple(torch.cat([value, value])[:2] for value in inputs)
        batch = torch.export.Dim("batch")
        try:
            return _torch_export(module, two, tuple({0: batch} for _ in two)), True
        except _CAPTURE_ERRORS as error:
            reason = _reason(error)
    else:
        reason = "the inputs have no batch dimension in common"
    try:
        program = _torch_export(module, inputs, None)
    except _CAPTURE_ERRORS as error:
        problems.append(f"{PROGRAM_NAME} and {ONNX_NAME}: torch.export cannot capture the module: {_reason(error)}")
        return None, False
    sizes = sorted({value.shape[0] for value in inputs if value.ndim > 0})
    problems.append(f"the batch size is fixed at {', '.join(map(str, sizes))}, as in the example: {reason}")
    return program, False


def _torch_export(
    module: nn.Module, inputs: Inputs, dynamic_shapes: tuple[dict[int, Any], ...] | None
) -> ExportedProgram:
    # Where a module cannot be captured, torch prints the graph so far to stderr besides raising the error.
    with redirect_stderr(io.StringIO()):
        return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)


def _serialize(program: ExportedProgram, module: nn.Module, tries: Sequence[Inputs]) -> bytes:
    """Return the content of the torch.export file, after running what it loads as."""
    file = io.BytesIO()
    try:
        torch.export.save(program, file)
        content = file.getvalue()
        reloaded = torch.export.load(io.BytesIO(content)).module()
        differences = [_difference(tensors_in(reloaded(*inputs)), tensors_in(module(*inputs))) for inputs in tries]
    except _CAPTURE_ERRORS as error:
        raise _ExportError(_reason(error)) from error
    _require_close(float(np.max(differences)))
    return content


# ONNX -----------------------------------------------------------------------------------------------------------------


def _convert(program: ExportedProgram) -> tuple[bytes, int]:
    """Return the checked ONNX model as bytes, and its opset."""
    import onnx

    opset = _newest_opset()
    try:
        converted = torch.onnx.export(
            program, (), dynamo=True, verbose=False, external_data=False, opset_version=opset, optimize=True
        )
        if converted is None:
            raise _ExportError("torch.onnx gave no program")
        model = converted.model_proto
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(), opset
    except (*_CAPTURE_ERRORS, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _ExportError(_reason(error)) from error


def _onnx_difference(content: bytes, module: nn.Module, tries: Sequence[Inputs]) -> float:
    """Return the largest relative difference between ONNX Runtime and the module."""
    errors = _runtime_errors()
    try:
        session = onnx_session(content)
        names = [value.name for value in session.get_inputs()]
        differences = []
        for inputs in tries:
            feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
            outputs = [torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]
            differences.append(_difference(outputs, tensors_in(module(*inputs))))
    except (*_CAPTURE_ERRORS, *errors) as error:
        raise _ExportError(f"ONNX Runtime cannot run it: {_reason(error)}") from error
    return float(np.max(differences))


def _newest_opset() -> int:
    """Return the newest opset that onnx knows, torch's converter reaches and the installed ONNX Runtime runs."""
    import onnx
    from onnx import helper

    newest = min(onnx.defs.onnx_opset_version(), _NEWEST_CONVERTED_OPSET)
    value, result = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [value], [result])
    # 18 is the opset that torch's operators are written in.
    for opset in range(newest, 18, -1):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        try:
            onnx_session(model.SerializeToString())
        except _runtime_errors():
            continue
        return opset
    return 18


def onnx_session(content: bytes, *, on_cuda: int | None = None) -> Any:
    """Return a session of ONNX Runtime with as many threads as torch is set to.

    Args:
        content: The ONNX file.
        on_cuda: Number of the CUDA device to run on; None for the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that go on spinning after a run would slow down whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_cuda is not None:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": on_cuda}))
    return onnxruntime.InferenceSession(content, options, providers=providers)


def _runtime_errors() -> tuple[type[Exception], ...]:
    state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    # They have no common base but Exception.
    return (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)


# Comparing ------------------------------------------------------------------------------------------------------------


def _other_batch(inputs: Inputs) -> Inputs:
    """Return inputs of another batch size than the example's: one sample, or three different ones made of one."""
    if inputs[0].shape[0] > 1:
        return tuple(value[:1].clone() for value in inputs)
    return tuple(torch.cat([value, value.flip(-1), value.roll(1, -1)]) for value in inputs)


def _difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of any output, relative to the largest value of that output; NaN if undefined."""
    shapes = [tuple(value.shape) for value in ours], [tuple(value.shape) for value in theirs]
    if shapes[0] != shapes[1]:
        raise _ExportError(f"its outputs have shapes {shapes[0]}, the module's {shapes[1]}")
    worst = 0.0
    for value, reference in zip(ours, theirs, strict=True):
        if reference.numel() == 0:
            continue
        scale = reference.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        relative = float((value.double() - reference.double()).abs().max() / scale)
        worst = relative if not relative <= worst else worst
    return worst


def _require_close(difference: float) -> None:
    if not difference <= MAX_RELATIVE_DIFFERENCE:
        raise _ExportError(
            f"its outputs differ from the module's by {difference:.2g} of the largest; at most "
            f"{MAX_RELATIVE_DIFFERENCE:g} is accepted (NaN means outputs that are not finite)"
        )


# Surroundings ---------------------------------------------------------------------------------------------------------


def _on_cpu(module: nn.Module) -> nn.Module:
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return module
    return copy.deepcopy(module).cpu()


def _reason(error: BaseException) -> str:
    """Return the beginning of the message of the error that started it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(f"{type(error).__name__}: {error}", width=300, placeholder=" ...")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress and advice of the exporters off the terminal; what fails is in the report."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
