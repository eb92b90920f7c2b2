"""Mistakes in image folders and in the names of data."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from bad_input import MODEL, Case, in_turn, photos
from PIL import Image

_PRUNE = f"prune --model {MODEL} --macs 50% --out run --data photos"
_GOOD = {"train/cat": 8, "train/dog": 8, "test/cat": 4, "test/dog": 4}
_ONE = "train/cat/3.png"


def _folder(name: str, folders: Mapping[str, int], *says: str) -> Case:
    return Case(name=name, command=_PRUNE, prepare=photos(folders), says=says)


def _image(name: str, spoil: Callable[[Path], object], *says: str) -> Case:
    """Return a folder of good images but for one."""
    path = Path("photos") / _ONE
    prepare = in_turn(photos(_GOOD), path.unlink, lambda: spoil(path))
    return Case(
        name=name,
        command=_PRUNE,
        prepare=prepare,
        says=("every image must be readable; 1 are not: photos/train/cat/3.png", *says, "Repair or remove them"),
    )


def _named(name: str, source: str, *says: str, files: Mapping[str, str] | None = None) -> Case:
    return Case(name=name, command=f"{_PRUNE} --data '{source}'", files=files or {}, says=says)


DATA = (
    _named(
        "no such folder",
        "photos",
        "there is no data folder 'photos'; the data is an existing folder of images, `digits`",
    ),
    _named("no such folder above", "../nothing", "there is no data folder '../nothing'"),
    _named("the home of nobody", "~no-such-user/photos", "there is no data folder '~no-such-user/photos'"),
    _named("an address", "https://example.com/photos.zip", "there is no data folder 'https://example.com/photos.zip'"),
    _named(
        "an archive",
        "photos.zip",
        "the data must be a folder of images; photos.zip is a file",
        files={"photos.zip": "PK"},
    ),
    _named("no data", "", "--data: source must name the data: `digits`, a folder or a data set; got ''"),
    _named(
        "a data set misspelt",
        "torch/cifra10@here",
        "could not open 'torch/cifra10' in here",
        "Unknown torchvision dataset",
    ),
    _named(
        "a data set whose folder is missing",
        "torch/image_folder@here",
        "give the data's folder as torch/image_folder@FOLDER",
    ),
    _named(
        "a data set of a package that is not installed",
        "tfds/nothing",
        "timm's dataset factory could not open 'tfds/nothing'",
    ),
    Case(
        name="an empty folder",
        command=_PRUNE,
        prepare=lambda: Path("photos").mkdir(),
        says=("the data folder photos is empty; it must hold one folder of images per class",),
    ),
    _folder(
        "images without classes",
        {"train": 3, "test": 2},
        "photos/train must hold one folder of images per class; found 3",
    ),
    _folder("a single class", {"cat": 8}, "photos must hold at least two class folders; found only cat"),
    _folder(
        "a class without images",
        {"train/cat": 8, "train/dog": 8, "train/eel": 0},
        "must hold images (.jpg",
        "none in: eel",
    ),
    _folder("test images alone", {"test/cat": 4, "test/dog": 4}, "photos has test and no `train` folder; add it"),
    _folder("other classes in the test", {**_GOOD, "test/eel": 4}, "must hold the same classes", "has besides eel"),
    _folder(
        "too few images to divide",
        {"cat": 4, "dog": 3},
        "every class needs at least 4 train images",
        "too few: dog (3)",
    ),
    _folder(
        "two validation folders",
        {**_GOOD, "val/cat": 4, "valid/cat": 4},
        "photos must have one validation folder; found val, valid",
    ),
    _folder(
        "a class with a name of markup and emoji",
        {"train/cat": 8, "train/<b>猫 🐈 x": 0},
        "must hold images",
        "none in: <b>猫 🐈 x",
    ),
    _image("a truncated image", lambda path: _write_half(path), "image file is truncated"),
    _image("an empty image", lambda path: path.touch(), "not an image"),
    _image("text named as an image", lambda path: path.write_text("hello"), "not an image"),
    _image("a pickle named as an image", lambda path: path.write_bytes(pickle.dumps([1])), "not an image"),
    _image("a folder named as an image", lambda path: path.mkdir(), "not a file"),
    _image("a pipe named as an image", os.mkfifo, "not a file"),
    _image(
        "a link that leads nowhere", lambda path: path.symlink_to("/no/such/image.png"), "No such file or directory"
    ),
    _image("a link to what is no image", lambda path: path.symlink_to("/etc/hosts"), "not an image"),
    _image("a link to a device", lambda path: path.symlink_to("/dev/zero"), "not a file"),
    _image(
        "an image of more pixels than fit",
        lambda path: Image.new("1", (20_000, 20_000)).save(path),
        "more than 89478485 pixels: save it smaller",
    ),
    _image(
        "an image with pixels of 32 bits",
        lambda path: Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32)).save(path, format="TIFF"),
        "pixels of 32 bits, whose range is not known: save it with 8 or 16 bits",
    ),
)


def _write_half(path: Path) -> None:
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:45])
