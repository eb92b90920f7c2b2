"""Blocks of several layers. Sizes that count channels are read from the input or kept as attributes."""

import torch
from torch import nn
from torch.nn import functional as F

from parts.layers import conv, conv_norm
from parts.made import Made, Random


class Residual(nn.Module):
    """A body whose result is added to its input, mostly with an activation after it."""

    def __init__(self, body: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.act = body, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        return self.act(self.body(x) + x)


def residual(rng: Random, channels: int, side: int) -> Made:
    inner = rng.choice([8, 16])
    body = nn.Sequential(conv_norm(rng, channels, inner), conv_norm(rng, inner, channels))
    return Made(Residual(body, rng.choice([nn.Identity(), nn.ReLU()])), channels, side)


class Dense(nn.Module):
    """Layers that read everything before them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C + growth, H, W)."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def dense(rng: Random, channels: int, side: int) -> Made | None:
    if channels > 24:
        return None
    return Made(
        Dense(
            [conv_norm(rng, channels, 8), nn.Sequential(nn.BatchNorm2d(channels + 8), conv(rng, channels + 8, 8, 1))]
        ),
        channels + 16,
        side,
    )


class Excite(nn.Module):
    """Squeeze and excite, by convolutions or by linear layers."""

    def __init__(self, channels: int, *, linear: bool) -> None:
        super().__init__()
        make = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.linear = linear
        self.squeeze, self.excite = make(channels, 8), make(8, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate (B, C, H, W)."""
        if self.linear:
            gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
            return x * gate.view(x.shape[0], -1, 1, 1)
        return x * self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


def excite(rng: Random, channels: int, side: int) -> Made:
    return Made(Excite(channels, linear=rng.random() < 0.5), channels, side)


class Slide(nn.Module):
    """Efficient channel attention: a convolution that slides along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate (B, C, H, W)."""
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * gate.transpose(1, 2).unsqueeze(-1)


def slide(rng: Random, channels: int, side: int) -> Made:
    return Made(Slide(), channels, side)


class SpatialGate(nn.Module):
    """A map of one channel, made of the mean and the largest of all channels, gates them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate (B, C, H, W)."""
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.conv(both).sigmoid()


def spatial_gate(rng: Random, channels: int, side: int) -> Made:
    return Made(SpatialGate(), channels, side)


class Parted(nn.Module):
    """A number or a list of numbers cuts the channels; the first part is worked on."""

    def __init__(self, sizes: int | list[int], work: nn.Module) -> None:
        super().__init__()
        self.sizes, self.work = sizes, work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        first, *rest = torch.split(x, self.sizes, 1)
        return torch.cat([self.work(first), *rest], 1)


def parted(rng: Random, channels: int, side: int) -> Made | None:
    if channels % 4 or channels < 8:
        return None
    first = rng.choice([channels // 2, channels // 4])
    sizes = rng.choice([first, [first, channels - first]])
    return Made(Parted(sizes, conv_norm(rng, first, first)), channels, side)


class Scale(nn.Module):
    """A parameter or a buffer of one number a channel, multiplied or added."""

    gain: torch.Tensor

    def __init__(self, channels: int, *, trained: bool, added: bool) -> None:
        super().__init__()
        self.added = added
        values = torch.ones(channels, 1, 1)
        if trained:
            self.gain = nn.Parameter(values)
        else:
            self.register_buffer("gain", values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x + self.gain if self.added else x * self.gain


def scale(rng: Random, channels: int, side: int) -> Made:
    return Made(Scale(channels, trained=rng.random() < 0.7, added=rng.random() < 0.4), channels, side)


class LastMlp(nn.Module):
    """Two linear layers on the last axis, where the channels stand for them."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(channels), nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        y = self.fc2(F.gelu(self.fc1(self.norm(x.permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


def last_mlp(rng: Random, channels: int, side: int) -> Made:
    return Made(LastMlp(channels, rng.choice([8, 16])), channels, side)
