"""One pass compared with extracted modules, run one by one: an oracle that knows nothing of masks or layouts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure
from torch.utils.flop_counter import FlopCounterMode

import psenet
from psenet.space import WidthSpace
from psenet.widths import Widths

Build = Callable[[], nn.Module]


def built(build: Build) -> nn.Module:
    """Build a network in float64 with every tensor random, so that no channel is dead and none like another."""
    model = build().double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=1):
                positive = name.endswith(("weight", "var", "gain", "original0"))
                tensor.copy_(torch.rand_like(tensor) * 0.5 + (0.75 if positive else -0.25))
    return model


def batch(size: int, *shape: int) -> torch.Tensor:
    return torch.randn((size, *(shape or (3, 8, 8))), dtype=torch.float64)


def supernet_of(build: Build, x: Any = None, **settings: Any) -> psenet.Supernet:
    model = built(build)
    space = psenet.trace(model, batch(2) if x is None else x, **{"divisor": 4, **settings})
    return psenet.Supernet(model, space)


def _part(x: Any, number: int, n: int) -> tuple[Any, ...]:
    """Return the arguments that subnet `number` of n gets, copied."""
    part = tree_map(lambda leaf: leaf[number::n].clone() if isinstance(leaf, torch.Tensor) else leaf, x)
    return part if isinstance(part, tuple) else (part,)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _places(supernet: psenet.Supernet, widths: Widths) -> dict[str, torch.Tensor]:
    """Return where the elements of each extracted parameter stand in the full one: extract their numbers."""
    numbered = psenet.Supernet(supernet.model, supernet.space)
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    return {name: number.detach().long().flatten() for name, number in numbered.extract(widths).named_parameters()}


def _gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _assert_close(ours: torch.Tensor, expected: torch.Tensor, *, floor: float, what: str) -> float:
    """Compare to 1e-9, relative to the largest number; return the relative error."""
    assert ours.shape == expected.shape, what
    error = (ours - expected).abs().max().item() / max(expected.abs().max().item(), floor)
    assert error <= 1e-9, f"{what}: relative error {error:.1e}"
    return error


def assert_equal_one_by_one(
    supernet: psenet.Supernet, x: Any, widths: list[Widths], *, training: bool, gradients: bool = True
) -> float:
    """Compare one pass with extracted modules: structure and values of outputs, and gradients of a weighted sum.

    Returns:
        The largest relative error.
    """
    n, errors = len(widths), [0.0]
    before = {name: tensor.clone() for name, tensor in supernet.train(training).state_dict().items()}
    together = supernet(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, x), widths)
    outputs = _tensors(together)
    weightings = [torch.randn(out.shape, dtype=torch.float64) for out in outputs]
    expected = {name: torch.zeros_like(full) for name, full in supernet.model.named_parameters() if full.requires_grad}
    for number, setting in enumerate(widths):
        module = supernet.extract(setting)
        alone = module(*_part(x, number, n))
        assert tree_structure(alone) == tree_structure(together)
        loss = torch.zeros((), dtype=torch.float64)
        for out, whole, weighting in zip(_tensors(alone), outputs, weightings, strict=True):
            errors.append(_assert_close(whole[number::n].detach(), out.detach(), floor=1e-6, what="outputs"))
            loss = loss + (out * weighting[number::n]).sum()
        if gradients:
            places = _places(supernet, setting)
            for name, gradient in _gradients(module, loss).items():
                expected[name].view(-1).index_add_(0, places[name], gradient.flatten())
    if gradients:
        loss = torch.stack([(out * weighting).sum() for out, weighting in zip(outputs, weightings, strict=True)]).sum()
        found = _gradients(supernet.model, loss)
        assert found.keys() == expected.keys()
        # A bias before a batch norm has no gradient but rounding.
        floor = 0.01 * max(gradient.abs().max().item() for gradient in expected.values())
        for name, gradient in found.items():
            errors.append(_assert_close(gradient, expected[name], floor=floor, what=f"gradient of {name}"))
    for name, tensor in supernet.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"
    return max(errors)


def settings_of(space: WidthSpace, *, seed: int = 0) -> list[list[Widths]]:
    """Return 1, 2 and 3 subnets; the two need the lowest ceiling only, the three the highest."""
    rng = np.random.default_rng(seed)
    return [
        [space.sample(rng)],
        [space.smallest(), space.sample(rng, space.uniform(0.5))],
        [space.sample(rng), space.full(), space.smallest()],
    ]


def assert_guarantee(
    supernet: psenet.Supernet, make: Callable[[int], Any] = batch, *, training: bool, gradients: bool = True
) -> None:
    for widths in settings_of(supernet.space):
        x = make(4 * len(widths))
        assert_equal_one_by_one(supernet, x, widths, training=training, gradients=gradients)


def _macs(module: nn.Module, x: Any) -> int:
    """Count the MACs of one of two samples: a norm may need two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*(x if isinstance(x, tuple) else (x,)))
    return counter.get_total_flops() // 4


def assert_costs(supernet: psenet.Supernet, x: Any = None) -> None:
    """Compare costs with what torch counts on the extracted modules."""
    space = supernet.space
    for widths in (space.full(), space.smallest(), space.uniform(0.6)):
        module = supernet.extract(widths)
        assert space.params(widths) == sum(parameter.numel() for parameter in module.parameters())
        assert space.macs(widths) == _macs(module, batch(2) if x is None else x)
