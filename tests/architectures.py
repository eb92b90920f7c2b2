"""Tiny networks, one for each way in which channels can hang together. Inputs are at most 16 pixels wide.

`ARCHITECTURES` maps a name to a function that builds the network (weights from torch's global generator) and the shape
of one sample. All dropouts have probability 0, so that train mode can be compared between runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import psenet
from psenet.space import WidthSpace


@dataclass(frozen=True)
class Architecture:
    build: Callable[[], nn.Module]
    sample_shape: tuple[int, ...] = (3, 10, 10)

    def batch(self, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((size, *self.sample_shape), generator=generator, dtype=torch.float64).to(dtype)

    def model(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Build the network with every tensor random, so that no channel is dead and none like another."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build().double()
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    if tensor.ndim == 1 and tensor.is_floating_point():
                        tensor.copy_(
                            torch.rand_like(tensor) * 0.5 + (0.75 if name.endswith(("weight", "var")) else -0.25)
                        )
        return model.to(dtype)


def conv_bn(num_in: int, num_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(num_out)
    )


class Head(nn.Sequential):
    def __init__(self, num_in: int, num_classes: int = 5) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(num_in, num_classes))


def vgg_bn() -> nn.Module:
    return nn.Sequential(
        *(conv_bn(3, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv_bn(16, 24), nn.ReLU()),
        *(conv_bn(24, 32), nn.ReLU()),
        Head(32),
    )


def vgg_without_norm() -> nn.Module:
    """A sigmoid is not zero at zero and biases are not either: masks must stand before the convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Sigmoid(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)),
    )


class BasicBlock(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(num_in, num_out, stride=stride), conv_bn(num_out, num_out)
        self.shortcut = nn.Identity() if num_in == num_out and stride == 1 else conv_bn(num_in, num_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()


class Bottleneck(nn.Module):
    def __init__(self, num_in: int, num_mid: int, num_out: int) -> None:
        super().__init__()
        self.reduce, self.conv, self.expand = (
            conv_bn(num_in, num_mid, 1),
            conv_bn(num_mid, num_mid),
            conv_bn(num_mid, num_out, 1),
        )
        self.shortcut = conv_bn(num_in, num_out, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.expand(self.relu(self.conv(self.relu(self.reduce(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def resnet_basic() -> nn.Module:
    stem = [conv_bn(3, 16), nn.ReLU()]
    return nn.Sequential(*stem, BasicBlock(16, 16), BasicBlock(16, 24, 2), BasicBlock(24, 24), Head(24))


def resnet_bottleneck() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), nn.ReLU(), Bottleneck(16, 8, 32), Bottleneck(32, 16, 32), Head(32))


def mobilenet_v1() -> nn.Module:
    def block(num_in: int, num_out: int) -> nn.Sequential:
        return nn.Sequential(
            conv_bn(num_in, num_in, groups=num_in), nn.ReLU6(), conv_bn(num_in, num_out, 1), nn.ReLU6()
        )

    return nn.Sequential(conv_bn(3, 16), nn.ReLU6(), block(16, 24), block(24, 32), Head(32))


class SqueezeExcite(nn.Module):
    def __init__(
        self, num: int, num_squeezed: int, act: Callable[[], nn.Module], gate: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.reduce, self.act = nn.Conv2d(num, num_squeezed, 1), act()
        self.expand, self.gate = nn.Conv2d(num_squeezed, num, 1), gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, num_in: int, num_mid: int, num_out: int, act: Any = nn.ReLU6, gate: Any = None) -> None:
        super().__init__()
        self.expand = nn.Sequential(conv_bn(num_in, num_mid, 1), act())
        self.depthwise = nn.Sequential(conv_bn(num_mid, num_mid, groups=num_mid), act())
        self.se = nn.Identity() if gate is None else SqueezeExcite(num_mid, 8, act, gate)
        self.project = conv_bn(num_mid, num_out, 1)
        self.skip = num_in == num_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.project(self.se(self.depthwise(self.expand(x))))
        return x + out if self.skip else out


def inverted_residuals(act: Any, gate: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(
            *(conv_bn(3, 16), act()),
            *(InvertedResidual(16, 24, 16, act, gate), InvertedResidual(16, 32, 24, act, gate)),
            *(conv_bn(24, 32, 1), act(), Head(32)),
        )

    return build


class DenseLayer(nn.Module):
    """Pre-activation: each reader of the growing concatenation normalises it anew."""

    def __init__(self, num_in: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(num_in), nn.Conv2d(num_in, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x), inplace=True))], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        *(DenseLayer(16, 8), DenseLayer(24, 8)),
        *(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False), nn.AvgPool2d(2)),
        *(DenseLayer(16, 8), nn.BatchNorm2d(24), nn.ReLU(), Head(24)),
    )


class GroupedBlock(nn.Module):
    def __init__(self, num_in: int, num_out: int, group_width: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(num_in, num_out, 1)
        self.conv2 = conv_bn(num_out, num_out, groups=num_out // group_width)
        self.se = SqueezeExcite(num_out, 8, nn.ReLU, nn.Sigmoid)
        self.conv3, self.shortcut = conv_bn(num_out, num_out, 1), conv_bn(num_in, num_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.se(self.conv2(self.conv1(x).relu()).relu())
        return (self.conv3(out) + self.shortcut(x)).relu()


def regnet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), nn.ReLU(), GroupedBlock(16, 24, 4), GroupedBlock(24, 32, 8), Head(32))


def channel_multiplier() -> nn.Module:
    return nn.Sequential(
        *(conv_bn(3, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=16, bias=True), nn.BatchNorm2d(32), nn.ReLU()),
        *(conv_bn(32, 16, 1), nn.ReLU(), Head(16)),
    )


class SplitByConcat(nn.Module):
    """`cat(a, b) + c` splits the channels of c into those of a and those of b."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.a, self.b, self.c = conv_bn(16, 8), conv_bn(16, 16, 1), conv_bn(16, 24, 1)
        self.mix, self.head = conv_bn(24, 16), Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.a(x), self.b(x)], 1) + self.c(x)
        return self.head(self.mix(x.relu()).relu())


def flatten_to_linear() -> nn.Module:
    return nn.Sequential(
        *(conv_bn(3, 16), nn.ReLU(), nn.MaxPool2d(2), conv_bn(16, 24), nn.ReLU(), nn.AdaptiveAvgPool2d(3)),
        *(nn.Flatten(), nn.Linear(24 * 9, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)),
    )


def mlp_head() -> nn.Module:
    return nn.Sequential(
        *(conv_bn(3, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.0)),
        *(nn.Linear(32, 24, bias=False), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.0), nn.Linear(24, 5)),
    )


def norm_without_affine() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24, affine=False), nn.SiLU(), Head(24)),
    )


def norm_without_statistics() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24, affine=False, track_running_stats=False), nn.ReLU(), Head(24)),
    )


class CalledTwice(nn.Module):
    """One block, norm included, runs twice in a row; its input and output are thereby one group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.down = conv_bn(3, 16), conv_bn(16, 16), conv_bn(16, 24)
        self.head = Head(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.block(self.stem(x).relu()).relu()).relu()
        return self.head(self.down(x).relu())


class TiedWeights(nn.Module):
    """Two convolutions own one weight, but each has its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv_bn(3, 16), conv_bn(16, 16), conv_bn(16, 16)
        self.second[0].weight = self.first[0].weight
        self.wide, self.head = conv_bn(16, 24, 1), Head(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head(self.wide(self.second(self.first(x).relu()).relu()).relu())


class OneModuleInTwoPlaces(nn.Module):
    """A stage stands at two paths of the tree and runs at both."""

    def __init__(self) -> None:
        super().__init__()
        stage = nn.Sequential(conv_bn(16, 16), nn.ReLU())
        self.stem, self.first, self.middle, self.again = conv_bn(3, 16), stage, nn.MaxPool2d(2), stage
        self.wide, self.head = conv_bn(16, 24, 1), Head(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.again(self.middle(self.first(self.stem(x))))).relu())


class FunctionalDropout(nn.Module):
    """Hand-written forward: functional calls, a sum over space, a view that keeps the channels free."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.fc1, self.fc2 = nn.Conv2d(16, 24, 3, stride=2), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.leaky_relu(self.conv2(x)).sum((2, 3))
        x = F.dropout(x.view(x.shape[0], -1), 0.0, self.training)
        return F.log_softmax(self.fc2(torch.tanh(self.fc1(x))), dim=1)


# Channels cut, moved, and normalised in other ways --------------------------------------------------------------------


class ChannelShuffle(nn.Module):
    """ShuffleNetV2: half of the channels pass, the other half works, then both are interleaved."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn(num // 2, num // 2, 1), nn.ReLU(), conv_bn(num // 2, num // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passing, working = x.chunk(2, dim=1)
        x = torch.cat([passing, self.branch(working)], 1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), nn.ReLU(), ChannelShuffle(16), ChannelShuffle(16), conv_bn(16, 24), Head(24))


class Hierarchical(nn.Module):
    """Res2Net: the width of a part is a number that the module keeps."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.width = num // 2
        self.convs = nn.ModuleList([conv_bn(self.width, self.width) for _ in range(2)])
        self.mix = conv_bn(num, num, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(x, self.width, 1)
        first = self.convs[0](first).relu()
        return self.mix(torch.cat([first, self.convs[1](second + first)], 1)) + x


class PartialConvolution(nn.Module):
    """FasterNet: a convolution of the first channels only, cut by a list of numbers that the module keeps."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.sizes = [num // 4, num - num // 4]
        self.conv, self.mix = nn.Conv2d(num // 4, num // 4, 3, padding=1), conv_bn(num, num, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, rest = torch.split(x, self.sizes, dim=1)
        return self.mix(torch.cat([self.conv(first), rest], 1)).relu()


def cut_by_numbers() -> nn.Module:
    return nn.Sequential(conv_bn(3, 32), nn.ReLU(), Hierarchical(32), PartialConvolution(32), conv_bn(32, 16), Head(16))


class ZeroPaddedShortcut(nn.Module):
    """The shortcut of He et al., option A: every second pixel, new channels zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv_bn(3, 16), conv_bn(16, 32, 3, 2), conv_bn(32, 32)
        self.head = Head(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y = self.conv2(self.conv1(x).relu())
        return self.head((y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))).relu())


class ChannelsLastBlock(nn.Module):
    """ConvNeXt: a depthwise convolution, then a layer norm and an MLP on the last axis, and a layer scale."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(num, num, 3, padding=1, groups=num), nn.LayerNorm(num)
        self.fc1, self.fc2 = nn.Linear(num, 2 * num), nn.Linear(2 * num, num)
        self.scale = nn.Parameter(torch.full((num,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(F.gelu(self.fc1(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """A layer norm over the channels of (B, C, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 2, 2), LayerNorm2d(16)]
    down = [LayerNorm2d(16), nn.Conv2d(16, 24, 2, 2)]
    return nn.Sequential(*stem, ChannelsLastBlock(16), *down, ChannelsLastBlock(24), Head(24))


class RmsNorm2d(nn.Module):
    """Written by hand: a mean over channels."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
        return x * scale * self.weight.view(1, -1, 1, 1)


def rms_norms() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), RmsNorm2d(16), nn.GELU(), nn.Conv2d(16, 24, 3), RmsNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.RMSNorm(24), nn.Linear(24, 5)),
    )


def group_norms() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 24, 3), nn.GroupNorm(1, 24), nn.ReLU()),
        *(nn.Conv2d(24, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.PReLU(16), Head(16)),
    )


class EfficientChannelAttention(nn.Module):
    """ECA: a convolution that slides along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return x * y.sigmoid().view(x.shape[0], -1, 1, 1).expand_as(x)


def efficient_attention() -> nn.Module:
    return nn.Sequential(
        *(conv_bn(3, 16), nn.ReLU(), EfficientChannelAttention()),
        *(conv_bn(16, 24), EfficientChannelAttention(), nn.ReLU(), Head(24)),
    )


class SelectiveKernel(nn.Module):
    """SKNet: two branches, stacked, and a softmax between them for every channel."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.small, self.large = conv_bn(num, num), conv_bn(num, num, 5)
        self.reduce, self.expand = nn.Conv2d(num, 8, 1), nn.Conv2d(8, 2 * num, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = torch.stack([self.small(x).relu(), self.large(x).relu()], dim=1)
        gates = self.expand(self.reduce(branches.sum(1).mean((2, 3), keepdim=True)).relu())
        batch, channels = gates.shape[:2]
        return (branches * gates.view(batch, 2, channels // 2, 1, 1).softmax(dim=1)).sum(1)


class SplitAttention(nn.Module):
    """ResNeSt: one convolution in two groups, whose halves compete for every channel."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.conv = conv_bn(num, 2 * num, groups=2)
        self.reduce, self.expand = nn.Conv2d(num, 8, 1), nn.Conv2d(8, 2 * num, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 2, channels // 2, height, width)
        gates = self.expand(self.reduce(x.sum(1).mean((2, 3), keepdim=True)).relu())
        gates = gates.view(batch, 1, 2, -1).transpose(1, 2).softmax(dim=1).reshape(batch, 2, channels // 2, 1, 1)
        return (x * gates).sum(1)


def split_attention() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), nn.ReLU(), SplitAttention(16), conv_bn(16, 24), nn.ReLU(), Head(24))


def selective_kernel() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), nn.ReLU(), SelectiveKernel(16), conv_bn(16, 24), nn.ReLU(), Head(24))


class UpAndDown(nn.Module):
    """A decoder: transposed convolution, interpolation, pixel shuffle, skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv_bn(3, 16, stride=2), conv_bn(16, 24, stride=2)
        self.up = nn.ConvTranspose2d(24, 16, 3, stride=2, padding=1)
        self.norm, self.mix = nn.BatchNorm2d(16), conv_bn(32, 32)
        self.shuffle, self.out = nn.PixelShuffle(2), nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down1(x).relu()
        y = self.norm(self.up(self.down2(skip).relu())).relu()
        y = torch.cat([F.interpolate(y, size=skip.shape[-2:], mode="nearest"), skip], 1)
        return self.out(self.shuffle(self.mix(y).relu())).mean((2, 3))


class Blur(nn.Module):
    """Anti-aliasing: one fixed filter for all channels, whose number the module keeps."""

    filter: torch.Tensor

    def __init__(self, num: int) -> None:
        super().__init__()
        self.channels = num
        self.register_buffer("filter", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.filter.expand(self.channels, -1, -1, -1), stride=2, groups=self.channels)


class PartialShortcut(nn.Module):
    """ReXNet: the input is added, in place, to the first channels of a wider output."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.in_channels, self.conv = num_in, conv_bn(num_in, num_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return torch.cat([y[:, : self.in_channels] + x, y[:, self.in_channels :]], dim=1)


def blur_and_partial_shortcut() -> nn.Module:
    return nn.Sequential(
        *(conv_bn(3, 16), nn.ReLU(), Blur(16), PartialShortcut(16, 24), nn.ReLU(), conv_bn(24, 16), Head(16))
    )


class FunctionalNorm(nn.Module):
    """Batch norm called as a function, its tensors raw parameters and buffers."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), Head(24)
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.register_buffer("running_mean", torch.zeros(16))
        self.register_buffer("running_var", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(self.stem(x), self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return self.head(self.conv(x.relu()).relu())


ARCHITECTURES = {
    "vgg_bn": Architecture(vgg_bn),
    "vgg_without_norm": Architecture(vgg_without_norm),
    "resnet_basic": Architecture(resnet_basic),
    "resnet_bottleneck": Architecture(resnet_bottleneck),
    "mobilenet_v1": Architecture(mobilenet_v1),
    "mobilenet_v2": Architecture(inverted_residuals(nn.ReLU6, None)),
    "mobilenet_v3": Architecture(inverted_residuals(nn.Hardswish, nn.Hardsigmoid)),
    "efficientnet": Architecture(inverted_residuals(nn.SiLU, nn.Sigmoid)),
    "densenet": Architecture(densenet),
    "regnet": Architecture(regnet),
    "channel_multiplier": Architecture(channel_multiplier),
    "split_by_concat": Architecture(SplitByConcat),
    "flatten_to_linear": Architecture(flatten_to_linear),
    "mlp_head": Architecture(mlp_head),
    "norm_without_affine": Architecture(norm_without_affine),
    "norm_without_statistics": Architecture(norm_without_statistics),
    "called_twice": Architecture(CalledTwice),
    "tied_weights": Architecture(TiedWeights),
    "one_module_in_two_places": Architecture(OneModuleInTwoPlaces),
    "functional_dropout": Architecture(FunctionalDropout),
    "shufflenet": Architecture(shufflenet),
    "cut_by_numbers": Architecture(cut_by_numbers),
    "zero_padded_shortcut": Architecture(ZeroPaddedShortcut),
    "convnext": Architecture(convnext, (3, 8, 8)),
    "rms_norms": Architecture(rms_norms),
    "group_norms": Architecture(group_norms),
    "efficient_attention": Architecture(efficient_attention),
    "selective_kernel": Architecture(selective_kernel),
    "split_attention": Architecture(split_attention),
    "up_and_down": Architecture(UpAndDown, (3, 8, 8)),
    "blur_and_partial_shortcut": Architecture(blur_and_partial_shortcut),
    "functional_norm": Architecture(FunctionalNorm),
}

TIMM_SIDES = {
    "resnet18": 32,
    "mobilenetv2_100": 32,
    "mobilenetv3_small_100": 32,
    "efficientnet_b0": 32,
    "regnety_002": 32,
    "legacy_seresnet18": 64,
}
SLOW_TIMM_SIDES = {"densenet121": 32, "vgg11_bn": 32}


@cache
def traced(name: str, *, divisor: int = 4) -> tuple[nn.Module, WidthSpace]:
    """Return a network in float64 and its space, made once for all tests: do not change them."""
    architecture = ARCHITECTURES[name] if name in ARCHITECTURES else timm_architecture(name)
    model = architecture.model(dtype=torch.float32)
    space = psenet.trace(model, architecture.batch(2, dtype=torch.float32), divisor=divisor)
    return model.double(), space


def timm_architecture(name: str) -> Architecture:
    side = (TIMM_SIDES | SLOW_TIMM_SIDES)[name]

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, drop_rate=0.0)

    return Architecture(build, (3, side, side))
