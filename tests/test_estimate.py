import copy
from typing import Any

import pytest
import torch
from torch import nn

import psenet
from psenet import estimate
from psenet.estimate import estimate_seconds, say_duration
from psenet.training.losses import cross_entropy

_OPTIONS: dict[str, Any] = {
    "steps": {"baseline": 10, "supernet": 20, "finetune": 8},
    "num_subnets": 4,
    "strategy": "parallel",
    "num_calibration": 32,
    "num_validation": 96,
    "num_evaluations": 5,
    "keep_ratio": 0.5,
    "device": torch.device("cpu"),
    "loss_fn": cross_entropy(),
}


def _nets() -> tuple[nn.Module, psenet.Supernet]:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(16, 4))
    return model, psenet.Supernet(model, psenet.trace(model, torch.zeros(2, 3, 8, 8)))


def _batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, 8, 8), torch.arange(size) % 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock on which every measured piece of work takes as long as the first number of a list says."""
    seconds, now = [1.0], [0.0]

    def perf_counter() -> float:
        now[0] += seconds[0] / 2  # read once before and once after: the pause between two counts to no one
        return now[0]

    monkeypatch.setattr(estimate.time, "perf_counter", perf_counter)
    return seconds


@pytest.mark.parametrize("strategy", ["parallel", "sandwich"])
def test_every_stage_takes_some_time(strategy: str):
    seconds = estimate_seconds(*_nets(), _batch(), **{**_OPTIONS, "strategy": strategy})
    assert list(seconds) == ["baseline", "supernet", "search", "finetune"]
    assert all(0 < value < 60 for value in seconds.values())


def test_nothing_is_trained_and_everything_stays_as_it_was():
    model, supernet = _nets()
    model.eval()
    batch = _batch()
    before, batch_before = copy.deepcopy((model.state_dict(), supernet.state_dict())), copy.deepcopy(batch)
    estimate_seconds(model, supernet, batch, **_OPTIONS)
    for ours, expected in zip((model.state_dict(), supernet.state_dict()), before, strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert all(torch.equal(ours, expected) for ours, expected in zip(batch, batch_before, strict=True))
    assert not any(part.training for part in model.modules()) and all(part.training for part in supernet.modules())
    for parameter in (*model.parameters(), *supernet.parameters()):
        assert parameter.grad is None


def test_seconds_are_those_of_a_step_times_the_number_of_steps(clock: list[float]):
    # Each measured piece of work lasts half a second: a step of either training, and a forward pass of 8 images.
    seconds = estimate_seconds(*_nets(), _batch(8), **_OPTIONS)
    share = 0.3 + 0.7 * 0.5  # half the MACs take more than half the time
    assert seconds == pytest.approx(
        {
            "baseline": 0.5 * 10,
            "supernet": 0.5 * 20,
            "search": 5 * 0.5 / 8 * (32 + 96) * share,
            "finetune": 0.5 * 8 * share,
        }
    )


def test_stages_without_steps_take_no_time(clock: list[float]):
    none = {"steps": {"baseline": 0, "supernet": 0, "finetune": 0}, "num_evaluations": 0}
    seconds = estimate_seconds(*_nets(), _batch(), **{**_OPTIONS, **none})
    assert seconds == {"baseline": 0, "supernet": 0, "search": 0, "finetune": 0}


@pytest.mark.parametrize("size", [3, 9])
def test_a_batch_too_small_for_the_number_of_subnets_will_do(size: int):
    # One value per channel and sample: a batch norm needs two samples of each subnet.
    model = nn.Sequential(nn.Conv2d(3, 16, 8), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    supernet = psenet.Supernet(model, psenet.trace(model, torch.zeros(2, 3, 8, 8)))
    seconds = estimate_seconds(model, supernet, _batch(size), **{**_OPTIONS, "num_subnets": 8})
    assert seconds["supernet"] > 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "1 s"),
        (0.2, "1 s"),
        (1.4, "1 s"),
        (45.0, "45 s"),
        (89.4, "89 s"),
        (91.0, "2 min"),
        (720.0, "12 min"),
        (5390.0, "90 min"),
        (5400.0, "1.5 h"),
        (12600.0, "3.5 h"),
        (360000.0, "100.0 h"),
    ],
)
def test_durations_are_said_in_the_unit_a_person_would_take(seconds: float, words: str):
    assert say_duration(seconds) == words
