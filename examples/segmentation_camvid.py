"""Prune a U-Net for semantic segmentation to half of its MACs, judged by mean IoU.

    python examples/segmentation_camvid.py --data .data/camvid
    python examples/segmentation_camvid.py --tiny

The data is CamVid's street scenes as a folder `{train,val,test}/{images/*.jpg,masks/*.png}`; a mask has the name of its
image, and its pixels are the classes 0 to 10, or 11 for void, which counts neither in the loss nor in the score.

What of this is for you: psenet takes your DataLoader, whose batches are (x, labels), and your score. The loss needs no
word here: psenet's own cross entropy takes dense labels and leaves out those that are -100, torch's own number for it.

Legend: N images, B of a batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import psenet
import shown

NUM_CLASSES, VOID, IGNORED = 11, 11, -100


# The user's own: model, data, score -----------------------------------------------------------------------------------


class UNet(nn.Module):
    """A small U-Net: on the way up, what comes from below is joined with what was there on the way down."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128), num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        ins, pairs = (3, *widths), list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(_double(ins[level], width) for level, width in enumerate(widths))
        self.pool = nn.MaxPool2d(2)
        self.lift = nn.ModuleList(nn.ConvTranspose2d(deep, flat, 2, stride=2) for flat, deep in pairs)
        self.up = nn.ModuleList(_double(2 * flat, flat) for flat, _ in pairs)
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes, H, W); height and width must be multiples of 8."""
        passed: list[torch.Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            passed.append(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([passed[level], self.lift[level](x)], dim=1))
        return self.head(x)


def _double(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()),
        *(nn.Conv2d(num_out, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()),
    )


class Scenes(Dataset):
    """Images of shape (3, H, W) with masks (H, W); for training, every other one mirrored at random."""

    def __init__(self, images_NHWC: np.ndarray, masks_NHW: np.ndarray, *, mirror: bool) -> None:
        self.images, self.mirror = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), mirror
        self.masks = torch.from_numpy(masks_NHW).long()
        self.masks[self.masks == VOID] = IGNORED

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_CHW, mask_HW = self.images[index].float() / 127.5 - 1, self.masks[index]
        if self.mirror and torch.rand(()) < 0.5:
            return image_CHW.flip(-1), mask_HW.flip(-1)
        return image_CHW, mask_HW


def read_scenes(folder: Path, size_WH: tuple[int, int], *, mirror: bool = False) -> Scenes:
    """Read `images` and `masks` of a folder, scaled; a mask takes the nearest pixel, for classes have no mean."""
    files = sorted((folder / "images").glob("*.jpg"))
    images = [Image.open(file).convert("RGB").resize(size_WH, Image.Resampling.BILINEAR) for file in files]
    masks = [
        Image.open(folder / "masks" / f"{file.stem}.png").resize(size_WH, Image.Resampling.NEAREST) for file in files
    ]
    return Scenes(
        np.stack([np.asarray(image) for image in images]), np.stack([np.asarray(m) for m in masks]), mirror=mirror
    )


def mean_iou(module: nn.Module, batches: Any) -> float:
    """Return the mean over classes of intersection over union, in percent; void does not count.

    psenet calls it with the module in eval mode, without gradients, and with batches on the module's device.
    """
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.long)
    for x, labels in batches:
        confusion += count_pairs(module(x).argmax(1), labels).cpu()
    return iou_of(confusion)


def count_pairs(found_BHW: torch.Tensor, true_BHW: torch.Tensor) -> torch.Tensor:
    """Return how many places of each true class (row) were found to be of each class (column)."""
    counts = true_BHW != IGNORED
    pairs = true_BHW[counts] * NUM_CLASSES + found_BHW[counts]
    return torch.bincount(pairs, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def iou_of(confusion: torch.Tensor) -> float:
    """Return the mean IoU in percent, over the classes that are there or were found."""
    right = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - right
    return 100 * float((right / union)[union > 0].mean())


# What psenet needs of it ----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> shown.Shown:
    """Train, prune, fine-tune and compare."""
    options = shown.parser(__doc__, name="segmentation_camvid", epochs=18, data=".data/camvid")
    options.add_argument("--size", type=int, nargs=2, default=(96, 72), help="width and height, multiples of 8")
    arguments = shown.parse(options, argv)
    torch.manual_seed(arguments.seed)
    train, val, test = made_up() if arguments.tiny else read(arguments)
    training = psenet.TrainConfig(epochs=arguments.epochs, optimizer="adamw", learning_rate=4e-3, weight_decay=1e-2)
    tuning = psenet.TrainConfig(epochs=arguments.finetune_epochs, optimizer="adamw", learning_rate=2e-3)
    result = psenet.prune(
        UNet((8, 16, 24) if arguments.tiny else (16, 32, 64, 128)),
        train.dataset[0][0].unsqueeze(0),
        train,
        val,
        test_loader=test,
        budget=psenet.Budget(macs="50%"),
        task=psenet.Task(score_fn=mean_iou, score_name="mIoU"),
        config=psenet.PruneConfig(
            baseline=training,
            supernet=training,
            finetune=tuning,
            num_subnets=4,  # a batch of 16 gives each of them 4 images
            num_evaluations=arguments.evaluations,
            divisor=4,
            seed=arguments.seed,
        ),
        out=arguments.out,
        resume=True,  # the same command again goes on where it was interrupted
        description={"model": "U-Net", "data": "made-up scenes" if arguments.tiny else "CamVid"},
        say=print,
    )
    return shown.show(result, "segmentation_camvid", arguments, argv)


def read(arguments: Any) -> list[DataLoader]:
    """Return the loaders of CamVid's three parts."""
    folder, size_WH = shown.folder_of(arguments, "train/masks"), tuple(arguments.size)
    return [
        DataLoader(read_scenes(folder / part, size_WH, mirror=part == "train"), 16, shuffle=part == "train")
        for part in ("train", "val", "test")
    ]


def made_up() -> list[DataLoader]:
    """Return loaders of noise with a ground, a sky and a box between them, and a void border."""
    rng, loaders = np.random.default_rng(0), []
    for part, count in (("train", 64), ("val", 24), ("test", 24)):
        masks = np.zeros((count, 24, 32), dtype=np.uint8)
        for mask_HW in masks:
            row, column = rng.integers(6, 14), rng.integers(0, 20)
            mask_HW[row:] = 1
            mask_HW[row - 4 : row + 4, column : column + 10] = 2
        colours = np.array([[60, 90, 200], [120, 120, 90], [200, 60, 60]])
        images = np.clip(colours[masks] + rng.normal(0, 40, (*masks.shape, 3)), 0, 255).astype(np.uint8)
        masks[:, 0] = VOID
        loaders.append(DataLoader(Scenes(images, masks, mirror=part == "train"), 16, shuffle=part == "train"))
    return loaders


if __name__ == "__main__":
    main()
