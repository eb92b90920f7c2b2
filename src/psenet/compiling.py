"""Compile a module's forward, and use the compiled one only where it gives what the plain one gives."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from psenet.errors import first_line
from psenet.inputs import map_tensors, tensors_in

BACKEND = "inductor"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference of outputs and gradients, relative to the largest of them; other types: `COARSE`."""
COARSE = 3e-2


class CheckedForward:
    """A module's forward on given tensors, compiled for the shapes of its first call.

    The first call runs both ways and compares outputs and gradients. Where they differ, where compiling fails or where
    the module draws random numbers (which a compiler draws otherwise), a warning says so and the plain forward stays.
    Calls with other shapes (a short last batch) run it, too.

    Args:
        module: Holds no weights of its own that matter: they come with each call.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled = torch.compile(self._plain, dynamic=False, backend=BACKEND)
        self._shapes: object = None
        self._is_trusted = False

    def __call__(self, tensors: Mapping[str, torch.Tensor], arguments: Sequence[Any]) -> Any:
        """Return the module's outputs.

        Args:
            tensors: Its parameters and buffers by name.
            arguments: Its positional arguments.
        """
        given = [*tensors.values(), *tensors_in(arguments)]
        shapes = (self._module.training, torch.is_grad_enabled(), [tensor.shape for tensor in given])
        if self._shapes is None:
            self._shapes = shapes
            self._check(tensors, arguments)
        if self._is_trusted and shapes == self._shapes:
            return self._compiled(tensors, arguments)
        return self._plain(tensors, arguments)

    def _plain(self, tensors: Mapping[str, torch.Tensor], arguments: Sequence[Any]) -> Any:
        # Each tied name comes with its tensor.
        return functional_call(self._module, dict(tensors), tuple(arguments), tie_weights=False)

    def _check(self, tensors: Mapping[str, torch.Tensor], arguments: Sequence[Any]) -> None:
        plain = self._results(self._plain, tensors, arguments)
        if _difference(plain, self._results(self._plain, tensors, arguments, seed=1)) > 0:
            self._warn("it draws random numbers, so that the two ways cannot be compared")
            return
        try:
            compiled = self._results(self._compiled, tensors, arguments)
        except Exception as error:  # a compiler may raise anything
            self._warn(f"compiling fails ({first_line(getattr(error, 'inner_exception', error))})")
            return
        difference = _difference(plain, compiled)
        tolerance = max(TOLERANCE.get(tensor.dtype, COARSE) for tensor in plain)
        self._is_trusted = difference <= tolerance
        if not self._is_trusted:
            self._warn(f"compiled, it gives something else (relative difference {difference:.1e})")

    def _results(
        self, run: Any, tensors: Mapping[str, torch.Tensor], arguments: Sequence[Any], *, seed: int = 0
    ) -> list[torch.Tensor]:
        """Return outputs and gradients; nothing that was given changes."""
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        learned = [own[name].requires_grad_() for name, tensor in tensors.items() if tensor.requires_grad]
        x = next(iter(tensors_in(arguments)))
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            outputs = tensors_in(run(own, map_tensors(torch.clone, arguments)))
        floating = [out for out in outputs if out.is_floating_point()]
        if not torch.is_grad_enabled() or not learned:
            return floating
        # An uneven weighting: that of a plain sum would have no gradient behind a norm.
        loss = torch.stack([(out * _ramp(out)).sum() for out in floating]).sum()
        gradients = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        return [*(out.detach() for out in floating), *gradients]

    def _warn(self, what: str) -> None:
        warnings.warn(f"this pass is not compiled: {what}", RuntimeWarning, stacklevel=3)


def _ramp(out: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape).to(out)


def _difference(ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value; infinite where one of them is not finite."""
    scale = max(float(tensor.abs().max()) for tensor in ours if tensor.numel())
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, others, strict=True) if a.numel())
    return worst / max(scale, 1e-12) if worst < float("inf") else float("inf")
