"""Training one plain module: the layout of its images."""

from typing import Any

import pytest
import torch
from torch import nn
from toys import NoisyImages, make_loader, make_net, train_quietly

from psenet.memory_format import ImageLayout
from psenet.training import TrainConfig


class Viewing(nn.Sequential):
    """Views a feature map as a vector, which memory in channels-last order does not allow."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        x = input
        for layer in self:
            x = layer(x) if not isinstance(layer, nn.Flatten) else x.view(len(x), -1)
        return x


def make_viewing_net() -> Viewing:
    torch.manual_seed(0)
    return Viewing(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def layouts_seen(model: nn.Module) -> list[bool]:
    """Note, for every training step of the model, whether its images are channels-last."""
    seen: list[bool] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            seen.append(args[0].is_contiguous(memory_format=torch.channels_last))

    model.register_forward_hook(note)
    return seen


@pytest.mark.parametrize(("make", "channels_last"), [(make_net, True), (make_viewing_net, False)])
def test_images_are_channels_last_where_the_model_can_read_them_so(make: Any, channels_last: bool):
    model = make()
    model(torch.zeros(2, 3, 6, 6))
    seen = layouts_seen(model)
    train_quietly(model, make_loader(NoisyImages(16)), TrainConfig(epochs=1))
    assert seen == [channels_last, channels_last]


def test_trying_the_layout_out_changes_neither_statistics_nor_the_random_state_nor_the_batch():
    model = make_net(dropout=0.5).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(8, 3, 6, 6)
    given, state = x.clone(), torch.get_rng_state()
    laid_out = ImageLayout(model)(x)
    assert torch.equal(laid_out, given)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_inputs_that_are_no_images_stay_as_they_are():
    x = torch.randn(8, 3)
    assert ImageLayout(nn.Linear(3, 2))(x) is x
