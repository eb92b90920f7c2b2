import math
from typing import Any

import pytest

from psenet.errors import InputError
from psenet.training import TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("epochs", -1, "an integer of at least 0"),
        ("epochs", 1.5, "an integer of at least 0"),
        ("epochs", True, "an integer of at least 0"),
        ("optimizer", "lion", "'sgd' or 'adamw'"),
        ("learning_rate", 0.0, "above 0 and finite"),
        ("learning_rate", math.nan, "above 0 and finite"),
        ("learning_rate", math.inf, "above 0 and finite"),
        ("weight_decay", -1e-4, "at least 0 and finite"),
        ("weight_decay", math.inf, "at least 0 and finite"),
        ("momentum", -0.1, "at least 0 and below 1"),
        ("momentum", 1.0, "at least 0 and below 1"),
        ("warmup_ratio", -0.1, "at least 0 and below 1"),
        ("warmup_ratio", 1.0, "at least 0 and below 1"),
        ("label_smoothing", -0.1, "at least 0 and below 1"),
        ("label_smoothing", 1.0, "at least 0 and below 1"),
        ("distill_weight", -0.1, "between 0 and 1"),
        ("distill_weight", 1.1, "between 0 and 1"),
        ("distill_temperature", 0.0, "above 0 and finite"),
        ("distill_temperature", math.inf, "above 0 and finite"),
        ("mixed_precision", "fp8", "'no', 'fp16' or 'bf16'"),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: Any, what: str):
    with pytest.raises(InputError) as caught:
        TrainConfig(**{name: value})
    assert str(caught.value) == f"training settings: {name} must be {what}; got {value!r}"


def test_all_settings_out_of_range_are_named_together():
    with pytest.raises(InputError, match="epochs must be .*; got -3; .*momentum must be .*; got 2"):
        TrainConfig(epochs=-3, momentum=2)


def test_the_ends_of_the_ranges_are_allowed():
    TrainConfig(epochs=0, weight_decay=0, momentum=0, warmup_ratio=0, label_smoothing=0, distill_weight=1)


def test_settings_are_frozen_and_unknown_ones_are_errors():
    with pytest.raises(AttributeError):
        TrainConfig().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="unexpected keyword argument 'lr'"):
        TrainConfig(lr=0.1)  # pyright: ignore[reportCallIssue]


def test_settings_as_a_dict_build_the_same_settings():
    config = TrainConfig(epochs=3, optimizer="adamw", mixed_precision="bf16")
    assert TrainConfig(**config.as_dict()) == config  # pyright: ignore[reportArgumentType]
