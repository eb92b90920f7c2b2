"""Images wherever they lie: reading them, decoding them into memory, and turning them into a model's input.

A *pool* holds all images of a source. Its transforms take an undistorted uint8 image of any size and return the
normalised float32 image that the model sees.

Legend: N images, C channels, H height, W width.
"""

import math
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from psenet.decoding import open_image, refusing_bombs, to_tensor
from psenet.errors import InputError

LabelledImage = tuple[torch.Tensor, int]

_MAX_BYTES_IN_MEMORY = 2**30
_SMALL_SIDE = 64
_CROP_SHARE = 0.875
_MAX_LISTED = 10
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)
"""What PIL raises at broken files of its many formats."""
_LONGEST = 4
"""Sides: of an image that is longer only so much of its middle is scaled, as one of 1 x 60000 pixels would fill the
memory."""
_UNREADABLE_MESSAGE = (
    "every image must be readable; {}. Repair or remove them, or ask for unreadable images to be skipped"
)


class Pool(Protocol):
    """All images of a source, with their labels."""

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int64 of shape (N,)."""
        ...

    def read(self, index: int) -> torch.Tensor:
        """Return an image, uint8 of shape (C, H, W); what PIL raises passes through."""
        ...

    def sides(self, index: int) -> tuple[int, int]:
        """Return width and height, from the file's header where there is one."""
        ...

    def name(self, index: int) -> str:
        """Return what a message calls the image."""
        ...


class MemoryPool:
    """Decoded images of one size.

    Args:
        images_NCHW: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
    """

    def __init__(self, images_NCHW: torch.Tensor, labels: np.ndarray) -> None:
        self.images_NCHW = images_NCHW
        self.labels = labels

    def read(self, index: int) -> torch.Tensor:
        """Return an image."""
        return self.images_NCHW[index]

    def sides(self, index: int) -> tuple[int, int]:
        """Return width and height, the same for all."""
        return self.images_NCHW.shape[3], self.images_NCHW.shape[2]

    def name(self, index: int) -> str:
        """Return the position."""
        return f"image {index}"


class FilePool:
    """Image files, decoded at every reading.

    Args:
        paths: The files, N of them.
        labels: int64, shape (N,).
    """

    def __init__(self, paths: Sequence[str], labels: np.ndarray) -> None:
        self.paths = paths
        self.labels = labels

    def read(self, index: int) -> torch.Tensor:
        """Decode a file of any mode as RGB."""
        with open_image(self.paths[index]) as image:
            return to_tensor(image)

    def sides(self, index: int) -> tuple[int, int]:
        """Return width and height from the header."""
        with open_image(self.paths[index]) as image:
            return image.size

    def name(self, index: int) -> str:
        """Return the path."""
        return self.paths[index]


class TimmPool:
    """A data set of (PIL image, label), as timm's factory makes them.

    Args:
        dataset: N items.
        labels: int64, shape (N,).
    """

    def __init__(self, dataset: Dataset[Any], labels: np.ndarray) -> None:
        self.dataset = dataset
        self.labels = labels

    def read(self, index: int) -> torch.Tensor:
        """Return an image of any mode as RGB."""
        with refusing_bombs():
            return to_tensor(self.dataset[index][0])

    def sides(self, index: int) -> tuple[int, int]:
        """Return width and height."""
        with refusing_bombs():
            return self.dataset[index][0].size

    def name(self, index: int) -> str:
        """Return the position."""
        return f"image {index}"


@dataclass(frozen=True, kw_only=True)
class Look:
    """How pixels are normalised and augmented; mean and std are in the units of the stored pixels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 4
    flip: bool = True


def working_size(pool: Pool) -> int:
    """Return the first image's shorter side where all images are at most 64 pixels wide and high, else 224."""
    first = None
    for index in range(len(pool.labels)):
        try:
            sides = pool.sides(index)
        except _UNREADABLE:
            # Not lost: decoding reads every image again and reports the unreadable ones together.
            continue
        if max(sides) > _SMALL_SIDE:
            return 224
        first = first or min(sides)
    return first or 224


def decode(
    pool: Pool, splits: Mapping[str, np.ndarray], *, size: int, num_channels: int, skip_unreadable: bool
) -> tuple[Pool, dict[str, np.ndarray]]:
    """Decode the images of the splits into memory, once, where they fit into 1 GiB.

    Images are checked when they are decoded. Larger sets stay as they are and complain when they meet a bad image,
    except that `skip_unreadable` has every image read once, to know what to leave out.

    Args:
        pool: Where the images are.
        splits: Indices into the pool.
        size: Height and width of the model's input, in pixels.
        num_channels: C of the pool's images.
        skip_unreadable: Leave unreadable images out, with a warning.

    Returns:
        The pool to read from, and the splits as indices into it.

    Raises:
        InputError: Images cannot be read; names them.
    """
    wanted = np.concatenate(list(splits.values()))
    shape = (num_channels, _stored_side(size), _stored_side(size))
    fits = len(wanted) * math.prod(shape) <= _MAX_BYTES_IN_MEMORY
    if not fits and not skip_unreadable:
        return pool, dict(splits)
    images_NCHW = torch.empty((len(wanted), *shape), dtype=torch.uint8) if fits else None
    problems = _read_all(pool, wanted, images_NCHW, in_threads=size > _SMALL_SIDE)
    _report_unreadable([problem for problem in problems if problem is not None], skip_unreadable)
    ends = np.cumsum([len(indices) for indices in splits.values()])[:-1]
    readable = np.array([problem is None for problem in problems])
    kept = {
        part: positions[readable[positions]]
        for part, positions in zip(splits, np.split(np.arange(len(wanted)), ends), strict=True)
    }
    if images_NCHW is None:
        return pool, {part: wanted[positions] for part, positions in kept.items()}
    return MemoryPool(images_NCHW, pool.labels[wanted]), kept


def _read_all(
    pool: Pool, wanted: np.ndarray, images_NCHW: torch.Tensor | None, *, in_threads: bool
) -> list[str | None]:
    """Read every wanted image, store it where there is a place, and return what was wrong with each."""

    def read(position: int) -> str | None:
        index = int(wanted[position])
        try:
            image_CHW = pool.read(index)
        except _UNREADABLE as error:
            return _problem(pool, index, error)
        if images_NCHW is not None:
            images_NCHW[position] = _fit(image_CHW, images_NCHW.shape[-1])
        return None

    # Decoding of large images leaves the interpreter's lock; for small ones threads only get in each other's way.
    if not in_threads:
        return [read(position) for position in range(len(wanted))]
    with ThreadPoolExecutor() as executor:
        return list(executor.map(read, range(len(wanted))))


def _problem(pool: Pool, index: int, error: Exception) -> str:
    # PIL repeats the path in some messages and not in others.
    reason = "not an image" if type(error).__name__ == "UnidentifiedImageError" else str(error)
    return f"{pool.name(index)} ({reason})"


def _report_unreadable(problems: list[str], skip_unreadable: bool) -> None:
    if not problems:
        return
    if skip_unreadable:
        warnings.warn(f"left out {len(problems)} unreadable images: {listed(problems)}", stacklevel=4)
        return
    raise InputError(_UNREADABLE_MESSAGE.format(f"{len(problems)} are not: {listed(problems)}"))


def _stored_side(size: int) -> int:
    """Return the side of the square kept of an image: all of a small one, a margin around the crop of a large one."""
    return size if size <= _SMALL_SIDE else round(size / _CROP_SHARE)


def _fit(image_CHW: torch.Tensor, side: int) -> torch.Tensor:
    """Return the central square, its side scaled to `side` pixels; the image itself if it is that already."""
    if image_CHW.shape[1] == side and image_CHW.shape[2] == side:
        return image_CHW
    from torchvision.transforms.v2 import functional

    height, width = image_CHW.shape[1:]
    if max(height, width) > _LONGEST * min(height, width):
        image_CHW = functional.center_crop(image_CHW, [min(height, _LONGEST * width), min(width, _LONGEST * height)])
    return functional.center_crop(functional.resize(image_CHW, [side], antialias=True), [side, side])


def listed(items: Sequence[object]) -> str:
    """Return the first ten items as text, and how many more there are."""
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(str(item) for item in items[:_MAX_LISTED]) + more


def make_transform(size: int, look: Look, *, augment: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes a uint8 image of any size the model's input, float32 of shape (C, size, size).

    Augmentation draws from torch's global generator.
    """
    if not augment:
        return _Plain(size, look)
    return _ShiftFlip(size, look) if size <= _SMALL_SIDE else _CropFlip(size, look)


# The transforms are classes, so that worker processes can receive them.


class _Plain:
    """Without augmentation: the whole square of a small image, the central 87.5 % of a large one."""

    def __init__(self, size: int, look: Look) -> None:
        self._size = size
        self._stored_side = _stored_side(size)
        self._normalise = _Normalise(look)

    def __call__(self, image_CHW: torch.Tensor) -> torch.Tensor:
        image_CHW = _fit(image_CHW, self._stored_side)
        margin = (self._stored_side - self._size) // 2
        window = slice(margin, margin + self._size)
        return self._normalise(image_CHW[:, window, window])


class _ShiftFlip:
    """For small images: a random shift over a black border, and a mirror image half the time."""

    def __init__(self, size: int, look: Look) -> None:
        self._size, self._pad, self._flip = size, look.pad, look.flip
        self._normalise = _Normalise(look)

    def __call__(self, image_CHW: torch.Tensor) -> torch.Tensor:
        size, pad = self._size, self._pad
        image_CHW = _fit(image_CHW, size)
        num_shifts = 2 * pad + 1
        # One draw decides all: calls into torch cost more than the arithmetic.
        draw = int(torch.randint(2 * num_shifts * num_shifts, ()))
        (top, left), mirror = divmod(draw // 2, num_shifts), draw % 2
        padded_CHW = image_CHW.new_zeros((image_CHW.shape[0], size + 2 * pad, size + 2 * pad))
        padded_CHW[:, pad : pad + size, pad : pad + size] = image_CHW
        window_CHW = padded_CHW[:, top : top + size, left : left + size]
        return self._normalise(window_CHW.flip(2) if mirror and self._flip else window_CHW)


class _CropFlip:
    """For large images: a random part of 35 to 100 % of the area, and a mirror image half the time."""

    def __init__(self, size: int, look: Look) -> None:
        from torchvision.transforms import v2

        mirror = [v2.RandomHorizontalFlip()] if look.flip else []
        self._crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True), *mirror])
        self._normalise = _Normalise(look)

    def __call__(self, image_CHW: torch.Tensor) -> torch.Tensor:
        return self._normalise(self._crop(image_CHW))


class _Normalise:
    def __init__(self, look: Look) -> None:
        self._mean_C11 = torch.tensor(look.mean).view(-1, 1, 1)
        self._scale_C11 = 1 / torch.tensor(look.std).view(-1, 1, 1)

    def __call__(self, image_CHW: torch.Tensor) -> torch.Tensor:
        return image_CHW.to(torch.float32).sub_(self._mean_C11).mul_(self._scale_C11)


class Split(Dataset[LabelledImage]):
    """Some images of a pool, seen through a transform."""

    def __init__(self, pool: Pool, indices: np.ndarray, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._pool, self._indices, self._transform = pool, indices, transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> LabelledImage:
        index = int(self._indices[position])
        try:
            image_CHW = self._pool.read(index)
        except _UNREADABLE as error:
            raise InputError(_UNREADABLE_MESSAGE.format(f"one is not: {_problem(self._pool, index, error)}")) from error
        return self._transform(image_CHW), int(self._pool.labels[index])
