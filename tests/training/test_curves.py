"""Training tells of its epochs, and the file of curves keeps them over interruptions."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import CountingLoss, NoisyImages, make_loader, make_net, make_supernet, raising, train_quietly

from psenet.errors import InputError
from psenet.training import EpochRecord, TrainConfig, train_supernet
from psenet.training.curves import Curves

CONFIG = TrainConfig(epochs=3, learning_rate=0.05, warmup_ratio=0.0, weight_decay=0.0, momentum=0.0)


def _mean_losses_by_hand(model: nn.Module, images: NoisyImages, rates: list[float]) -> list[float]:
    """Plain gradient descent over batches of 8, 8 and 4, in order; the mean loss of each epoch."""
    means = []
    for epoch in range(len(rates) // 3):
        losses = []
        for number, (start, end) in enumerate(((0, 8), (8, 16), (16, 20))):
            loss = F.cross_entropy(model(images.images[start:end]), images.labels[start:end])
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= rates[3 * epoch + number] * parameter.grad
            losses.append(loss.item())
        means.append(sum(losses) / 3)
    return means


def test_an_epoch_is_told_with_its_mean_loss_step_and_learning_rate():
    images = NoisyImages(20, dtype=torch.float64, noise=0.0)
    told: list[EpochRecord] = []
    loader = make_loader(images, shuffle=False)
    train_quietly(make_net(dtype=torch.float64), loader, CONFIG, record=told.append)
    rates = [0.05 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    expected = _mean_losses_by_hand(make_net(dtype=torch.float64).train(), images, rates)
    assert [(one.epoch, one.step) for one in told] == [(0, 3), (1, 6), (2, 9)]
    assert [one.learning_rate for one in told] == pytest.approx([rates[2], rates[5], rates[8]])
    assert [one.loss for one in told] == pytest.approx(expected, rel=1e-6)
    assert all(one.seconds >= 0 for one in told)


def test_a_supernet_tells_of_its_epochs_too():
    told: list[EpochRecord] = []
    history = train_supernet(
        make_supernet(),
        make_loader(NoisyImages(32)),
        num_subnets=2,
        config=CONFIG,
        record=told.append,
        show_progress=False,
    )
    assert [one.step for one in told] == [4, 8, 12]
    # Each step's loss is the mean over its subnets, which the history has one by one.
    steps, losses = torch.from_numpy(history.steps), torch.from_numpy(history.losses)
    by_step = [float(losses[steps == step].mean()) for step in range(12)]
    assert [one.loss for one in told] == pytest.approx([sum(by_step[at : at + 4]) / 4 for at in (0, 4, 8)], rel=1e-5)


def test_an_estimate_of_few_steps_tells_nothing():
    told: list[EpochRecord] = []
    train_quietly(make_net(), make_loader(NoisyImages(32)), CONFIG, record=told.append, max_steps=2)
    assert told == []


def test_curves_survive_an_interruption_between_record_and_checkpoint(tmp_path: Path):
    """An epoch that was told but not kept is repeated, and stands in the file once."""
    file, checkpoint = Curves(tmp_path / "curves.json"), tmp_path / "c.pt"
    keep = file.recorder("baseline")

    def stopped(epoch: EpochRecord) -> None:
        keep(epoch)
        if epoch.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_quietly(make_net(), make_loader(NoisyImages(16)), CONFIG, checkpoint=checkpoint, record=stopped)
    assert [one.epoch for one in file.read()["baseline"]] == [0, 1]
    train_quietly(
        make_net(),
        make_loader(NoisyImages(16)),
        CONFIG,
        checkpoint=checkpoint,
        record=Curves(tmp_path / "curves.json").recorder("baseline"),
    )
    assert [(one.epoch, one.step) for one in file.read()["baseline"]] == [(0, 2), (1, 4), (2, 6)]


def test_a_training_that_starts_again_replaces_its_curve_and_no_other(tmp_path: Path):
    file = Curves(tmp_path / "curves.json")
    train_quietly(make_net(), make_loader(NoisyImages(16)), CONFIG, record=file.recorder("supernet"))
    train_quietly(make_net(), make_loader(NoisyImages(16)), CONFIG, record=file.recorder("baseline"))
    failing = CountingLoss({3: raising(RuntimeError("out of luck"))})
    with pytest.raises(RuntimeError, match="out of luck"):
        train_quietly(
            make_net(), make_loader(NoisyImages(16)), CONFIG, record=file.recorder("baseline"), loss_fn=failing
        )
    assert {name: len(epochs) for name, epochs in file.read().items()} == {"supernet": 3, "baseline": 1}


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"baseline": [{"epoch": 0}]}', '{"baseline": 3}', json.dumps({"baseline": [{"epoch": "first"}]})],
)
def test_damaged_curves_are_refused_before_training(content: str, tmp_path: Path):
    path = tmp_path / "curves.json"
    path.write_text(content)
    with pytest.raises(InputError, match="curves.json"):
        Curves(path).recorder("baseline")
