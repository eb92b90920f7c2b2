"""Layers: convolutions of every kind, norms, activations, pools."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from parts.functions import EVEN, HALVED, SAME, UNKNOWN, Op
from parts.made import Made, Random

_Padding = Literal["reflect", "replicate", "circular"]


def divisors(number: int, *others: int) -> list[int]:
    return [d for d in range(2, number) if all(n % d == 0 for n in (number, *others))]


def conv(rng: Random, num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the side, unless a stride says otherwise."""
    dilation = rng.choice([1, 1, 1, 2]) if kernel > 1 else 1
    others: tuple[_Padding, ...] = ("reflect", "replicate", "circular")
    padding_mode = rng.choice(others) if dilation == 1 and rng.random() < 0.4 else "zeros"
    bias = rng.random() < 0.5
    padding = dilation * (kernel // 2)
    return nn.Conv2d(*(num_in, num_out, kernel, stride, padding, dilation, groups, bias), padding_mode=padding_mode)


def conv_norm(rng: Random, num_in: int, num_out: int) -> nn.Module:
    """Return a convolution, mostly with a norm and an activation."""
    layers: list[nn.Module] = [conv(rng, num_in, num_out, rng.choice([1, 3, 3]))]
    if rng.random() < 0.7:
        layers.append(nn.BatchNorm2d(num_out))
    if rng.random() < 0.7:
        layers.append(activation(rng, num_out))
    return nn.Sequential(*layers)


def tied(rng: Random, block: nn.Module, channels: int) -> nn.Module:
    """Return a convolution with the weight of a block's first one, and a norm of its own."""
    owner = next(layer for layer in block.modules() if isinstance(layer, nn.Conv2d))
    twin = nn.Conv2d(channels, channels, owner.kernel_size[0], padding="same", bias=rng.random() < 0.5)
    twin.weight = owner.weight
    return nn.Sequential(twin, nn.BatchNorm2d(channels))


def activation(rng: Random, channels: int) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [nn.ReLU, nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid]
    kinds += [nn.PReLU, lambda: nn.PReLU(channels), lambda: nn.ReLU(inplace=True)]
    return rng.choice(kinds)()


def strided(side: int, stride: int) -> int:
    return (side - 1) // stride + 1


def convolution(rng: Random, channels: int, side: int) -> Made:
    num_out = rng.choice([8, 12, 16, 24])
    stride = 2 if side > 2 and rng.random() < 0.25 else 1
    layers: list[nn.Module] = [conv(rng, channels, num_out, rng.choice([1, 3]) if side > 2 else 1, stride=stride)]
    if rng.random() < 0.5:
        layers.append(nn.BatchNorm2d(num_out))
    if rng.random() < 0.5:
        layers.append(activation(rng, num_out))
    return Made(nn.Sequential(*layers), num_out, strided(side, stride))


def grouped(rng: Random, channels: int, side: int) -> Made | None:
    num_out = rng.choice([channels, 8, 16, 24])
    groups = divisors(channels, num_out)
    return (
        Made(conv(rng, channels, num_out, 3, groups=rng.choice(groups)), num_out, side) if groups and side > 2 else None
    )


def depthwise(rng: Random, channels: int, side: int) -> Made | None:
    times = rng.choice([1, 1, 2])
    return Made(conv(rng, channels, channels * times, 3, groups=channels), channels * times, side) if side > 2 else None


def transposed(rng: Random, channels: int, side: int) -> Made | None:
    num_out = rng.choice([8, 16])
    groups = rng.choice([1, 1, *divisors(channels, num_out)])
    if side > 8:
        return None
    return Made(nn.ConvTranspose2d(channels, num_out, 2, 2, groups=groups, bias=rng.random() < 0.5), num_out, 2 * side)


def transposed_depthwise(rng: Random, channels: int, side: int) -> Made | None:
    return Made(nn.ConvTranspose2d(channels, channels, 3, 1, 1, groups=channels), channels, side) if side > 2 else None


def weight_normed(rng: Random, channels: int, side: int) -> Made:
    return Made(weight_norm(nn.Conv2d(channels, 16, 1, bias=rng.random() < 0.5)), 16, side)


class StandardisedConv(nn.Conv2d):
    """A convolution whose weight is standardised for each output channel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Convolve with the standardised weight."""
        weight = self.weight
        mean, variance = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True, correction=0)
        return self._conv_forward(input, (weight - mean) / (variance + 1e-5).sqrt(), self.bias)


def standardised(rng: Random, channels: int, side: int) -> Made | None:
    num_out = rng.choice([8, 16])
    return Made(StandardisedConv(channels, num_out, 3, padding=1), num_out, side) if side > 2 else None


def batch_norm(rng: Random, channels: int, side: int) -> Made:
    return Made(
        nn.BatchNorm2d(channels, affine=rng.random() < 0.7, track_running_stats=rng.random() < 0.8), channels, side
    )


def instance_norm(rng: Random, channels: int, side: int) -> Made | None:
    affine, tracked = rng.random() < 0.5, rng.random() < 0.3
    if side == 1:
        return None
    return Made(nn.InstanceNorm2d(channels, affine=affine, track_running_stats=tracked), channels, side)


def group_norm(rng: Random, channels: int, side: int) -> Made:
    return Made(nn.GroupNorm(rng.choice([1, *divisors(channels)]), channels, affine=rng.random() < 0.8), channels, side)


class NormOfLast(nn.Module):
    """A layer norm or RMS norm over channels, which stand last for it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, H, W) over C."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def channel_norm(rng: Random, channels: int, side: int) -> Made:
    affine = rng.random() < 0.7
    norm = rng.choice([nn.LayerNorm, nn.RMSNorm])(channels, elementwise_affine=affine)
    return Made(NormOfLast(norm), channels, side)


def whole_norm(rng: Random, channels: int, side: int) -> Made | None:
    shape = rng.choice([[side, side], [channels, side, side]])
    return Made(nn.LayerNorm(shape), channels, side) if side > 1 else None


def act(rng: Random, channels: int, side: int) -> Made:
    layer = activation(rng, channels)
    # What others may have saved for their gradients must not be changed in place.
    return Made(nn.ReLU() if getattr(layer, "inplace", False) else layer, channels, side)


def function(rng: Random, channels: int, side: int) -> Made:
    return Made(Op(rng.choice(list(SAME))), channels, side)


def unknown(rng: Random, channels: int, side: int) -> Made:
    return Made(Op(rng.choice(list(UNKNOWN))), channels, side)


def rearranged(rng: Random, channels: int, side: int) -> Made | None:
    options = [Made(Op("concatenated_relu"), 2 * channels, side), Made(Op("padded"), channels + 4, side)]
    if channels % 2 == 0:
        options += [Made(Op(name), channels, side) for name in EVEN]
    if channels % 2 == 0 and channels > 8:
        options += [Made(Op(name), channels // 2, side) for name in HALVED]
    if channels % 4 == 0 and channels > 8:
        options.append(Made(Op("last_quarters"), channels - channels // 4, side))
    if side > 1:
        options.append(Made(Op("deviation"), channels, side))
    return rng.choice([option for option in options if option.channels <= 48] or [None])


def pool(rng: Random, channels: int, side: int) -> Made | None:
    if side < 4:
        return None
    options: list[tuple[nn.Module, int]] = [
        *((nn.MaxPool2d(2), side // 2), (nn.AvgPool2d(2), side // 2), (nn.MaxPool2d(3, 1, 1), side)),
        *((nn.AvgPool2d(3, 1, 1, count_include_pad=False), side), (nn.AdaptiveAvgPool2d(3), 3)),
        (nn.AdaptiveMaxPool2d(2), 2),
    ]
    module, new_side = rng.choice(options)
    return Made(module, channels, new_side)


def upsample(rng: Random, channels: int, side: int) -> Made | None:
    mode = rng.choice(["nearest", "bilinear"])
    return Made(nn.Upsample(scale_factor=2, mode=mode), channels, 2 * side) if side <= 4 else None


def pixel_shuffle(rng: Random, channels: int, side: int) -> Made | None:
    if channels % 16 == 0 and side <= 4:
        return Made(nn.PixelShuffle(2), channels // 4, 2 * side)
    if side % 2 == 0 and channels <= 8:
        return Made(nn.PixelUnshuffle(2), channels * 4, side // 2)
    return Made(nn.ChannelShuffle(2), channels, side) if channels % 2 == 0 else None


def dropout(rng: Random, channels: int, side: int) -> Made:
    return Made(rng.choice([nn.Dropout(0.0), nn.Dropout2d(0.0), nn.Identity()]), channels, side)
