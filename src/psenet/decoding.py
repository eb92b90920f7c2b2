"""Image files to pixels, within bounds on time and memory.

PIL refuses images that may have been made to fill the memory, and warns of those of half that size
(`PIL.Image.MAX_IMAGE_PIXELS`, 89 million pixels or 268 MB). Here the lower number is the bound: JPEGs beyond it are
decoded at a half, a quarter or an eighth of their size, which takes no more memory than they then have; other images
are refused.
"""

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_AT_MOST_16_BITS = ("PNG", "PPM")
"""Formats whose grey pixels have 16 bits where PIL takes them for 32."""
_FRACTIONS = (2, 4, 8)
"""By which a JPEG can be made smaller while it is decoded."""
_filters_lock = threading.Lock()
"""Filters of warnings are the process's own, not a thread's."""


def open_image(path: str) -> Any:
    """Open an image file as a PIL image, not decoded yet, that has no more pixels than PIL takes without a warning.

    Raises:
        ValueError: Not a file, or an image with more pixels that cannot be made smaller; and what PIL raises.
    """
    from PIL import Image

    # A pipe would be waited for, and a device read, for ever. Links are followed: data sets are often made of them.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a file")
    try:
        with _filters_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return _open_smaller(path)


@contextmanager
def refusing_bombs() -> Iterator[None]:
    """Turn PIL's refusal of huge images, which derives from none of its other errors, into a `ValueError`."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def to_tensor(image: Any) -> torch.Tensor:
    """Return a PIL image of any mode as RGB, uint8 of shape (3, H, W); of several frames the first.

    Raises:
        ValueError: Its pixels have 32 bits, so that nobody knows what is black and what white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _AT_MOST_16_BITS):
        grey_HW = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)  # PIL makes white of all above 255
        pixels_HWC = np.repeat(grey_HW[:, :, None], 3, axis=2)
    elif image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose range is not known: save it with 8 or 16 bits")
    else:
        pixels_HWC = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _open_smaller(path: str) -> Any:
    """Open a huge JPEG so that it is decoded at a fraction of its size.

    Raises:
        ValueError: It is none, or one that is decoded as a whole whatever the fraction.
    """
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    most = Image.MAX_IMAGE_PIXELS or 0
    try:
        image = JpegImageFile(path)
    except SyntaxError:
        raise ValueError(f"more than {most} pixels: save it smaller") from None
    width, height = image.size
    smallest = next((part for part in _FRACTIONS if -(-width // part) * -(-height // part) <= most), None)
    if smallest is None or "progressive" in image.info:
        image.close()
        raise ValueError(f"{width} x {height} pixels, more than {most}: save it smaller")
    image.draft(None, (width // smallest, height // smallest))
    return image
