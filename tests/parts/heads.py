"""Heads: from features to scores."""

from itertools import pairwise

from torch import nn

from parts.layers import activation
from parts.made import Random


def head(rng: Random, channels: int, side: int, num_classes: int) -> nn.Module:
    """Return what maps (B, channels, side, side) to scores."""
    if rng.random() < 0.2:
        return nn.Sequential(nn.Conv2d(channels, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if rng.random() < 0.5:
        pools, features = [nn.AdaptiveAvgPool2d(1)], channels
    elif side <= 4:
        pools, features = [], channels * side * side
    else:
        pools, features = [nn.AdaptiveMaxPool2d(2)], channels * 4
    layers: list[nn.Module] = [*pools, nn.Flatten()]
    sizes = [features, *(rng.choice([8, 16]) for _ in range(rng.randint(0, 2)))]
    for before, after in pairwise(sizes):
        layers.append(nn.Linear(before, after))
        layers += rng.choice([[], [nn.BatchNorm1d(after)], [nn.LayerNorm(after)]])
        layers += [activation(rng, after), nn.Dropout(0.0)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))
