import copy

import numpy as np
import pytest
import torch
from torch import nn

import psenet
from architectures import ARCHITECTURES, Architecture, timm_architecture, traced
from psenet.errors import InputError
from psenet.importance import channel_importance, order_channels


def _net() -> nn.Module:
    """A net with one residual group, one inner group and a flatten."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.inner, self.back = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
            self.head = nn.Linear(6 * 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.stem(x))
            return self.head((x + self.back(self.inner(x).relu())).flatten(1))

    return Architecture(Net, (3, 2, 2)).model()


def test_the_importance_is_the_mean_of_relative_norms_over_the_layers_of_a_group():
    model = _net()
    importance = channel_importance(model, psenet.trace(model, torch.zeros(1, 3, 2, 2).double(), divisor=1))

    def relative(norms: list[float]) -> np.ndarray:
        return np.array(norms) / (sum(norms) / len(norms))

    weight = {name: parameter.detach() for name, parameter in model.named_parameters()}
    residual = [
        relative([weight["stem.weight"][unit].norm().item() for unit in range(6)]),
        relative([abs(weight["norm.weight"][unit].item()) for unit in range(6)]),
        relative([weight["inner.weight"][:, unit].norm().item() for unit in range(6)]),
        relative([weight["back.weight"][unit].norm().item() for unit in range(6)]),
        relative([weight["head.weight"][:, 4 * unit : 4 * unit + 4].norm().item() for unit in range(6)]),
    ]
    inner = [
        relative([weight["inner.weight"][unit].norm().item() for unit in range(4)]),
        relative([weight["back.weight"][:, unit].norm().item() for unit in range(4)]),
    ]
    assert list(importance) == ["stem", "inner"]
    np.testing.assert_allclose(importance["stem"], sum(residual) / 5, rtol=1e-12)
    np.testing.assert_allclose(importance["inner"], sum(inner) / 2, rtol=1e-12)


def test_ordering_puts_the_most_important_units_first_and_leaves_the_model_alone():
    model = _net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    space = psenet.trace(model, torch.zeros(1, 3, 2, 2).double(), divisor=1)
    importance = channel_importance(model, space)
    ordered = order_channels(model, space)
    assert any((np.diff(scores) > 0).any() for scores in importance.values())
    for name, scores in channel_importance(ordered, space).items():
        np.testing.assert_allclose(scores, np.sort(importance[name])[::-1], rtol=1e-12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_scale_of_zero_everywhere_and_equal_units_keep_the_order():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.get_parameter("weight").fill_(1.0)
        model[1].get_parameter("weight").zero_()
        model[0].get_parameter("bias").copy_(torch.arange(8.0))
    space = psenet.trace(model, torch.zeros(1, 3, 2, 2), divisor=2)
    np.testing.assert_allclose(channel_importance(model, space)["0"], np.full(8, 2 / 3))
    assert torch.equal(order_channels(model, space)[0].bias, torch.arange(8.0))  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "regnety_002", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_the_ordered_model_computes_the_same_function(name: str):
    architecture = ARCHITECTURES[name] if name in ARCHITECTURES else timm_architecture(name)
    trained, space = traced(name)
    model = copy.deepcopy(trained).eval()
    ordered = order_channels(model, space)
    x = architecture.batch(2)
    with torch.no_grad():
        expected = model(x)
        assert (ordered(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    state = model.state_dict()
    moved = [name for name, tensor in ordered.state_dict().items() if not torch.equal(tensor, state[name])]
    assert len(moved) >= len(space.groups) - len(space.wiring.ordered)


def test_tied_weights_stay_tied():
    ordered = order_channels(*traced("tied_weights"))
    assert ordered.get_parameter("first.0.weight") is ordered.get_parameter("second.0.weight")


def test_the_copy_keeps_modes_and_drops_gradients():
    model = _net().train()
    model.get_submodule("norm").eval()
    model(torch.randn(2, 3, 2, 2).double()).sum().backward()
    ordered = order_channels(model, psenet.trace(model, torch.zeros(1, 3, 2, 2).double(), divisor=1))
    assert ordered.training and not ordered.get_submodule("norm").training
    assert all(parameter.grad is None for parameter in ordered.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_space_of_another_model_is_refused():
    small, large = (nn.Sequential(nn.Conv2d(3, size, 1), nn.ReLU(), nn.Conv2d(size, 2, 1)) for size in (8, 16))
    space = psenet.trace(small, torch.zeros(1, 3, 2, 2), divisor=2)
    with pytest.raises(
        InputError, match=r"another model: 0.weight has shape \(16, 3, 1, 1\) instead of \(8, 3, 1, 1\)"
    ):
        order_channels(large, space)
    with pytest.raises(InputError, match="another model: 0.weight is missing"):
        channel_importance(nn.Identity(), space)
