import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import NoisyImages, assert_same, copy_of, make_loader, make_net, make_supernet

import psenet
from psenet.errors import InputError
from psenet.history import History
from psenet.training import TrainConfig, TrainingDivergedError, make_strategy, train_supernet
from psenet.training.checkpoint import load_checkpoint
from psenet.training.steps import Backward, Objective, train_distilled, train_on_both_sides, train_together
from psenet.widths import Widths


class _Given:
    """The given subnets, step after step."""

    train = staticmethod(train_together)

    def __init__(self, steps: Sequence[Sequence[Widths]]) -> None:
        self._steps = [list(widths) for widths in steps]
        self._number = 0

    def next_widths(self) -> list[Widths]:
        self._number += 1
        return self._steps[(self._number - 1) % len(self._steps)]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number = state["number"]


class _GivenSerial(_Given):
    train = staticmethod(train_distilled)


class _GivenOnBothSides(_Given):
    train = staticmethod(train_on_both_sides)


def _widths(*rows: tuple[int, int]) -> list[Widths]:
    return [Widths({"0": first, "3": second}) for first, second in rows]


# At the full ceiling, at a lower one, and one subnet alone.
_STEPS = {
    "full ceiling": _widths((16, 24), (4, 20), (16, 8), (12, 12)),
    "lower ceiling": _widths((8, 12), (4, 8), (8, 8), (4, 12)),
    "two": _widths((12, 16), (4, 24)),
    "one": _widths((8, 20)),
}
# The learning rate makes no difference in float64, so that all steps see the same weights.
_STANDSTILL = TrainConfig(epochs=1, learning_rate=1e-300)


def _images(size: int) -> NoisyImages:
    return NoisyImages(size, dtype=torch.float64, noise=0.0)


def _train(supernet: psenet.Supernet, strategy: Any, *, size: int, batch_size: int = 8, **options: Any) -> History:
    loader = make_loader(_images(size), batch_size=batch_size, shuffle=False)
    return train_supernet(
        supernet, loader, strategy=strategy, show_progress=False, **{"config": _STANDSTILL, **options}
    )


def _label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]


def _soft_losses(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student), written out."""
    p = (logits / temperature).exp() / (logits / temperature).exp().sum(1, keepdim=True)
    q = (teacher / temperature).exp() / (teacher / temperature).exp().sum(1, keepdim=True)
    return temperature**2 * (q.detach() * (q.detach() / p).log()).sum(1)


def _assert_gradients(supernet: psenet.Supernet, expected: psenet.Supernet) -> None:
    for name, parameter in expected.named_parameters():
        ours, theirs = supernet.get_parameter(name).grad, parameter.grad
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


# One step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("name", _STEPS)
def test_a_parallel_step_has_the_gradient_of_the_mean_loss_of_the_subnets_one_by_one(name: str, size: int):
    supernet = make_supernet(dtype=torch.float64)
    expected, data = copy.deepcopy(supernet).train(), _images(size)
    history = _train(supernet, _Given([_STEPS[name]]), size=size)
    widths, means = _STEPS[name][: size // 2], []
    for number, setting in enumerate(widths):
        x, labels = data.images[number :: len(widths)], data.labels[number :: len(widths)]
        losses = _label_losses(expected.subnet(setting)(x), labels)
        (losses.sum() / size).backward()
        means.append(float(losses.detach().mean()))
    _assert_gradients(supernet, expected)
    assert history.steps.tolist() == [0] * len(widths)
    assert supernet.space.from_array(history.widths) == widths
    np.testing.assert_allclose(history.losses, means, rtol=1e-9)


def test_a_parallel_step_mixes_in_the_soft_targets_of_the_teacher():
    supernet, teacher = make_supernet(dtype=torch.float64), make_net(seed=4, dtype=torch.float64)
    expected, widths, data = copy.deepcopy(supernet).train(), _STEPS["full ceiling"], _images(8)
    config = TrainConfig(epochs=1, learning_rate=1e-300, distill_weight=0.3, distill_temperature=2.0)
    history = _train(supernet, _Given([widths]), size=8, config=config, teacher=teacher)
    targets, losses = teacher.eval()(data.images), torch.zeros(4, dtype=torch.float64)
    for number, setting in enumerate(widths):
        logits = expected.subnet(setting)(data.images[number::4])
        soft = _soft_losses(logits, targets[number::4], 2.0)
        losses[number] = (0.7 * _label_losses(logits, data.labels[number::4]) + 0.3 * soft).mean()
    losses.mean().backward()
    _assert_gradients(supernet, expected)
    np.testing.assert_allclose(history.losses, losses.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_sandwich_step_has_the_gradients_of_labels_for_the_full_net_and_its_soft_targets_for_the_others(
    temperature: float,
):
    supernet = make_supernet(dtype=torch.float64)
    expected, data = copy.deepcopy(supernet).train(), _images(8)
    config = TrainConfig(epochs=1, learning_rate=1e-300, distill_temperature=temperature)
    history = _train(supernet, "sandwich", size=8, config=config, seed=3)
    widths = make_strategy("sandwich", supernet.space, seed=3).next_widths()
    outputs = [expected.subnet(setting)(data.images) for setting in widths]
    total = _label_losses(outputs[0], data.labels).mean()
    for logits in outputs[1:]:
        total = total + _soft_losses(logits, outputs[0], temperature).mean()
    total.backward()
    _assert_gradients(supernet, expected)
    assert supernet.space.from_array(history.widths) == widths
    means = [float(_label_losses(logits.detach(), data.labels).mean()) for logits in outputs]
    np.testing.assert_allclose(history.losses, means, rtol=1e-9)


def test_the_full_net_of_a_sandwich_can_have_a_teacher_too():
    supernet, teacher = make_supernet(dtype=torch.float64), make_net(seed=4, dtype=torch.float64)
    expected, widths, data = copy.deepcopy(supernet).train(), _widths((16, 24), (4, 8)), _images(8)
    config = TrainConfig(epochs=1, learning_rate=1e-300, distill_weight=0.4)
    _train(supernet, _GivenSerial([widths]), size=8, config=config, teacher=teacher)
    full, smallest = (expected.subnet(setting)(data.images) for setting in widths)
    soft = _soft_losses(full, teacher.eval()(data.images), 1.0)
    total = (0.6 * _label_losses(full, data.labels) + 0.4 * soft + _soft_losses(smallest, full, 1.0)).mean()
    total.backward()
    _assert_gradients(supernet, expected)


def _side_by_hand(supernet: psenet.Supernet, x: torch.Tensor, widths: Widths, *, from_right: bool) -> torch.Tensor:
    """Run the toy net on the first or the last channels of its two convolutions, written out."""
    first, second = widths["0"], widths["3"]
    one, two = (slice(16 - first, 16), slice(24 - second, 24)) if from_right else (slice(first), slice(second))
    weights = {name: supernet.model.get_parameter(name) for name, _ in supernet.model.named_parameters()}
    x = nn.functional.conv2d(x, weights["0.weight"][one], padding=1)
    x = nn.functional.batch_norm(x, None, None, weights["1.weight"][one], weights["1.bias"][one], training=True).relu()
    x = nn.functional.conv2d(x, weights["3.weight"][two][:, one])
    x = nn.functional.batch_norm(x, None, None, weights["4.weight"][two], weights["4.bias"][two], training=True).relu()
    return x.mean((2, 3)) @ weights["9.weight"][:, two].T + weights["9.bias"]


def _enliven_norms(supernet: psenet.Supernet) -> psenet.Supernet:
    """Give scales and shifts values of their own, so that no channel's are like another's."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)
    return supernet


@pytest.mark.parametrize("size", [8, 7])
def test_a_bilateral_step_has_the_gradient_of_both_widths_on_both_sides(size: int):
    supernet = _enliven_norms(make_supernet(dtype=torch.float64))
    expected, widths, data = copy.deepcopy(supernet).train(), _widths((4, 20), (16, 12)), _images(size)
    history = _train(supernet, _GivenOnBothSides([widths]), size=size)
    means = []
    for setting in widths:
        losses = []
        for from_right in (False, True):
            logits = _side_by_hand(expected, data.images, setting, from_right=from_right)
            losses.append(_label_losses(logits, data.labels).mean())
        (losses[0] + losses[1]).backward()
        assert (losses[0] - losses[1]).abs().item() > 1e-3
        means.append((losses[0] + losses[1]).item() / 2)
    _assert_gradients(supernet, expected)
    assert history.steps.tolist() == [0, 0]
    assert supernet.space.from_array(history.widths) == widths
    np.testing.assert_allclose(history.losses, means, rtol=1e-9)


def test_a_bilateral_step_by_name_trains_a_subnet_and_its_complement():
    supernet = _enliven_norms(make_supernet(dtype=torch.float64))
    expected, data = copy.deepcopy(supernet).train(), _images(8)
    history = _train(supernet, "bilateral", size=8, seed=3, num_subnets=5)
    widths = make_strategy("bilateral", supernet.space, seed=3).next_widths()
    for setting in widths:
        for from_right in (False, True):
            logits = _side_by_hand(expected, data.images, setting, from_right=from_right)
            _label_losses(logits, data.labels).mean().backward()
    _assert_gradients(supernet, expected)
    assert supernet.space.from_array(history.widths) == widths


def test_a_bilateral_step_mixes_in_the_soft_targets_of_the_teacher_on_both_sides():
    supernet = _enliven_norms(make_supernet(dtype=torch.float64))
    teacher, widths, data = make_net(seed=4, dtype=torch.float64), _widths((8, 16)), _images(8)
    expected = copy.deepcopy(supernet).train()
    config = TrainConfig(epochs=1, learning_rate=1e-300, distill_weight=0.3, distill_temperature=2.0)
    history = _train(supernet, _GivenOnBothSides([widths]), size=8, config=config, teacher=teacher)
    targets, losses = teacher.eval()(data.images).detach(), []
    for from_right in (False, True):
        logits = _side_by_hand(expected, data.images, widths[0], from_right=from_right)
        soft = _soft_losses(logits, targets, 2.0)
        losses.append((0.7 * _label_losses(logits, data.labels) + 0.3 * soft).mean())
    (losses[0] + losses[1]).backward()
    _assert_gradients(supernet, expected)
    np.testing.assert_allclose(history.losses, [(losses[0] + losses[1]).item() / 2], rtol=1e-9)


@pytest.mark.parametrize("size", [8, 7])
def test_a_single_path_step_trains_one_random_subnet_on_the_whole_batch(size: int):
    supernet = _enliven_norms(make_supernet(dtype=torch.float64))
    expected, data = copy.deepcopy(supernet).train(), _images(size)
    history = _train(supernet, "single-path", size=size, seed=6, num_subnets=5)
    (setting,) = make_strategy("single-path", supernet.space, seed=6).next_widths()
    logits = _side_by_hand(expected, data.images, setting, from_right=False)
    loss = _label_losses(logits, data.labels).mean()
    loss.backward()
    _assert_gradients(supernet, expected)
    assert history.steps.tolist() == [0] and supernet.space.from_array(history.widths) == [setting]
    np.testing.assert_allclose(history.losses, [loss.item()], rtol=1e-9)


class _HardestOnly(_Given):
    """Trains only the subnet with the largest loss, from both sides, its loss doubled; tells of this one alone."""

    @staticmethod
    def train(
        supernet: nn.Module,
        x: Any,
        labels: torch.Tensor,
        widths: Sequence[Widths],
        objective: Objective,
        backward: Backward,
    ) -> torch.Tensor:
        loss = objective.losses(supernet(x, widths[0]), x, labels).mean()
        backward(2 * loss)
        backward(objective.loss_fn(supernet(x, widths[0], from_right=True), labels).mean())
        return loss.detach()[None]


def test_a_focus_reaches_the_strategy_that_is_built():
    supernet, focus = make_supernet(dtype=torch.float64), psenet.Budget(macs="40%")
    history = _train(supernet, "parallel", size=24, focus=focus, num_subnets=4, seed=2)
    chosen = make_strategy("parallel", supernet.space, num_subnets=4, seed=2, focus=focus)
    expected = [widths for _ in range(3) for widths in chosen.next_widths()]
    assert supernet.space.from_array(history.widths) == expected


def test_a_focus_beside_a_strategy_object_is_refused():
    with pytest.raises(InputError, match="a strategy object has its own focus"):
        _train(make_supernet(dtype=torch.float64), _Given([_STEPS["two"]]), size=8, focus=psenet.Budget(macs="40%"))


def test_a_strategy_of_ones_own_trains_in_its_own_way():
    supernet = _enliven_norms(make_supernet(dtype=torch.float64))
    expected, widths, data = copy.deepcopy(supernet).train(), _widths((4, 20), (16, 12)), _images(8)
    history = _train(supernet, _HardestOnly([widths]), size=8)
    left, right = (_side_by_hand(expected, data.images, widths[0], from_right=side) for side in (False, True))
    loss = _label_losses(left, data.labels).mean()
    (2 * loss + _label_losses(right, data.labels).mean()).backward()
    _assert_gradients(supernet, expected)
    # What its function tells of is on record, not all that it was given.
    assert history.steps.tolist() == [0] and supernet.space.from_array(history.widths) == widths[:1]
    np.testing.assert_allclose(history.losses, [loss.item()], rtol=1e-9)


def test_a_strategy_of_ones_own_gets_the_objective_of_the_training():
    objectives: list[tuple[Objective, int]] = []

    class Noting(_Given):
        @staticmethod
        def train(
            supernet: nn.Module,
            x: Any,
            labels: torch.Tensor,
            widths: Sequence[Widths],
            objective: Objective,
            backward: Backward,
        ) -> torch.Tensor:
            objectives.append((objective, len(x)))
            return train_together(supernet, x, labels, widths, objective, backward)

    supernet, teacher = make_supernet(dtype=torch.float64), make_net(seed=4, dtype=torch.float64)
    config = TrainConfig(epochs=1, learning_rate=1e-300, distill_weight=0.3)
    _train(supernet, Noting([_STEPS["two"]]), size=12, config=config, teacher=teacher)
    assert [size for _, size in objectives] == [8, 4]
    assert all(one.config is config and one.teacher is teacher for one, _ in objectives)
    objectives.clear()
    _train(supernet, Noting([_STEPS["two"]]), size=8, teacher=teacher)  # its outputs have no weight
    assert [one.teacher for one, _ in objectives] == [None]


@pytest.mark.parametrize("strategy", ["parallel", "bilateral", "single-path", "of one's own"])
def test_distillation_without_a_teacher_is_refused(strategy: str):
    supernet, config = make_supernet(dtype=torch.float64), TrainConfig(epochs=1, distill_weight=0.5)
    before = copy_of(supernet.state_dict())
    chosen = _HardestOnly([_STEPS["two"]]) if strategy == "of one's own" else strategy
    with pytest.raises(InputError, match="distill_weight is above 0, but there is no teacher"):
        _train(supernet, chosen, size=8, config=config)
    assert_same(dict(supernet.state_dict()), before)


@pytest.mark.parametrize("chosen", ["sandwich", _GivenSerial([_STEPS["two"]])], ids=["sandwich", "of one's own"])
def test_a_sandwich_needs_no_teacher_to_distill(chosen: Any):
    config = TrainConfig(epochs=1, learning_rate=1e-300, distill_weight=0.5)
    history = _train(make_supernet(dtype=torch.float64), chosen, size=8, config=config, seed=3)
    assert len(history) == (4 if chosen == "sandwich" else 2) and np.isfinite(history.losses).all()


@pytest.mark.parametrize("strategy", ["parallel", "sandwich"])
def test_a_loss_of_ones_own_is_what_is_trained_and_recorded(strategy: str):
    def squares(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs.square().sum(1)

    supernet, data = make_supernet(dtype=torch.float64), _images(8)
    expected, widths = copy.deepcopy(supernet).train(), _widths((12, 20))
    chosen = _Given([widths]) if strategy == "parallel" else _GivenSerial([widths])
    history = _train(supernet, chosen, size=8, loss_fn=squares)
    loss = (expected.subnet(widths[0])(data.images) ** 2).sum() / 8
    loss.backward()
    _assert_gradients(supernet, expected)
    np.testing.assert_allclose(history.losses, [loss.item()], rtol=1e-9)


# The record -----------------------------------------------------------------------------------------------------------


def test_every_step_is_recorded_also_a_last_one_with_too_few_samples_for_its_subnets():
    supernet, data = make_supernet(dtype=torch.float64), _images(21)
    steps = [_STEPS["full ceiling"], _STEPS["lower ceiling"]]
    # Batches of 8, 8 and 5: the last has two samples for the first two subnets only, and the steps go on counting.
    config = TrainConfig(epochs=2, learning_rate=1e-300)
    history = _train(supernet, _Given(steps), size=21, config=config)
    parts = [
        (0, steps[0], 4),
        (8, steps[1], 4),
        (16, steps[0], 2),
        (0, steps[1], 4),
        (8, steps[0], 4),
        (16, steps[1], 2),
    ]
    expected, numbers, widths = [], [], []
    for step, (start, settings, n) in enumerate(parts):
        x, labels = data.images[start : start + 8], data.labels[start : start + 8]
        for number, setting in enumerate(settings[:n]):
            logits = supernet.subnet(setting)(x[number::n]).detach()
            expected.append(float(_label_losses(logits, labels[number::n]).mean()))
            numbers.append(step)
            widths.append(setting)
    assert history.steps.tolist() == numbers
    assert supernet.space.from_array(history.widths) == widths
    np.testing.assert_allclose(history.losses, expected, rtol=1e-9)


@pytest.mark.parametrize(("size", "num_last"), [(16 + 9, 4), (16 + 3, 1)])
def test_a_short_last_batch_trains_norms_that_have_one_value_per_sample(size: int, num_last: int):
    model = nn.Sequential(nn.Conv2d(3, 16, 6), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    supernet = psenet.Supernet(model, psenet.trace(model, torch.zeros(2, 3, 6, 6), divisor=4))
    loader, config = make_loader(NoisyImages(size), batch_size=16), TrainConfig(epochs=1)
    history = train_supernet(supernet, loader, num_subnets=8, config=config, show_progress=False)
    assert history.steps.tolist() == [0] * 8 + [1] * num_last
    assert np.isfinite(history.losses).all()


@pytest.mark.parametrize(
    ("strategy", "per_step"), [("parallel", 3), ("sandwich", 4), ("bilateral", 2), ("single-path", 1)]
)
def test_the_record_follows_the_sequence_of_the_strategy(strategy: str, per_step: int):
    supernet = make_supernet()
    loader = make_loader(NoisyImages(24), batch_size=6)
    config = TrainConfig(epochs=2)
    history = train_supernet(
        supernet, loader, num_subnets=3, strategy=strategy, seed=5, config=config, show_progress=False
    )
    chosen = make_strategy(strategy, supernet.space, num_subnets=3, seed=5)
    assert supernet.space.from_array(history.widths) == [setting for _ in range(8) for setting in chosen.next_widths()]
    assert history.steps.tolist() == [step for step in range(8) for _ in range(per_step)]
    assert np.isfinite(history.losses).all()


def test_training_stops_after_the_steps_asked_for_and_returns_their_record():
    loader = make_loader(NoisyImages(24), batch_size=6)
    history = train_supernet(make_supernet(), loader, num_subnets=3, max_steps=5, show_progress=False)
    assert history.steps.tolist() == [step for step in range(5) for _ in range(3)]


# The whole training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["parallel", "sandwich", "bilateral", "single-path"])
def test_training_lowers_the_loss_of_all_widths_and_leaves_the_statistics_alone(strategy: str):
    supernet, data = make_supernet(), NoisyImages(32)
    statistics = {name: tensor.clone() for name, tensor in supernet.named_buffers()}
    settings = [supernet.space.full(), supernet.space.smallest(), *_widths((8, 16))]

    def losses() -> list[float]:
        with torch.no_grad():
            return [float(_label_losses(supernet.train()(data.images, w), data.labels).mean()) for w in settings]

    before = losses()
    config = TrainConfig(epochs=25, learning_rate=0.1)
    train_supernet(
        supernet, make_loader(data, batch_size=16), num_subnets=4, strategy=strategy, config=config, show_progress=False
    )
    assert all(after < 0.7 * old for after, old in zip(losses(), before, strict=True))
    assert_same(dict(supernet.named_buffers()), statistics)


def test_the_users_model_is_not_trained():
    model = make_net()
    space, before = make_supernet().space, copy_of(model.state_dict())
    loader = make_loader(NoisyImages(16))
    train_supernet(psenet.Supernet(model, space), loader, config=TrainConfig(epochs=1), show_progress=False)
    assert_same(dict(model.state_dict()), before)


def test_an_unknown_strategy_and_less_than_one_subnet_are_refused():
    loader = make_loader(NoisyImages(8))
    with pytest.raises(
        InputError, match=r"unknown strategy 'serial'; there are \['bilateral', 'parallel', 'sandwich', 'single"
    ):
        train_supernet(make_supernet(), loader, strategy="serial")
    with pytest.raises(InputError, match="num_subnets must be at least 1; got 0"):
        train_supernet(make_supernet(), loader, num_subnets=0)


# Resuming -------------------------------------------------------------------------------------------------------------

_CONFIG = TrainConfig(epochs=4, warmup_ratio=0.2)


def _stopping_at(number: int | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Cross entropy that stops the program at one of its calls."""
    calls = iter(range(10**9))

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls) == number:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    return loss_fn


def _strategy(name: str, supernet: psenet.Supernet, seed: int) -> Any:
    if name == "of one's own":
        return _Given([_STEPS["full ceiling"], _STEPS["lower ceiling"], _STEPS["two"]])
    return make_strategy(name, supernet.space, num_subnets=4, seed=seed)


@pytest.mark.parametrize(
    ("name", "calls_per_step"),
    [("parallel", 1), ("sandwich", 4), ("bilateral", 4), ("single-path", 1), ("of one's own", 1)],
)
def test_a_training_that_was_stopped_continues_exactly(name: str, calls_per_step: int, tmp_path: Path):
    def train(checkpoint: Path, *, seed: int, stop: int | None = None) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        supernet, loader = make_supernet(dropout=0.2, seed=seed), make_loader(NoisyImages(20), seed=seed)
        chosen = _strategy(name, supernet, seed)
        history = train_supernet(
            supernet,
            loader,
            strategy=chosen,
            config=_CONFIG,
            loss_fn=_stopping_at(stop),
            checkpoint=checkpoint,
            show_progress=False,
        )
        drawn = (torch.rand(5), list(loader.sampler), [chosen.next_widths() for _ in range(3)])
        return copy_of(supernet.state_dict()), history.state_dict(), drawn

    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    expected = train(whole, seed=3)
    with pytest.raises(KeyboardInterrupt):
        # Three steps an epoch: the second step of the third epoch, for the sandwich after its first backward pass.
        train(parts, seed=3, stop=7 * calls_per_step + calls_per_step // 2)
    assert load_checkpoint(parts)["position"]["epoch"] == 2
    assert_same(train(parts, seed=77), expected)
    assert_same(torch.load(parts, weights_only=True), torch.load(whole, weights_only=True))


@pytest.mark.parametrize(
    ("strategy", "calls_per_step"), [("parallel", 1), ("sandwich", 4), ("bilateral", 4), ("single-path", 1)]
)
def test_a_strategy_given_by_name_continues_too(strategy: str, calls_per_step: int, tmp_path: Path):
    def train(checkpoint: Path, *, seed: int = 3, stop: int | None = None) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        supernet, options = make_supernet(seed=seed), {"loss_fn": _stopping_at(stop), "show_progress": False}
        loader = make_loader(NoisyImages(20), seed=seed)
        history = train_supernet(
            supernet, loader, num_subnets=4, strategy=strategy, config=_CONFIG, checkpoint=checkpoint, **options
        )
        return copy_of(supernet.state_dict()), history.state_dict()

    expected = train(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts.pt", stop=8 * calls_per_step)
    assert load_checkpoint(tmp_path / "parts.pt")["position"]["epoch"] == 2
    assert_same(train(tmp_path / "parts.pt", seed=8), expected)


def test_a_finished_training_returns_its_record_again(tmp_path: Path):
    def train(supernet: psenet.Supernet) -> History:
        loader = make_loader(NoisyImages(16))
        return train_supernet(
            supernet, loader, config=TrainConfig(epochs=2), checkpoint=tmp_path / "c.pt", show_progress=False
        )

    first, again = make_supernet(), make_supernet(seed=4)
    assert_same(train(first).state_dict(), train(again).state_dict())
    assert_same(again.state_dict(), first.state_dict())


def test_a_diverging_supernet_keeps_its_last_good_epoch(tmp_path: Path):
    calls = iter(range(10**9))

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return outputs.square().sum(1) * (math.nan if next(calls) >= 4 else 1e-3)

    loader, path = make_loader(NoisyImages(24)), tmp_path / "supernet.pt"
    words = (
        r"the loss is nan at step 4, first nan at step 4 in the subnet with \d+% of the MACs, widths 0 \d+, 3 \d+ "
        r"\(weights, images and .* the last good state is kept in .*"
    )
    with pytest.raises(TrainingDivergedError, match=words):
        train_supernet(make_supernet(), loader, num_subnets=4, loss_fn=loss_fn, checkpoint=path, show_progress=False)
    state = load_checkpoint(path)
    assert state["position"]["epoch"] == 1
    assert state["extras"]["history"]["steps"].tolist() == [step for step in range(3) for _ in range(4)]
    assert all(tensor.isfinite().all() for tensor in state["module"].values())
    history = train_supernet(make_supernet(), loader, num_subnets=4, checkpoint=path, show_progress=False)
    assert len(history) == 30 * 4 and np.isfinite(history.losses).all()
