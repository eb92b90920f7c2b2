"""Compiled forwards, with the compiler's own backend for tests: what is traced is run without generating code."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import psenet
from oldest import differs
from psenet.compiling import CheckedForward
from psenet.slicing import state_of


@pytest.fixture(autouse=True)
def without_code_generation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psenet.compiling.BACKEND", "eager")
    torch._dynamo.reset()


def _net(middle: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    inner = [nn.BatchNorm2d(16), nn.ReLU(), middle or nn.Identity()]
    return nn.Sequential(nn.Conv2d(3, 16, 3), *inner, nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _assert_runs_as_plain(forward: CheckedForward, net: nn.Module, x: torch.Tensor) -> None:
    expected = net(x)
    torch.testing.assert_close(forward(state_of(net), (x,)), expected)


def test_a_compiled_forward_gives_outputs_and_gradients_of_the_plain_one():
    net, x = _net().eval(), torch.randn(4, 3, 8, 8)
    forward = CheckedForward(net)
    _assert_runs_as_plain(forward, net, x)
    assert forward._is_trusted
    net(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    forward(state_of(net), (x,)).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_the_compiled_forward_is_what_runs_and_only_for_the_shapes_of_the_first_call():
    net, x = _net().eval(), torch.randn(4, 3, 8, 8)
    forward = CheckedForward(net)
    _assert_runs_as_plain(forward, net, x)
    shapes: list[torch.Size] = []
    compiled = forward._compiled

    def counted(tensors: Any, arguments: Any) -> Any:
        shapes.append(arguments[0].shape)
        return compiled(tensors, arguments)

    forward._compiled = counted  # pyright: ignore[reportAttributeAccessIssue]
    for size in (4, 3, 4):
        _assert_runs_as_plain(forward, net, torch.randn(size, 3, 8, 8))
    assert shapes == [x.shape, x.shape]


def test_the_comparison_changes_neither_weights_nor_statistics_nor_random_numbers():
    net, x = _net().train(), torch.randn(4, 3, 8, 8)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    forward = CheckedForward(net)
    torch.manual_seed(5)
    forward._check(state_of(net), (x,))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


class _Otherwise(nn.Module):
    """Gives something else when it is compiled."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(x) if torch.compiler.is_compiling() else x


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
        return x.clone()

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
        return 2 * grads[0]


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (_Otherwise(lambda x: x + 0.1), "compiled, it gives something else"),
        pytest.param(
            _Otherwise(_WrongGradient.apply),  # pyright: ignore[reportArgumentType]
            "compiled, it gives something else",
            marks=differs("a function's own gradient does not depend on whether it is compiled"),
        ),
        (_Otherwise(lambda x: x / (x * 0)), "compiled, it gives something else .relative difference inf"),
        (nn.Dropout(0.5), "it draws random numbers"),
    ],
    ids=["outputs", "gradients", "not finite", "random"],
)
def test_a_forward_that_cannot_be_trusted_stays_plain_with_one_warning(middle: nn.Module, message: str):
    net, x = _net(middle).train(), torch.randn(4, 3, 8, 8)
    forward = CheckedForward(net)
    with pytest.warns(RuntimeWarning, match=f"this pass is not compiled: {message}"):
        forward(state_of(net), (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(2)
        ours = forward(state_of(net), (x,))
    torch.manual_seed(2)
    torch.testing.assert_close(ours, net(x))


def test_a_compiler_that_fails_leaves_the_plain_forward(monkeypatch: pytest.MonkeyPatch):
    def fail(_graph: object, _inputs: object) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr("psenet.compiling.BACKEND", fail)
    net, x = _net().eval(), torch.randn(4, 3, 8, 8)
    forward = CheckedForward(net)
    with pytest.warns(RuntimeWarning, match=r"this pass is not compiled: compiling fails \(.*no such kernel"):
        _assert_runs_as_plain(forward, net, x)
    _assert_runs_as_plain(forward, net, x)


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_supernet_gives_what_a_plain_one_gives(training: bool):
    net, x, rng = _net(), torch.randn(9, 3, 8, 8), np.random.default_rng(0)
    space = psenet.trace(net, x, divisor=4)
    plain = psenet.Supernet(net, space).train(training)
    compiled = psenet.Supernet(net, space, compiled=True).train(training)
    for number in (3, 3, 4):  # the last: blocks of different sizes, which the first call did not have
        widths = [space.full(), *(space.sample(rng) for _ in range(number - 1))]
        results = []
        for supernet in (plain, compiled):
            supernet.zero_grad()
            y = supernet(x, widths)
            (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
            results.append([y.detach(), *(parameter.grad for parameter in supernet.parameters())])
        for ours, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert [skeleton._forward._is_trusted for skeleton in compiled._skeletons.values()] == [True]  # pyright: ignore
