"""Where the samples stand in what the norms of a model take: found out by running it."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from psenet.evaluate import eval_mode
from psenet.inputs import Inputs, as_arguments, map_tensors
from psenet.slicing import run_on_copied_buffers


def norms_in_order(model: nn.Module, inputs: Inputs) -> set[str]:
    """Return the batch norms whose input has on axis 0 all rows of the first sample, then all of the second, and so on.

    Only one of two samples is changed: then the rows of the other must stay, in every call.

    Args:
        model: Run twice in eval mode; it does not change.
        inputs: An example.
    """
    generator = torch.Generator().manual_seed(0)

    def pair(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:1], tensor[:1]])

    def with_another_second(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return pair(tensor)
        noise = torch.randn(tensor[:1].shape, generator=generator, dtype=torch.float32).to(tensor)
        return torch.cat([tensor[:1], tensor[:1] + noise * (tensor.std() + 1)])

    one, other = (_norm_inputs(model, map_tensors(change, inputs)) for change in (pair, with_another_second))
    return {
        path
        for path, calls in one.items()
        if all(_only_second_half_differs(a, b) for a, b in zip(calls, other.get(path, []), strict=True))
    }


def _norm_inputs(model: nn.Module, inputs: Inputs) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(path, []).append((*args, *kwargs.values())[0].detach().clone())

    hooks = [
        module.register_forward_pre_hook(
            lambda _module, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
        )
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        with eval_mode(model), torch.no_grad(), torch.random.fork_rng():
            run_on_copied_buffers(model, as_arguments(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _only_second_half_differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.shape[0] % 2:
        return False
    first, second = (a != b).flatten(1).any(1).chunk(2)
    return not bool(first.any()) and bool(second.any())
