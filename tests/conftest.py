"""Fixtures that several test modules share."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

ImageTree = Callable[..., Path]

# Tiny networks gain nothing from threads, and lose much where other programs want the processor too.
torch.set_num_threads(1)


@pytest.fixture
def image_tree(tmp_path: Path) -> ImageTree:
    """Return a function that writes folders of PNG images, each image of one colour of its own.

    `image_tree({"train/cat": 8, "train/dog": 8}, side=16)` returns the root. The images' red and green channels count
    the images from 0, so that every image can be told from every other after decoding.
    """

    def write(folders: Mapping[str, int], *, side: int = 16) -> Path:
        from PIL import Image

        root = tmp_path / "images"
        root.mkdir()
        number = 0
        for folder, count in folders.items():
            (root / folder).mkdir(parents=True)
            for index in range(count):
                pixels_HWC = np.zeros((side, side, 3), dtype=np.uint8)
                pixels_HWC[:] = (number // 256, number % 256, 200)
                Image.fromarray(pixels_HWC).save(root / folder / f"{index}.png")
                number += 1
        return root

    return write
