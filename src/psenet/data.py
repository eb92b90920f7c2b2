"""Images with labels, divided into four disjoint splits: train, calibration, validation, test.

Here sources are opened and divided; the division is made on labels alone, and `images.py` then decodes what was chosen.

Legend: N images, C channels, H height, W width.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from psenet.errors import InputError
from psenet.images import (
    FilePool,
    LabelledImage,
    Look,
    MemoryPool,
    Pool,
    Split,
    TimmPool,
    decode,
    listed,
    make_transform,
    working_size,
)

# One image for each of the four splits.
_MIN_PER_CLASS = 4
_TRAIN, _VALIDATION, _TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
_TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_DEFAULT_TIMM_ROOT = ".data"
_OTHER_IMAGES = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dcm", ".dng")


@dataclass(frozen=True, kw_only=True)
class DataSplits:
    """Four disjoint sets of (normalised float32 image of shape (C, H, W), label)."""

    name: str
    """The source as it was given."""
    train: Dataset[LabelledImage]
    """With augmentation."""
    calibration: Dataset[LabelledImage]
    """Held out of the training images, without augmentation: for batch-norm statistics."""
    validation: Dataset[LabelledImage]
    """For choosing among subnets."""
    test: Dataset[LabelledImage]
    """For the final table only."""
    num_classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]


def load_data(
    source: str,
    *,
    image_size: int | None = None,
    seed: int = 0,
    max_train_images: int | None = None,
    skip_unreadable: bool = False,
) -> DataSplits:
    """Load a data set and divide it, stratified by class.

    Calibration takes about 2 % of the training images (64 to 2048), validation about 10 % (at most 5000), unless the
    source has a validation set of its own. Without a test set, half of the source's validation set is the test set,
    or, without that too, 20 % of all images.

    Links in a folder are followed, also to what lies outside it: data sets are often made of links into one store.
    Nothing but decoded pixels is taken from where they lead, and what is no image is refused by the link's name.

    Args:
        source: `digits` (embedded in scikit-learn); a folder `{train,val,test}/<class>/*`, `{train,test}/<class>/*`,
            `{train,val}/<class>/*` or `<class>/*`; or a name of timm's dataset factory such as `torch/cifar10` or
            `timm:hfds/NAME`, with `@FOLDER` behind it for the folder that holds or receives the data (else `.data`).
        image_size: Height and width of the images given to the model, in pixels. Derived if None: the first image's
            shorter side where all images are at most 64 pixels wide and high, else 224.
        seed: Decides the division, nothing else. Augmentation draws from torch's global generator.
        max_train_images: Use only so many training images.
        skip_unreadable: Leave unreadable images out, with a warning that counts them, instead of refusing.

    Raises:
        InputError: The source is unknown, empty or not in a known layout, classes differ or are too small, an image
            cannot be read, or a setting is out of range.
    """
    if image_size is not None and image_size < 8:
        raise InputError(f"the image size must be at least 8 pixels; got {image_size}")
    collection = _open(source)
    splits = _divide(collection, np.random.default_rng(seed))
    if max_train_images is not None:
        if max_train_images < len(collection.class_names):
            raise InputError(
                f"the training images must be at least one per class, {len(collection.class_names)} here; "
                f"got a maximum of {max_train_images}"
            )
        if max_train_images < len(splits["train"]):
            rng = np.random.default_rng([seed, 1])
            splits["train"], _ = _take(collection.pool.labels, splits["train"], max_train_images, rng)
    size = image_size or working_size(collection.pool)
    look = collection.look
    pool, splits = decode(
        collection.pool, splits, size=size, num_channels=len(look.mean), skip_unreadable=skip_unreadable
    )
    _check_still_complete(pool.labels, splits, collection.class_names)
    plain, varied = make_transform(size, look, augment=False), make_transform(size, look, augment=True)
    return DataSplits(
        name=source,
        train=Split(pool, splits["train"], varied),
        calibration=Split(pool, splits["calibration"], plain),
        validation=Split(pool, splits["validation"], plain),
        test=Split(pool, splits["test"], plain),
        num_classes=len(collection.class_names),
        class_names=collection.class_names,
        input_shape=(len(look.mean), size, size),
    )


def make_loader(
    dataset: Dataset[LabelledImage],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    drop_last: bool = False,
    num_workers: int = 0,
) -> DataLoader[LabelledImage]:
    """Return a loader whose order depends on the seed alone.

    Each epoch continues the generator, so epochs differ from each other; `loader.generator` is its state.

    Raises:
        InputError: The batch size is not positive, or so large that `drop_last` leaves no batch.
    """
    num_images = len(dataset)  # pyright: ignore[reportArgumentType]
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1; got {batch_size}")
    if drop_last and batch_size > num_images:
        raise InputError(f"a batch size of {batch_size} leaves no full batch of {num_images} images; lower it")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
    )


# Sources.


# ImageNet's statistics, the ones that published weights expect.
_PHOTOS = Look(
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255),
    std=(0.229 * 255, 0.224 * 255, 0.225 * 255),
)
# Of all 1797 digits, whose pixels are 0 to 16. A flipped digit is another sign, and 8 pixels leave little to shift.
_DIGITS = Look(mean=(0.3053 * 16,), std=(0.3760 * 16,), pad=1, flip=False)


@dataclass(frozen=True, kw_only=True)
class _Collection:
    pool: Pool
    class_names: tuple[str, ...]
    parts: Mapping[str, np.ndarray]
    """Pool indices of the sets that the source itself has: `train`, and perhaps `validation` and `test`."""
    look: Look = _PHOTOS
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Images of a split, where not derived."""


def _open(source: str) -> _Collection:
    if source == "digits":
        return _open_digits()
    path = Path(os.path.expanduser(source))  # a `~name` of nobody stays as it is
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        raise InputError(f"the data must be a folder of images; {source} is a file")
    prefix, _, name = source.partition(":")
    if prefix == "timm" and name:
        return _open_timm(name)
    if source.partition("/")[0].lower() in _TIMM_PREFIXES:
        return _open_timm(source)
    raise InputError(
        f"there is no data folder {source!r}; the data is an existing folder of images, `digits`, or a name of timm's "
        "dataset factory such as torch/cifar10 or timm:hfds/NAME"
    )


def _open_digits() -> _Collection:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images_NCHW = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = digits.target.astype(np.int64)
    return _Collection(
        pool=MemoryPool(images_NCHW, labels),
        class_names=tuple(str(name) for name in digits.target_names),
        parts={"train": np.arange(len(labels))},
        look=_DIGITS,
        sizes={"test": 600, "validation": 250, "calibration": 100},
    )


def _open_folder(root: Path) -> _Collection:
    folders = _find_parts(root)
    listings = {part: _list_classes(folder) for part, folder in folders.items()}
    class_names = tuple(listings["train"])
    for part, listing in listings.items():
        if tuple(listing) != class_names:
            missing, extra = sorted(set(class_names) - set(listing)), sorted(set(listing) - set(class_names))
            raise InputError(
                f"{folders['train']} and {folders[part]} must hold the same classes; the second lacks "
                f"{listed(missing) or 'none'} and has besides {listed(extra) or 'none'}"
            )
    if len(class_names) < 2:
        raise InputError(
            f"{folders['train']} must hold at least two class folders; found only {listed(class_names)}. "
            "Give the folder that holds the class folders, or train and test folders of them"
        )
    paths: list[str] = []
    labels: list[int] = []
    parts: dict[str, np.ndarray] = {}
    for part, listing in listings.items():
        first = len(paths)
        for label, files in enumerate(listing.values()):
            paths.extend(files)
            labels.extend([label] * len(files))
        parts[part] = np.arange(first, len(paths))
    return _Collection(pool=FilePool(paths, np.array(labels, dtype=np.int64)), class_names=class_names, parts=parts)


def _find_parts(root: Path) -> dict[str, Path]:
    """Return the folder of each part; a flat tree of class folders is all for training."""
    names = [entry.name for entry in _visible_entries(root) if entry.is_dir()]
    found: dict[str, Path] = {}
    for part, synonyms in (("train", _TRAIN), ("validation", _VALIDATION), ("test", _TEST)):
        present = [name for name in names if name.lower() in synonyms]
        if len(present) > 1:
            raise InputError(f"{root} must have one {part} folder; found {listed(present)}")
        if present:
            found[part] = root / present[0]
    # `train` may be a class of vehicles: it is the training set if it has folders, or if nothing else is a class.
    only_parts = bool(found) and len(found) == len(names)
    train = found.get("train")
    has_folders = train is not None and any(entry.is_dir() for entry in _visible_entries(train))
    if only_parts and train is None:
        raise InputError(f"{root} has {listed(names)} and no `train` folder; add it, or give one folder of classes")
    return found if only_parts or has_folders else {"train": root}


def _list_classes(folder: Path) -> dict[str, list[str]]:
    """Return the image files of each class folder, both sorted by name."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    entries = _visible_entries(folder)
    if not entries:
        raise InputError(f"the data folder {folder} is empty; it must hold one folder of images per class")
    classes = [entry for entry in entries if entry.is_dir()]
    if not classes:
        raise InputError(
            f"{folder} must hold one folder of images per class; found {len(entries)} files and no class folders"
        )
    _warn_of_others(classes)
    listing = {
        entry.name: [file.path for file in _visible_entries(entry) if file.name.lower().endswith(IMG_EXTENSIONS)]
        for entry in classes
    }
    empty = [name for name, files in listing.items() if not files]
    if empty:
        raise InputError(
            f"every class folder in {folder} must hold images ({' '.join(IMG_EXTENSIONS)}); none in: {listed(empty)}"
        )
    return listing


def _warn_of_others(classes: Sequence[os.DirEntry[str]]) -> None:
    """Warn of images in formats that are not read: whoever has them would miss them."""
    suffixes = [Path(file.name).suffix.lower() for entry in classes for file in _visible_entries(entry)]
    others = {suffix: suffixes.count(suffix) for suffix in _OTHER_IMAGES if suffix in suffixes}
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.items())
        warnings.warn(f"left out images in formats that are not read: {counts}; save them as .png", stacklevel=6)


def _visible_entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"the data folder {os.fspath(folder)} cannot be read: {error.strerror or error}") from error


def _open_timm(name: str) -> _Collection:
    from timm.data import create_dataset  # pyright: ignore[reportPrivateImportUsage]

    name, _, root = name.partition("@")
    sets: dict[str, Any] = {}
    # timm's readers raise what the library behind them raises.
    try:
        for part, split in (("train", "train"), ("test", "validation")):
            sets[part] = create_dataset(
                name, root=root or _DEFAULT_TIMM_ROOT, split=split, download=name.lower().startswith("torch/")
            )
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"timm's dataset factory could not open {name!r} in {root or _DEFAULT_TIMM_ROOT} "
            f"({type(error).__name__}: {error}); check the name, or give the data's folder as {name}@FOLDER"
        ) from error
    for dataset in sets.values():
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise InputError(f"{name!r} is a stream, which cannot be divided; use hfds/ or a folder of images instead")
    labels = {part: _labels_of(dataset) for part, dataset in sets.items()}
    unknown = sorted(set(labels["test"].tolist()) - set(labels["train"].tolist()))
    if unknown:
        raise InputError(f"the test labels of {name!r} must occur in training; these do not: {listed(unknown)}")
    if len(np.unique(labels["train"])) < 2:
        raise InputError(f"a data set must have at least two classes; {name!r} has one")
    names = getattr(sets["train"], "classes", None) or range(int(labels["train"].max()) + 1)
    return _Collection(
        pool=TimmPool(ConcatDataset(list(sets.values())), np.concatenate(list(labels.values()))),
        class_names=tuple(str(class_name) for class_name in names),
        parts={
            "train": np.arange(len(labels["train"])),
            "test": len(labels["train"]) + np.arange(len(labels["test"])),
        },
    )


def _labels_of(dataset: Any) -> np.ndarray:
    targets = getattr(dataset, "targets", None)
    if targets is None:
        # timm's readers give (undecoded image, label).
        items = getattr(dataset, "reader", dataset)
        targets = [items[index][1] for index in range(len(dataset))]
    return np.asarray(targets, dtype=np.int64)


# The division.


def _divide(collection: _Collection, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return pool indices of the four splits, disjoint, every class in train."""
    labels, sizes = collection.pool.labels, collection.sizes
    parts = dict(collection.parts)
    _check_class_sizes(collection, "train", _MIN_PER_CLASS)
    num_classes = len(collection.class_names)
    if "test" not in parts and "validation" in parts:
        _check_class_sizes(collection, "validation", 2)
        half = min(len(parts["validation"]) // 2, 5000)
        parts["validation"], parts["test"] = _take(labels, parts["validation"], half, rng)
    if "test" not in parts:
        count = sizes.get("test", max(round(0.2 * len(parts["train"])), num_classes))
        parts["test"], parts["train"] = _take(labels, parts["train"], count, rng)
    if "validation" not in parts:
        count = sizes.get("validation", min(max(round(0.1 * len(parts["train"])), num_classes), 5000))
        parts["validation"], parts["train"] = _take(labels, parts["train"], count, rng)
    num_left = len(parts["train"])
    count = sizes.get("calibration", min(max(round(0.02 * num_left), 64), 2048, num_left // 4))
    parts["calibration"], parts["train"] = _take(labels, parts["train"], count, rng)
    return parts


def _check_class_sizes(collection: _Collection, part: str, needed: int) -> None:
    counts = np.bincount(collection.pool.labels[collection.parts[part]], minlength=len(collection.class_names))
    small = [
        f"{name} ({count})"
        for name, count in zip(collection.class_names, counts.tolist(), strict=True)
        if count < needed
    ]
    if small:
        raise InputError(f"every class needs at least {needed} {part} images to be divided; too few: {listed(small)}")


def _take(
    labels: np.ndarray, indices: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw about `count` of the indices in proportion to the classes; return those and the rest, both sorted.

    Exactly `count`, except that each class gives at least one where there are at least as many as classes.
    """
    shuffled = rng.permutation(indices)
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes, starts, class_sizes = np.unique(labels[shuffled], return_index=True, return_counts=True)
    exact = count * class_sizes / len(indices)
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
    if count >= len(classes):
        quotas = np.maximum(quotas, 1)
    rank_in_class = np.arange(len(shuffled)) - np.repeat(starts, class_sizes)
    chosen = rank_in_class < np.repeat(quotas, class_sizes)
    return np.sort(shuffled[chosen]), np.sort(shuffled[~chosen])


def _check_still_complete(labels: np.ndarray, splits: Mapping[str, np.ndarray], class_names: Sequence[str]) -> None:
    present = set(labels[splits["train"]].tolist())
    lost = [name for label, name in enumerate(class_names) if label not in present]
    if lost:
        raise InputError(f"no readable training image is left of the classes: {listed(lost)}")
    emptied = [part for part, indices in splits.items() if len(indices) == 0]
    if emptied:
        raise InputError(f"no readable image is left for: {listed(emptied)}; more images are needed")
