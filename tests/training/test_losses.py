from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn
from toys import NoisyImages, copy_of, make_loader, make_net, make_supernet

from psenet.errors import InputError
from psenet.training import TrainConfig, train_model, train_supernet
from psenet.training.losses import cross_entropy, mixed_loss, soft_cross_entropy


def _logits(seed: int, *, size: int = 7, num_classes: int = 5) -> torch.Tensor:
    return 3 * torch.randn(size, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> np.ndarray:
    """T^2 KL(teacher || student) of the softened distributions, by scipy."""
    p, q = (softmax(logits.detach().numpy() / temperature, axis=1) for logits in (student, teacher))
    return temperature**2 * rel_entr(q, p).sum(axis=1)


class _Refusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody may ask this teacher")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_formula_for_each_sample(label_smoothing: float):
    logits, labels = _logits(0), torch.arange(7) % 5
    targets = (1 - label_smoothing) * np.eye(5)[labels] + label_smoothing / 5
    expected = -(targets * log_softmax(logits.numpy(), axis=1)).sum(axis=1)
    np.testing.assert_allclose(cross_entropy(label_smoothing)(logits, labels).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_scaled_divergence_from_the_softened_teacher(temperature: float):
    student, teacher = _logits(0), _logits(1)
    ours = soft_cross_entropy(student, teacher, temperature=temperature)
    np.testing.assert_allclose(ours.numpy(), _divergence(student, teacher, temperature), rtol=1e-10)


def test_a_student_like_its_teacher_has_no_distillation_loss():
    np.testing.assert_allclose(soft_cross_entropy(_logits(0), _logits(0) + 2, temperature=2.0), 0, atol=1e-12)


def test_the_gradient_of_distillation_is_the_difference_of_the_softened_distributions():
    student, teacher = _logits(0).requires_grad_(), _logits(1).requires_grad_()
    soft_cross_entropy(student, teacher, temperature=2.0).sum().backward()
    p, q = (softmax(logits.detach().numpy() / 2.0, axis=1) for logits in (student, teacher))
    assert student.grad is not None and teacher.grad is None
    np.testing.assert_allclose(student.grad.numpy(), 2.0 * (p - q), rtol=1e-9, atol=1e-12)


def test_label_loss_and_distillation_are_mixed_by_weight():
    student, teacher, labels = _logits(0), _logits(1), torch.arange(7) % 5
    config = TrainConfig(distill_weight=0.3, distill_temperature=2.0)
    mixed = mixed_loss(cross_entropy(), config, student, labels, teacher, num_samples=7)
    label_loss = -log_softmax(student.numpy(), axis=1)[np.arange(7), labels]
    np.testing.assert_allclose(mixed.numpy(), 0.7 * label_loss + 0.3 * _divergence(student, teacher, 2.0), rtol=1e-10)


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (nn.functional.cross_entropy, r"\(\)"),
        (lambda outputs, labels: outputs, r"\(8, 4\)"),
        (lambda outputs, labels: outputs[:3, 0], r"\(3,\)"),
    ],
    ids=["mean", "all outputs", "part of the batch"],
)
@pytest.mark.parametrize("trained", ["model", "parallel", "sandwich"])
def test_a_loss_that_is_not_per_sample_is_refused(loss_fn: Callable, shape: str, trained: str):
    loader, options = make_loader(NoisyImages(8)), {"loss_fn": loss_fn, "show_progress": False}
    match = rf"loss_fn must return one loss per sample, shape \(8,\); got {shape} \(use reduction='none'"
    with pytest.raises(InputError, match=match):
        _train(trained, loader, num_subnets=2, **options)


def _train(trained: str, loader: Any, *, num_subnets: int = 2, **options: Any) -> nn.Module:
    if trained == "model":
        net = make_net()
        train_model(net, loader, **options)
    else:
        net = make_supernet()
        train_supernet(net, loader, num_subnets=num_subnets, strategy=trained, **options)
    return net


@pytest.mark.parametrize("trained", ["model", "parallel", "sandwich"])
def test_without_distill_weight_the_teacher_is_not_even_asked(trained: str):
    options: dict[str, Any] = {"config": TrainConfig(epochs=1), "show_progress": False}
    torch.manual_seed(0)
    alone = _train(trained, make_loader(NoisyImages(16)), **options)
    torch.manual_seed(0)
    taught = _train(trained, make_loader(NoisyImages(16)), teacher=_Refusing(), **options)
    for name, tensor in taught.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name


@pytest.mark.parametrize("trained", ["model", "parallel"])
def test_distillation_without_a_teacher_is_refused(trained: str):
    with pytest.raises(InputError, match="distill_weight is above 0, but there is no teacher"):
        _train(trained, make_loader(NoisyImages(8)), config=TrainConfig(distill_weight=0.5), show_progress=False)


@pytest.mark.parametrize("trained", ["model", "parallel", "sandwich"])
def test_the_teacher_answers_in_eval_mode_and_stays_as_it_was(trained: str):
    teacher = make_net(dropout=0.5, seed=5).train()
    teacher[0].eval()
    flags, before = [part.training for part in teacher.modules()], copy_of(teacher.state_dict())
    seen: list[bool] = []
    teacher.register_forward_hook(lambda part, _inputs, output: seen.extend((part.training, output.requires_grad)))
    config = TrainConfig(epochs=1, distill_weight=0.5)
    _train(trained, make_loader(NoisyImages(16)), config=config, teacher=teacher, show_progress=False)
    assert seen == [False, False] * 2
    assert [part.training for part in teacher.modules()] == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_student_follows_its_teacher_when_the_labels_count_nothing():
    teacher, loader = make_net(seed=5, dtype=torch.float64).eval(), make_loader(NoisyImages(16, dtype=torch.float64))
    student = make_net(seed=6, dtype=torch.float64)
    images = torch.as_tensor(NoisyImages(16, dtype=torch.float64).images)

    def distance() -> float:
        with torch.no_grad():
            return float(_divergence(student.train()(images), teacher(images), 1.0).mean())

    before = distance()
    train_model(
        student, loader, teacher=teacher, config=TrainConfig(epochs=10, distill_weight=1.0), show_progress=False
    )
    assert distance() < 0.5 * before
