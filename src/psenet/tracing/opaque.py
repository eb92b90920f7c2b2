"""Modules that the user declares opaque: their inside is not read, and nothing that they touch varies.

While the model is exported, such a module is one call of the op `psenet::opaque`, which stands for whatever it does:
control flow that depends on data, ops that cannot be exported, python code with side effects.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from psenet.errors import InputError
from psenet.inputs import Inputs, as_arguments, map_tensors, num_samples, tensors_in
from psenet.tracing.call import Call
from psenet.tracing.facts import NO_CHANNEL, MaskNeed, Value
from psenet.tracing.rules.registry import rule

_COUNTED = ("aten.convolution", "aten.addmm", "aten.mm")


@dataclass
class _Opaque:
    """One opaque module, and what it gave in each call of a real forward."""

    path: str
    norms: dict[str, int]
    """Its batch norms: path and number of features."""
    macs: list[int] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    calls: int = 0
    """Calls exported so far."""


_OPEN: list[_Opaque] = []
"""The modules of the export that is going on; the op names them by their number."""


@torch.library.custom_op("psenet::opaque", mutates_args=())
def _opaque(inputs: list[torch.Tensor], number: int, call: int) -> list[torch.Tensor]:
    raise RuntimeError("psenet::opaque stands for a module in an exported graph and cannot be run")


@_opaque.register_fake
def _(inputs: list[torch.Tensor], number: int, call: int) -> list[torch.Tensor]:
    # Fresh tensors each time; the recorded ones only lend their shapes.
    return [
        inputs[0].new_empty(tuple(tensor.shape), dtype=tensor.dtype)
        for tensor in tensors_in(_OPEN[number].outputs[call])
    ]


@rule("psenet.opaque.default")
def opaque(call: Call) -> tuple[Value, ...]:
    """Freeze what goes in and what comes out, and keep the norms inside per subnet."""
    module = _OPEN[call["number"]]
    call.freeze_inputs("goes into an opaque module")
    for path, size in module.norms.items():
        call.reading.masks.append(MaskNeed(path, np.full(size, NO_CHANNEL, np.int64), 1, "norm"))
    values = []
    for number, (shape, itemsize) in enumerate(call.results()):
        ids = np.full([1] * len(shape), NO_CHANNEL, np.int64)
        if len(shape) > 1:
            made = call.fresh(shape[1])
            call.freeze(made, "comes out of an opaque module")
            ids = made.reshape([size if axis == 1 else 1 for axis, size in enumerate(shape)])
            if number == 0:
                call.count_macs(module.macs[call["call"]], None, None, made)
        values.append(Value(ids, shape, False, itemsize))
    return tuple(values)


@contextmanager
def opaque_modules(model: nn.Module, paths: Sequence[str], inputs: Inputs) -> Iterator[set[str]]:
    """Make modules of a copy of the user's model opaque while it is exported and read.

    Args:
        model: The copy; its modules' forwards are replaced for the time of the context.
        paths: The modules.
        inputs: What the model takes, for one real run.

    Yields:
        Those of the modules that the model runs.

    Raises:
        InputError: A module gets or gives no tensor.
    """
    found = [_Opaque(path, _norms(model.get_submodule(path), path)) for path in paths]
    _OPEN.extend(found)
    try:
        for item in found:
            _record(model, item, inputs)
        for item in found:
            if item.outputs:
                vars(model.get_submodule(item.path))["forward"] = _standing_for(item)
        yield {item.path for item in found if item.outputs}
    finally:
        for item in found:
            vars(model.get_submodule(item.path)).pop("forward", None)
            _OPEN.remove(item)


def _record(model: nn.Module, item: _Opaque, inputs: Inputs) -> None:
    """Run the model once and note what the module gives."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton where it is installed

    module = model.get_submodule(item.path)
    counter = FlopCounterMode(display=False)

    def start(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not tensors_in((args, kwargs)):
            raise InputError(f"opaque: {item.path} gets no tensor")
        counter.__enter__()

    def stop(_module: nn.Module, _args: tuple, outputs: Any) -> None:
        counter.__exit__(None, None, None)
        if not tensors_in(outputs):
            raise InputError(f"opaque: {item.path} gives no tensor")
        flops = counter.get_flop_counts().get("Global", {})
        item.macs.append(sum(count for op, count in flops.items() if str(op) in _COUNTED) // 2 // num_samples(inputs))
        item.outputs.append(map_tensors(torch.detach, outputs))

    hooks = [module.register_forward_pre_hook(start, with_kwargs=True), module.register_forward_hook(stop)]
    try:
        with torch.no_grad():
            model(*as_arguments(map_tensors(torch.clone, inputs)))
    finally:
        for hook in hooks:
            hook.remove()


def _standing_for(item: _Opaque) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        call, item.calls = min(item.calls, len(item.outputs) - 1), item.calls + 1
        leaves, form = tree_flatten(item.outputs[call])
        results = iter(torch.ops.psenet.opaque(tensors_in((args, kwargs)), _OPEN.index(item), call))
        return tree_unflatten([next(results) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], form)

    return forward


def _norms(module: nn.Module, path: str) -> dict[str, int]:
    return {
        f"{path}.{name}" if name else path: part.num_features
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm)
    }
