"""How a module runs when its time is taken: by which engine, where, with how many threads, on what batch."""

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psenet.errors import InputError, first_line
from psenet.evaluate import eval_mode
from psenet.export import onnx_content, onnx_session
from psenet.inputs import Inputs, as_arguments, map_tensors

ENGINES = ("eager", "compile", "onnxruntime")
BACKEND = "inductor"
"""What compiles the module for the engine `compile`."""

Pass = Callable[[], Any]
"""Runs one forward pass and returns what the engine gives."""


def _is_device(name: str) -> bool:
    try:
        return torch.device(name).type in ("cpu", "cuda")
    except RuntimeError:
        return False


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What runs a module whose latency is measured.

    Raises:
        InputError: A field is out of range; all offenders are named. Whether the device is there is asked when a
            module is prepared, so that a runner of another machine can be named here.

    Example:
        >>> Runner(engine="onnxruntime", num_threads=2)
        Runner(engine='onnxruntime', device='cpu', num_threads=2, batch_size=1)
    """

    engine: str = "eager"
    """`eager` (the module as it is), `compile` (torch.compile of a copy) or `onnxruntime` (its export)."""
    device: str = "cpu"
    """`cpu`, or a CUDA device such as `cuda` or `cuda:1`."""
    num_threads: int | None = None
    """CPU threads of one pass; None for what torch is set to."""
    batch_size: int = 1
    """Samples in one pass; the time is that of the whole pass."""

    def __post_init__(self) -> None:
        problems = []
        if self.engine not in ENGINES:
            problems.append(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}")
        if not _is_device(self.device):
            problems.append(f"device must be 'cpu' or a CUDA device; got {self.device!r}")
        if self.num_threads is not None and self.num_threads < 1:
            problems.append(f"num_threads must be at least 1; got {self.num_threads}")
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1; got {self.batch_size}")
        if problems:
            raise InputError("; ".join(problems))

    @property
    def place(self) -> torch.device:
        """Where the module itself must be: the device, or the CPU where only an export of it runs."""
        return torch.device("cpu") if self.engine == "onnxruntime" else self._device()

    def check(self) -> None:
        """Make sure that this machine has the device.

        Raises:
            InputError: It has not; what there is is named.
        """
        if not self.device.startswith("cuda"):
            return
        if self.engine == "onnxruntime":
            _require_cuda_provider()
        elif (self._device().index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"device {self.device!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices; "
                "use 'cpu'"
            )

    @contextmanager
    def prepare(self, module: nn.Module, example_input: Inputs) -> Iterator[Pass]:
        """Make ready what runs one forward pass of a module, in eval mode and without gradients.

        Threads and training flags are put back afterwards. Several modules may be ready at once.

        Args:
            module: On `place`; not changed.
            example_input: Its input, shape (B, ...), or a tuple of its arguments; the first sample is repeated.

        Yields:
            A function that runs the pass. It has run once already where that compiles the module.

        Raises:
            InputError: The device is not there, the module is elsewhere, or it cannot be compiled or exported.
        """
        self.check()
        _check_place(module, self.place)
        arguments = as_arguments(map_tensors(self._batch, example_input))
        with ExitStack() as stack:
            stack.enter_context(_threads(self.num_threads))
            stack.enter_context(eval_mode(module))
            if self.engine == "eager":
                yield _without_gradients(module, arguments)
            elif self.engine == "compile":
                yield _compiled(module, arguments)
            else:
                yield _exported(module, arguments, self._device())

    def _device(self) -> torch.device:
        device = torch.device(self.device)
        if device == torch.device("cuda") and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def _batch(self, tensor: torch.Tensor) -> torch.Tensor:
        samples = tensor[:1].expand(self.batch_size, *tensor.shape[1:]) if tensor.ndim else tensor
        return samples.contiguous().to(self.place)


EAGER = Runner()
"""The module as it is, on the CPU, one sample, with torch's threads."""


def _check_place(module: nn.Module, place: torch.device) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    elsewhere = sorted({str(tensor.device) for tensor in tensors if tensor.device != place})
    if elsewhere:
        raise InputError(f"the module must be on {place}; it is on {', '.join(elsewhere)}: move it first")


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _without_gradients(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Pass:
    # Entered in every pass, which takes about a microsecond: between the passes others may build modules.
    def one_pass() -> Any:
        with torch.inference_mode():
            return run(*arguments)

    return one_pass


def _compiled(module: nn.Module, arguments: tuple[Any, ...]) -> Pass:
    inner = copy.deepcopy(module)

    def forward(*inputs: Any) -> Any:
        return inner(*inputs)

    # torch counts recompilations by code object and gives up in silence after a few; so each module has its own.
    own = types.FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    one_pass = _without_gradients(torch.compile(own, backend=BACKEND, dynamic=False, fullgraph=True), arguments)
    try:
        one_pass()
    except Exception as error:  # a compiler may raise anything
        reason = first_line(getattr(error, "inner_exception", error))
        raise InputError(f"torch.compile cannot compile the module ({reason}); use another engine") from error
    return one_pass


# ONNX Runtime ---------------------------------------------------------------------------------------------------------


def _exported(module: nn.Module, arguments: tuple[Any, ...], device: torch.device) -> Pass:
    """Return a pass of the module's ONNX export whose inputs and outputs stay on the device."""
    import onnxruntime

    on_cuda = (device.index or 0) if device.type == "cuda" else None
    session = onnx_session(onnx_content(module, arguments), on_cuda=on_cuda)
    if on_cuda is not None and "CUDAExecutionProvider" not in session.get_providers():
        raise InputError("ONNX Runtime could not start its CUDAExecutionProvider: its CUDA libraries do not load")
    place = (device.type, on_cuda or 0)
    binding = session.io_binding()
    for value, tensor in zip(session.get_inputs(), arguments, strict=True):
        binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), *place))
    for value in session.get_outputs():
        binding.bind_output(value.name, *place)

    def one_pass() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    return one_pass


def _require_cuda_provider() -> None:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise InputError(
            f"ONNX Runtime on a CUDA device needs its CUDAExecutionProvider; this installation has "
            f"{', '.join(providers)}: install onnxruntime-gpu, or use the device 'cpu'"
        )
