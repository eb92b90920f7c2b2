import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from psenet.errors import InputError
from psenet.evaluate import (
    SupernetScore,
    accuracy,
    paired_difference,
    recalibrate,
    right_answers,
    soft_accuracy,
)
from psenet.widths import Widths


def _batches(num_batches: int = 3, batch_size: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch_size, 4, generator=rng) * 3 + 1, torch.randint(4, (batch_size,), generator=rng))
        for _ in range(num_batches)
    ]


def _average_statistics(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over batches of each batch's mean and unbiased variance per channel (axis 1)."""
    flat = [np.moveaxis(array, 1, 0).reshape(array.shape[1], -1) for array in arrays]
    means, variances = [part.mean(axis=1) for part in flat], [part.var(axis=1, ddof=1) for part in flat]
    return np.mean(means, axis=0), np.mean(variances, axis=0)


class _Wrong(nn.Module):
    """Counts how often it runs and refuses."""

    num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        raise ValueError("this module refuses")


# Recalibration --------------------------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_the_average_over_the_batches():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    module(torch.randn(16, 4) * 100)  # what training left behind must not count
    batches = _batches()
    assert recalibrate(module, batches) == 1
    mean, variance = _average_statistics([x.numpy() for x, _ in batches])
    norm = module[0]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)
    assert norm.num_batches_tracked == 3


def test_dropout_stays_off_while_norms_are_recalibrated():
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    batches = _batches()
    recalibrate(module, batches)
    mean, _ = _average_statistics([x.numpy() for x, _ in batches])
    np.testing.assert_allclose(module.get_buffer("1.running_mean").numpy(), mean, rtol=1e-5)


def test_a_timm_norm_is_recalibrated_and_the_dropout_inside_it_stays_off():
    norm: Any = BatchNormAct2d(4, drop_layer=nn.Dropout)
    norm.drop.p = 0.5
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = [torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert recalibrate(norm, [(x,) for x in images]) == 1
    mean, variance = _average_statistics([x.numpy() for x in images])
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)
    x = images[0]
    centred = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(seen[0], centred.relu())


def test_momentum_and_every_training_flag_come_back():
    module = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(), nn.BatchNorm1d(4, momentum=None)).train()
    module[1].eval()
    before = [part.training for part in module.modules()]
    recalibrate(module, _batches())
    assert [part.training for part in module.modules()] == before == [True, True, False, True]
    assert [module[0].momentum, module[2].momentum] == [0.3, None]


def test_flags_and_momentum_come_back_when_the_module_fails():
    module = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), _Wrong()).train()
    with pytest.raises(ValueError, match="this module refuses"):
        recalibrate(module, _batches())
    assert all(part.training for part in module.modules()) and module[0].momentum == 0.3


def test_a_module_without_batch_norms_is_not_even_run():
    wrong = _Wrong()
    norms = nn.Sequential(wrong, nn.BatchNorm1d(4, track_running_stats=False), nn.GroupNorm(2, 4))
    assert recalibrate(norms, _batches()) == 0
    assert wrong.num_calls == 0


def test_recalibration_without_batches_is_refused_and_keeps_the_statistics():
    norm = nn.BatchNorm1d(4)
    norm(torch.randn(16, 4) + 5)
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    with pytest.raises(InputError, match="recalibration needs at least one batch; got none"):
        recalibrate(norm, [])
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)


def test_a_calibration_batch_of_one_sample_is_named():
    batches = [*_batches(2), (torch.randn(1, 4), torch.zeros(1, dtype=torch.int64))]
    with pytest.raises(InputError, match="calibration batch 2 has a single sample.*drop_last=True"):
        recalibrate(nn.BatchNorm1d(4), batches)


def test_forward_fn_decides_how_a_batch_is_run():
    norm = nn.BatchNorm1d(4)
    batches = [{"image": x} for x, _ in _batches()]
    recalibrate(norm, batches, forward_fn=lambda module, batch: module(batch["image"]))
    mean, _ = _average_statistics([batch["image"].numpy() for batch in batches])
    assert norm.running_mean is not None
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-5)


def test_recalibrated_statistics_carry_no_gradient():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    recalibrate(module, _batches())
    assert module[1].running_mean.grad_fn is None
    module(_batches()[0][0]).sum().backward()  # and training goes on
    assert module[0].weight.grad is not None


# Accuracy -------------------------------------------------------------------------------------------------------------


def test_accuracy_counts_correct_predictions_over_batches_of_different_size():
    logits = torch.eye(4)
    batches = [(logits[[0, 1, 2]], torch.tensor([0, 1, 3])), (logits[[3]], torch.tensor([3]))]
    assert accuracy(nn.Identity(), batches) == 75.0


def test_accuracy_of_dense_labels_counts_every_position():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 0] = 1.0  # class 1 at one position, class 0 at three
    assert accuracy(nn.Identity(), [(logits, torch.ones(1, 2, 2, dtype=torch.int64))]) == 25.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_accuracy_of_outputs_that_are_not_finite_is_nan(broken: float):
    first, second = torch.eye(4), torch.eye(4)
    first[2, 3] = broken
    labels = torch.arange(4)
    assert math.isnan(accuracy(nn.Identity(), [(first, labels), (second, labels)]))


def test_accuracy_runs_in_eval_mode_and_gives_every_flag_back():
    module = nn.Sequential(nn.Dropout(1.0), nn.Identity().eval())
    assert accuracy(module, [(torch.eye(4)[[1, 2]], torch.tensor([1, 2]))]) == 100.0
    assert [part.training for part in module.modules()] == [True, True, False]


def test_accuracy_without_samples_is_refused():
    with pytest.raises(InputError, match="accuracy needs at least one labelled sample; got none"):
        accuracy(nn.Identity(), [])


def test_accuracy_refuses_labels_that_do_not_go_with_the_logits():
    with pytest.raises(InputError, match=r"got shapes \(4, 4\) and \(4, 1\): give a score_fn"):
        accuracy(nn.Identity(), [(torch.eye(4), torch.zeros(4, 1, dtype=torch.int64))])


def test_accuracy_refuses_outputs_that_are_not_a_tensor():
    with pytest.raises(TypeError, match="got dict and Tensor: give a score_fn"):
        accuracy(nn.Identity(), [({"logits": torch.eye(4)}, torch.zeros(4))])


# Soft accuracy --------------------------------------------------------------------------------------------------------


def test_soft_accuracy_is_the_mean_probability_of_the_true_class_over_batches_of_different_size():
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(7, 5)), rng.integers(5, size=7)
    batches = [(torch.from_numpy(logits[part]), torch.from_numpy(labels[part])) for part in (slice(0, 4), slice(4, 7))]
    expected = 100 * softmax(logits, axis=1)[np.arange(7), labels].mean()
    assert soft_accuracy(nn.Identity(), batches) == pytest.approx(expected, rel=1e-6)


def test_soft_accuracy_tells_candidates_apart_that_are_right_equally_often():
    labels = torch.arange(4)
    sure, unsure = [(torch.eye(4) * 9, labels)], [(torch.eye(4), labels)]
    assert accuracy(nn.Identity(), sure) == accuracy(nn.Identity(), unsure) == 100.0
    assert 99 < soft_accuracy(nn.Identity(), sure) < 100
    assert soft_accuracy(nn.Identity(), unsure) == pytest.approx(100 * math.e / (math.e + 3), rel=1e-6)


def test_one_sample_that_is_very_wrong_costs_no_more_than_its_share():
    logits = torch.eye(4) * 1e4
    assert soft_accuracy(nn.Identity(), [(logits, torch.tensor([0, 1, 2, 0]))]) == pytest.approx(75.0)


def test_soft_accuracy_of_dense_labels_counts_every_position():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 3, 4, 5)), rng.integers(3, size=(2, 4, 5))
    probabilities = np.take_along_axis(softmax(logits, axis=1), labels[:, None], axis=1)
    batch = (torch.from_numpy(logits), torch.from_numpy(labels))
    assert soft_accuracy(nn.Identity(), [batch]) == pytest.approx(100 * probabilities.mean(), rel=1e-6)


def test_soft_accuracy_of_half_precision_outputs_is_summed_in_full_precision():
    # Each batch adds 1: a sum in bfloat16 would stop growing at 256.
    batches = [(torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64))] * 400
    assert soft_accuracy(nn.Identity(), batches) == pytest.approx(50.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_soft_accuracy_of_outputs_that_are_not_finite_is_nan(broken: float):
    first, second = torch.eye(4), torch.eye(4)
    first[2, 3] = broken
    labels = torch.arange(4)
    assert math.isnan(soft_accuracy(nn.Identity(), [(first, labels), (second, labels)]))


def test_soft_accuracy_runs_each_batch_once_in_eval_mode_and_gives_every_flag_back():
    seen: list[bool] = []

    def run(module: nn.Module, batch: Any) -> torch.Tensor:
        seen.extend([module.training, torch.is_grad_enabled()])
        return module(batch[0])

    module = nn.Sequential(nn.Dropout(1.0), nn.Identity().eval())
    batch = (torch.eye(4)[[1, 2]] * 20, torch.tensor([1, 2]))
    assert soft_accuracy(module, iter([batch, batch]), forward_fn=run) == pytest.approx(100.0)
    assert seen == [False, False] * 2
    assert [part.training for part in module.modules()] == [True, True, False]


def test_soft_accuracy_refuses_what_accuracy_refuses():
    with pytest.raises(InputError, match="accuracy needs at least one labelled sample; got none"):
        soft_accuracy(nn.Identity(), [])
    with pytest.raises(InputError, match=r"got shapes \(4, 4\) and \(4, 1\): give a score_fn"):
        soft_accuracy(nn.Identity(), [(torch.eye(4), torch.zeros(4, 1, dtype=torch.int64))])
    with pytest.raises(TypeError, match="got dict and Tensor: give a score_fn"):
        soft_accuracy(nn.Identity(), [({"logits": torch.eye(4)}, torch.zeros(4))])


def test_the_paired_difference_counts_only_samples_that_tell_two_nets_apart():
    torch.manual_seed(0)
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    batches = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (7, 30, 13)]
    right = [torch.cat([net(x).argmax(1) == y for x, y in batches]).numpy().astype(float) for net in (one, other)]
    difference, error = paired_difference(one, other, batches)
    assert difference == pytest.approx(accuracy(one, batches) - accuracy(other, batches))
    better, worse = int((right[0] > right[1]).sum()), int((right[0] < right[1]).sum())
    assert better and worse
    assert error == pytest.approx(100 * math.sqrt(better + worse) / 50)
    assert paired_difference(other, one, batches) == pytest.approx((-difference, error))
    assert paired_difference(one, one, batches) == (0.0, 0.0)


def test_the_right_answers_are_in_the_order_of_the_labels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    batches = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (7, 30, 13)]
    found = right_answers(net, batches)
    assert found.dtype == torch.bool
    expected = [int(row.argmax()) == int(label) for x, y in batches for row, label in zip(net[0](x), y, strict=True)]
    assert found.tolist() == expected and 0 < sum(expected) < 50
    assert net.training and net[1].training
    assert len(right_answers(net, [])) == 0


def test_one_sample_more_is_no_lead_and_two_are():
    torch.manual_seed(0)
    net, other = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(200, 4)
    ours, theirs = net(x).argmax(1), other(x).argmax(1)
    differ = torch.nonzero(ours != theirs).flatten()
    for num_better in (1, 2):
        labels = theirs.clone()
        labels[differ] = 3 - ours[differ] - theirs[differ]  # the class that neither says
        labels[differ[:num_better]] = ours[differ[:num_better]]
        lead, error = paired_difference(net, other, [(x, labels)])
        assert lead == pytest.approx(100 * num_better / 200)
        assert (lead > error) == (num_better > 1)


def test_the_paired_difference_of_no_samples_is_refused():
    with pytest.raises(InputError, match="at least one labelled sample"):
        paired_difference(nn.Linear(4, 3), nn.Linear(4, 3), [])


def test_a_supernet_is_scored_by_soft_accuracy_where_asked():
    score = SupernetScore(_Tiny(), _classified(2, seed=1), _classified(2, seed=2), score_fn=soft_accuracy)
    scores = [score(Widths({"features": width})) for width in (4, 2)]
    assert 40 < scores[1] < 60 < scores[0] < 100


# Supernet score -------------------------------------------------------------------------------------------------------


class _Tiny(nn.Module):
    """A stand-in supernet: features below the width decide the class; statistics as training might leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean = torch.tensor([1e3, -1e3, 2e3, -2e3])

    def subnet(self, widths: Widths) -> nn.Module:
        norm = nn.BatchNorm1d(4)
        norm.load_state_dict(self.norm.state_dict())
        norm.weight = self.norm.weight
        keep = nn.Linear(4, 4, bias=False)
        mask = (torch.arange(4) < widths["features"]).float()
        keep.weight = nn.Parameter(torch.diag(mask))
        return nn.Sequential(norm, nn.Dropout(0.9), keep)


def _classified(num_batches: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 40 samples, classes equally often, where the largest feature is the class."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 4
    return [
        (nn.functional.one_hot(labels, 4) * 10 + torch.rand(40, 4, generator=rng), labels) for _ in range(num_batches)
    ]


def test_a_candidate_is_recalibrated_before_it_is_scored():
    supernet = _Tiny()
    score = SupernetScore(supernet, _classified(2, seed=1), _classified(2, seed=2))
    assert accuracy(supernet.subnet(Widths({"features": 4})), _classified(2, seed=2)) < 50
    assert score(Widths({"features": 4})) == 100.0
    # Without features 2 and 3 their two classes look alike, so one of them is always wrong.
    assert score(Widths({"features": 2})) == 75.0


def test_scoring_changes_nothing_of_the_supernet_and_repeats_exactly():
    supernet = _Tiny().train()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    score = SupernetScore(supernet, _batches(2), _batches(2, seed=5))
    scores = [score(Widths({"features": width})) for width in (4, 1, 4, 1)]
    assert scores[:2] == scores[2:]
    assert supernet.training and supernet.norm.training
    for name, value in supernet.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_batches_are_read_once_so_generators_will_do():
    score = SupernetScore(_Tiny(), iter(_classified(1, seed=1)), iter(_classified(1, seed=2)))
    widths = Widths({"features": 4})
    assert score(widths) == score(widths) == 100.0


def test_a_score_of_ones_own_sees_the_recalibrated_module_in_eval_mode():
    batches = [{"image": x, "label": [y]} for x, y in _classified(2, seed=1)]

    def mean_output(module: nn.Module, given: list[dict[str, torch.Tensor]]) -> float:
        assert not module.training and not torch.is_grad_enabled() and len(given) == 2
        return float(torch.cat([module(batch["image"]) for batch in given]).mean())

    score = SupernetScore(
        _Tiny(), batches, batches, score_fn=mean_output, forward_fn=lambda module, batch: module(batch["image"])
    )
    assert abs(score(Widths({"features": 4}))) < 0.05  # centred by its own statistics


def test_a_broken_candidate_scores_nan():
    supernet = _Tiny()
    nn.init.constant_(supernet.norm.weight, math.nan)
    score = SupernetScore(supernet, _batches(1), _batches(1))
    assert math.isnan(score(Widths({"features": 4})))


def test_empty_data_is_named():
    with pytest.raises(InputError, match="calibration and validation gave none"):
        SupernetScore(_Tiny(), [], [])
    with pytest.raises(InputError, match="; validation gave none.*drop_last"):
        SupernetScore(_Tiny(), _batches(), [])


def test_batches_are_kept_on_the_device_asked_for():
    seen: list[torch.device] = []

    def score_fn(module: nn.Module, batches: list[tuple[torch.Tensor, list[torch.Tensor]]]) -> float:
        seen.extend([batches[0][0].device, batches[0][1][0].device])
        return 0.0

    class Meta(_Tiny):
        def subnet(self, widths: Widths) -> nn.Module:
            return nn.Identity()

    batches = [(torch.zeros(2, 4), [torch.zeros(2)])]
    SupernetScore(Meta(), batches, batches, score_fn=score_fn, device="meta")(Widths({"features": 4}))
    SupernetScore(Meta().to("meta"), batches, batches, score_fn=score_fn)(Widths({"features": 4}))
    assert seen == [torch.device("meta")] * 4


class _Subnets:
    """A supernet of one net."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def subnet(self, widths: Widths, /) -> nn.Module:
        return copy.deepcopy(self.net)


class _Views(nn.Module):
    """Reads a feature map as a vector by `view`, which channels-last images refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(len(x), -1))


@pytest.mark.parametrize("reads_channels_last", [True, False])
def test_images_are_scored_channels_last_where_the_subnets_can_read_them_so(reads_channels_last: bool):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    net = net if reads_channels_last else _Views()
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(3)]
    seen: list[bool] = []

    def score(module: nn.Module, given: list[Any]) -> float:
        seen.extend(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in given)
        return soft_accuracy(module, given)

    found = SupernetScore(_Subnets(net), batches, batches, score_fn=score)(Widths({}))
    recalibrate(net, batches)
    assert found == pytest.approx(soft_accuracy(net, batches), rel=1e-5)
    assert seen == [reads_channels_last] * 3
