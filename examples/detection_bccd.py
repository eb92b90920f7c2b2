"""Prune a one-stage detector to half of its MACs, judged by average precision at IoU 0.5.

    python examples/detection_bccd.py --data .data/bccd/BCCD
    python examples/detection_bccd.py --tiny

The data is BCCD, blood cells of three kinds, as Pascal VOC has it: a folder with `JPEGImages/*.jpg`,
`Annotations/*.xml` and `ImageSets/Main/{train,val,test}.txt`, the names of each part's images.

The detector is of its own kind, after CenterNet and FCOS: at every place of a map of an eighth or a quarter of the
image, how likely the middle of an object of each class is here, and how far it reaches in four directions.

What of this is for you: the model returns a dict; the labels of a batch are a list with one dict for each image, as a
collate_fn of one's own makes it; the loss gives one number for each image, and the score is any function of module and
batches. psenet looks into none of them.

Legend: B images of a batch, N objects of an image, C channels or classes, H height, W width; boxes are left, top,
right, bottom in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import batched_nms, box_iou

import psenet
import shown

CLASSES = ("RBC", "WBC", "Platelets")
STRIDE = 4
"""Pixels from one place of the output maps to the next."""
Labels = list[dict[str, torch.Tensor]]
"""For each image its `boxes` (N, 4) and `classes` (N,)."""


# The user's own: the model --------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """Strides 2, 4 and 8 on the way down; what is seen at 8 is resized and joined with what is seen at 4."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64), num_classes: int = len(CLASSES)) -> None:
        super().__init__()
        first, second, third = widths
        self.early = nn.Sequential(_conv(3, first, stride=2), _conv(first, second, stride=2), _Residual(second))
        self.late = nn.Sequential(_conv(second, third, stride=2), _Residual(third), _Residual(third), _Residual(third))
        self.join = _conv(second + third, third)
        self.middles, self.reaches = (
            nn.Sequential(_conv(third, second), nn.Conv2d(second, count, 1)) for count in (num_classes, 4)
        )
        # Nearly all places are no middles: without this, unlearning the rest takes the first epochs (Lin et al. 2017).
        nn.init.constant_(self.middles[-1].get_parameter("bias"), -4.0)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits of middles (B, classes, H/4, W/4) and log reaches in strides (B, 4, H/4, W/4)."""
        near = self.early(x)
        y = self.join(torch.cat([near, F.interpolate(self.late(near), scale_factor=2.0)], dim=1))
        return {"middles": self.middles(y), "reaches": self.reaches(y)}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm(self.body(x)))


def _conv(num_in: int, num_out: int, *, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(num_out), nn.ReLU())


# The loss: one number for each image ----------------------------------------------------------------------------------


def detection_loss(outputs: dict[str, torch.Tensor], labels: Labels) -> torch.Tensor:
    """Return the loss of each image, shape (B,)."""
    pairs = zip(outputs["middles"], outputs["reaches"], labels, strict=True)
    return torch.stack([_loss_of_image(*each) for each in pairs])


def _loss_of_image(
    middles_CHW: torch.Tensor, reaches_4HW: torch.Tensor, label: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the focal loss of middles (Zhou et al. 2019, equation 1), and the error of log reaches about them."""
    boxes_N4, num_objects = label["boxes"], max(1, len(label["boxes"]))
    _, height, width = middles_CHW.shape
    y_H, x_W = (STRIDE * (torch.arange(n, device=boxes_N4.device) + 0.5) for n in (height, width))
    near_NHW = _nearness(boxes_N4, y_H, x_W)
    wanted_CHW = torch.zeros_like(middles_CHW)
    for number, near_HW in zip(label["classes"].tolist(), near_NHW, strict=True):
        wanted_CHW[number] = torch.maximum(wanted_CHW[number], near_HW)
    found_CHW = middles_CHW.sigmoid()
    hit = -F.logsigmoid(middles_CHW) * (1 - found_CHW) ** 2 * (wanted_CHW == 1)
    miss = -F.logsigmoid(-middles_CHW) * found_CHW**2 * (1 - wanted_CHW) ** 4
    loss = (hit.sum() + miss.sum()) / num_objects
    if len(boxes_N4) == 0:
        return loss
    # Every place belongs to the object whose middle is nearest to it, and counts by how near that is.
    weight_HW, owner_HW = near_NHW.max(0)
    weight_HW = weight_HW * (weight_HW > 0.3)
    box_HW4 = boxes_N4[owner_HW]
    x_HW, y_HW = x_W.expand(height, width), y_H[:, None].expand(height, width)
    reach_HW4 = torch.stack(
        [x_HW - box_HW4[..., 0], y_HW - box_HW4[..., 1], box_HW4[..., 2] - x_HW, box_HW4[..., 3] - y_HW], dim=-1
    )
    error_HW = F.smooth_l1_loss(
        reaches_4HW, (reach_HW4 / STRIDE).clamp(min=0.1).log().permute(2, 0, 1), reduction="none", beta=0.1
    ).sum(0)
    return loss + (error_HW * weight_HW).sum() / weight_HW.sum()


def _nearness(boxes_N4: torch.Tensor, y_H: torch.Tensor, x_W: torch.Tensor) -> torch.Tensor:
    """Return a bell about the middle of each object, as wide as the object, 1 at one place; shape (N, H, W)."""
    middle_N2, size_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2, boxes_N4[:, 2:] - boxes_N4[:, :2]
    spread_N2 = (size_N2 / 10).clamp(min=STRIDE / 2)
    across_NW = (x_W - middle_N2[:, :1]) / spread_N2[:, :1]
    down_NH = (y_H - middle_N2[:, 1:]) / spread_N2[:, 1:]
    distance_NHW = down_NH[:, :, None] ** 2 + across_NW[:, None, :] ** 2
    return (-(distance_NHW - distance_NHW.amin((1, 2), keepdim=True)) / 2).exp()


# The score: average precision -----------------------------------------------------------------------------------------


def mean_average_precision(module: nn.Module, batches: Any) -> float:
    """Return the mean over classes of average precision at IoU 0.5, in percent."""
    found: Labels = []
    truth: Labels = []
    for x, labels in batches:
        found += boxes_found(module(x))
        truth += labels
    present = [number for number in range(len(CLASSES)) if any((t["classes"] == number).any() for t in truth)]
    return 100 * float(np.mean([average_precision(found, truth, number) for number in present])) if present else 0.0


def minus_loss(module: nn.Module, batches: Any) -> float:
    """Return minus the mean loss: of a few images it tells nets apart that find the same boxes."""
    return -float(torch.cat([detection_loss(module(x), labels) for x, labels in batches]).mean())


def boxes_found(outputs: dict[str, torch.Tensor], *, least: float = 0.05, most: int = 100) -> Labels:
    """Return boxes, classes and scores of each image, best first, of boxes that overlap only the best."""
    found: Labels = []
    for middles_CHW, reaches_4HW in zip(outputs["middles"].sigmoid(), outputs["reaches"].exp() * STRIDE, strict=True):
        classes, rows, columns = (middles_CHW > least).nonzero(as_tuple=True)
        scores, reaches_4K = middles_CHW[classes, rows, columns], reaches_4HW[:, rows, columns]
        x, y = STRIDE * (columns + 0.5), STRIDE * (rows + 0.5)
        left, top, right, bottom = reaches_4K
        boxes = torch.stack([x - left, y - top, x + right, y + bottom], dim=1)
        kept = batched_nms(boxes, scores, classes, iou_threshold=0.5)[:most]
        found.append({"boxes": boxes[kept], "classes": classes[kept], "scores": scores[kept]})
    return found


def average_precision(found: Labels, truth: Labels, class_number: int, *, iou: float = 0.5) -> float:
    """Return the area under the curve of precision over recall of one class, 0 to 1, as Pascal VOC since 2010.

    From the best score down, a box is right if the object it overlaps most is overlapped by `iou` and not taken yet;
    a precision counts as the best at that recall or more.
    """
    scores, hits = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    for boxes, objects in zip(found, truth, strict=True):
        chosen = boxes["classes"] == class_number
        order = boxes["scores"][chosen].argsort(descending=True, stable=True)
        scores.append(boxes["scores"][chosen][order].cpu().numpy())
        real = objects["boxes"][objects["classes"] == class_number]
        hits.append(_hits(boxes["boxes"][chosen][order], real, iou))
    num_objects = sum(int((objects["classes"] == class_number).sum()) for objects in truth)
    right = np.concatenate(hits)[np.argsort(-np.concatenate(scores), kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall rises by one object at every hit, and nowhere else.
    return float(envelope[right].sum()) / num_objects if num_objects else 0.0


def _hits(boxes_K4: torch.Tensor, real_N4: torch.Tensor, iou: float) -> np.ndarray:
    """Return which boxes of an image, best score first, hit an object that no better one has hit."""
    hits, taken = np.zeros(len(boxes_K4), dtype=bool), set[int]()
    if len(real_N4) and len(boxes_K4):
        overlap_K, nearest_K = box_iou(boxes_K4, real_N4).max(1)
        for number, (overlap, nearest) in enumerate(zip(overlap_K.tolist(), nearest_K.tolist(), strict=True)):
            hits[number] = overlap >= iou and nearest not in taken
            taken |= {nearest} if hits[number] else set()
    return hits


# The data -------------------------------------------------------------------------------------------------------------


class Cells(Dataset):
    """Images (3, H, W) with boxes and classes; for training, mirrored both ways at random."""

    def __init__(self, images_NHWC: np.ndarray, labels: Labels, *, mirror: bool) -> None:
        self.images, self.labels, self.mirror = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), labels, mirror

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image_CHW, boxes_N4 = self.images[index].float() / 127.5 - 1, self.labels[index]["boxes"]
        for axis, size in ((0, image_CHW.shape[2]), (1, image_CHW.shape[1])):
            if self.mirror and torch.rand(()) < 0.5:
                image_CHW, boxes_N4 = image_CHW.flip(2 - axis), boxes_N4.clone()
                boxes_N4[:, [axis, axis + 2]] = size - boxes_N4[:, [axis + 2, axis]]
        return image_CHW, {"boxes": boxes_N4, "classes": self.labels[index]["classes"]}


def collate(samples: Sequence[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> tuple[torch.Tensor, Labels]:
    """Stack the images; the labels, of which every image has other numbers, stay a list."""
    return torch.stack([image for image, _ in samples]), [label for _, label in samples]


def loader(cells: Cells) -> DataLoader:
    """Return batches of 16, of training images in random order."""
    return DataLoader(cells, 16, shuffle=cells.mirror, collate_fn=collate)


def read_cells(folder: Path, part: str, size_WH: tuple[int, int]) -> Cells:
    """Read one part of BCCD, scaled."""
    names = (folder / "ImageSets" / "Main" / f"{part}.txt").read_text().split()
    images: list[np.ndarray] = []
    labels: Labels = []
    for name in names:
        image = Image.open(folder / "JPEGImages" / f"{name}.jpg").convert("RGB")
        scale = [small / large for small, large in zip(size_WH, image.size, strict=True)]
        images.append(np.asarray(image.resize(size_WH, Image.Resampling.BILINEAR)))
        labels.append(_read_objects(folder / "Annotations" / f"{name}.xml", scale))
    return Cells(np.stack(images), labels, mirror=part == "train")


def _read_objects(file: Path, scale: Sequence[float]) -> dict[str, torch.Tensor]:
    boxes, classes = [], []
    for one in ElementTree.parse(file).getroot().iter("object"):
        sides = [float(one.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if sides[0] < sides[2] and sides[1] < sides[3]:  # BCCD has a few boxes without any area
            boxes.append([side * scale[axis % 2] for axis, side in enumerate(sides)])
            classes.append(CLASSES.index(one.findtext("name", "")))
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "classes": torch.tensor(classes, dtype=torch.long)}


def made_up(part: str, count: int) -> Cells:
    """Return noise with discs of three colours and sizes, one to four of them."""
    rng, labels = np.random.default_rng(["train", "val", "test"].index(part)), []
    images_NHWC = rng.normal(90, 20, (count, 48, 64, 3))
    rows, columns = np.mgrid[:48, :64]
    for image_HWC in images_NHWC:
        classes = rng.integers(0, len(CLASSES), rng.integers(1, 5))
        radii = np.array([7, 11, 4])[classes]
        middles = np.stack([rng.uniform(radii, side - radii) for side in (64, 48)], axis=1)
        for (x, y), radius, number in zip(middles, radii, classes, strict=True):
            image_HWC[(columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 < radius**2, number] += 120
        boxes = np.concatenate([middles - radii[:, None], middles + radii[:, None]], axis=1)
        labels.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "classes": torch.tensor(classes)})
    return Cells(images_NHWC.clip(0, 255).astype(np.uint8), labels, mirror=part == "train")


# What psenet needs of it ----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> shown.Shown:
    """Train, prune, fine-tune and compare."""
    options = shown.parser(__doc__, name="detection_bccd", epochs=40, data=".data/bccd/BCCD")
    options.add_argument("--size", type=int, nargs=2, default=(160, 120), help="width and height, multiples of 8")
    arguments = shown.parse(options, argv)
    torch.manual_seed(arguments.seed)
    if arguments.tiny:
        parts = [made_up(part, count) for part, count in (("train", 96), ("val", 24), ("test", 24))]
    else:
        folder = shown.folder_of(arguments, "ImageSets/Main")
        parts = [read_cells(folder, part, tuple(arguments.size)) for part in ("train", "val", "test")]
    train, val, test = (loader(part) for part in parts)
    training = psenet.TrainConfig(epochs=arguments.epochs, optimizer="adamw", learning_rate=4e-3, weight_decay=1e-2)
    tuning = psenet.TrainConfig(epochs=arguments.finetune_epochs, optimizer="adamw", learning_rate=2e-3)
    result = psenet.prune(
        Detector((8, 16, 24) if arguments.tiny else (16, 32, 64)),
        parts[0][0][0].unsqueeze(0),
        train,
        val,
        test_loader=test,
        budget=psenet.Budget(macs="50%"),
        task=psenet.Task(
            loss_fn=detection_loss,
            score_fn=mean_average_precision,
            search_score_fn=minus_loss,
            score_name="AP at IoU 0.5",
        ),
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
        description={"model": "own detector", "data": "made-up discs" if arguments.tiny else "BCCD"},
        say=print,
    )
    return shown.show(result, "detection_bccd", arguments, argv)


if __name__ == "__main__":
    main()
