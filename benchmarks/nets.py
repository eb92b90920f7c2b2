"""Nets of other projects' tutorials, for comparison on the same task."""

import torch
from torch import nn
from torch.nn import functional as F


class ZeroPaddedBlock(nn.Module):
    """A basic block whose shortcut takes every second pixel and pads channels with zeros (He et al., option A)."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - in_channels) // 2

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        y_BCHW = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x_BCHW)))))
        if self.padding or self.stride > 1:
            thinned_BCHW = x_BCHW[:, :, :: self.stride, :: self.stride]
            x_BCHW = F.pad(thinned_BCHW, (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y_BCHW + x_BCHW)


class ZeroPaddedResNet20(nn.Module):
    """The CIFAR ResNet-20 that the tutorial of NVIDIA Model Optimizer's FastNAS prunes: 40.6M MACs, 269,722 parameters.

    Its shortcuts have no weights (He et al., arXiv 1512.03385, section 4.2, option A).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for width in (16, 32, 64):
            for _ in range(3):
                blocks.append(ZeroPaddedBlock(channels, width, stride=1 if channels == width else 2))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the logits, shape (B, num_classes)."""
        y_BCHW = self.blocks(torch.relu(self.bn1(self.conv1(x_BCHW))))
        return self.linear(y_BCHW.mean((2, 3)))
