"""Images that no run of a comparison has trained on, and what the nets of the runs answer to them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from psenet.data import DataSplits, load_data, make_loader
from psenet.errors import InputError
from psenet.evaluate import right_answers
from psenet.finished import FinishedRun
from psenet.inputs import as_arguments

SPLITS = ("validation", "test")
_LEAST_IMAGES = 50
_RUN_BATCH_SIZE = 256
"""Of the loaders that the command line makes for validation and test."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The same images for every run, in the size that its nets take."""

    images: tuple[Dataset[Any], ...]
    """One data set a run, in the order of the runs; the same images in the same order."""
    notes: tuple[str, ...]
    """What a reader of the figures should know of them."""


def load_held_out(
    runs: Sequence[FinishedRun],
    source: str,
    *,
    split: Literal["validation", "test"],
    image_size: int | None = None,
    skip_unreadable: bool = False,
    say: Callable[[str], None] | None = None,
) -> HeldOut:
    """Load the images of a split that every run has held out.

    The division into splits is made anew with each run's seed. Where the seeds differ, so do the splits, and only the
    images that are in the split of every run are taken.

    Args:
        runs: At least one.
        source: The data that they were made with; see `psenet.data.load_data`.
        split: Which split.
        image_size: Height and width of the images; None for each run's own.
        skip_unreadable: Leave unreadable images out, with a warning.
        say: Gets a line for a person at each loading.

    Raises:
        InputError: The runs tell different numbers of classes apart, the data has others, its images do not fit the
            nets, a recipe lacks the seed, or too few images are held out by all.
    """
    seeds, sizes = [_seed(run) for run in runs], [image_size or _image_size(run) for run in runs]
    _check_same_classes(runs)
    loaded: dict[tuple[int, int], DataSplits] = {}
    for seed in dict.fromkeys(seeds):
        # The first size for every seed, too: by it the images of two divisions are recognised.
        for size in dict.fromkeys([sizes[0], *(size for size, own in zip(sizes, seeds, strict=True) if own == seed)]):
            if say is not None:
                say(f"loading {source}, {size} x {size} pixels, divided by seed {seed}")
            loaded[seed, size] = load_data(source, image_size=size, seed=seed, skip_unreadable=skip_unreadable)
    for run, seed, size in zip(runs, seeds, sizes, strict=True):
        _check_fits(run, loaded[seed, size], source)
    places = _common({seed: getattr(loaded[seed, sizes[0]], split) for seed in seeds}, split)
    images = [Subset(getattr(loaded[key], split), places[key[0]]) for key in zip(seeds, sizes, strict=True)]
    notes = [note for run, seed in zip(runs, seeds, strict=True) for note in _doubts(run, loaded, seed, source)]
    if len(set(seeds)) > 1:
        whole = len(getattr(loaded[seeds[0], sizes[0]], split))
        notes.append(
            f"the runs have different seeds, which divide the data differently: of {whole} {split} images, the "
            f"{len(images[0])} that all runs have held out are used"
        )
    return HeldOut(images=tuple(images), notes=tuple(notes))


def answers(net: nn.Module, images: Dataset[Any], *, name: str, batch_size: int = _RUN_BATCH_SIZE) -> np.ndarray:
    """Return which images a net gets right, bool of shape (N,), in their order.

    Args:
        net: On the device to run on.
        images: Pairs of image and label.
        name: What a message calls the net.
        batch_size: Images in one pass.

    Raises:
        InputError: An output is NaN or infinite: such a net is broken, and its answers are none.
    """

    def finite(module: nn.Module, batch: Any) -> Any:
        logits = module(*as_arguments(batch[0]))
        if not torch.isfinite(logits).all():
            raise InputError(f"the {name} net gives outputs that are NaN or infinite; it cannot be compared")
        return logits

    return right_answers(net, make_loader(images, batch_size=batch_size, shuffle=False), forward_fn=finite).numpy()


# What the runs were made with -----------------------------------------------------------------------------------------


def _seed(run: FinishedRun) -> int:
    seed = run.recipe.get("settings", {}).get("seed")
    if not isinstance(seed, int):
        raise InputError(
            f"the recipe of the run in {run.path} must have the seed that divided its data; it has {seed!r}: without "
            "it nobody can tell which images it has trained on"
        )
    return seed


def _image_size(run: FinishedRun) -> int:
    if len(run.input_shape) != 3 or run.input_shape[1] != run.input_shape[2]:
        raise InputError(
            f"the run in {run.path} must be of square images; its recipe has the shape {list(run.input_shape)}: give "
            "--image-size, if its nets take square ones too"
        )
    return run.input_shape[1]


def _num_classes(run: FinishedRun) -> int:
    with torch.no_grad():
        return run.baseline(torch.zeros(1, *run.input_shape)).shape[1]


def _check_same_classes(runs: Sequence[FinishedRun]) -> None:
    classes = {str(run.path): _num_classes(run) for run in runs}
    if len(set(classes.values())) > 1:
        told = ", ".join(f"{path} {number}" for path, number in classes.items())
        raise InputError(
            f"runs can be compared only if their nets tell the same classes apart; numbers of them: {told}"
        )


def _check_fits(run: FinishedRun, splits: DataSplits, source: str) -> None:
    """Make sure that a run's nets can answer to these images."""
    number = _num_classes(run)
    if splits.num_classes != number:
        raise InputError(
            f"{source} has {splits.num_classes} classes, the nets of {run.path} tell {number} apart: give the data "
            f"that the run was made with ({run.recipe.get('data')!r})"
        )
    if splits.input_shape[0] != run.input_shape[0]:
        raise InputError(
            f"the images of {source} have {splits.input_shape[0]} channels, the nets of {run.path} take "
            f"{run.input_shape[0]}: give the data that the run was made with ({run.recipe.get('data')!r})"
        )
    try:
        with torch.no_grad():
            run.baseline(torch.zeros(1, *splits.input_shape))
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"the nets of {run.path} refuse images of shape {splits.input_shape}: {type(error).__name__}: {error}"
        ) from error


def _doubts(run: FinishedRun, loaded: Mapping[tuple[int, int], DataSplits], seed: int, source: str) -> list[str]:
    """Return why a run's training may have seen these images after all."""
    made_with = run.recipe.get("data")
    if made_with != source:
        return [
            f"{run.path} was made with {made_with!r}, not {source!r}: if these are other data, nobody can tell whether "
            "its training has seen some of the images"
        ]
    splits = next(splits for (own, _), splits in loaded.items() if own == seed)
    before = run.recipe.get("batches", {})
    now = {part: -(-len(getattr(splits, part)) // _RUN_BATCH_SIZE) for part in SPLITS}
    changed = [part for part in SPLITS if before.get(part, now[part]) not in (now[part], None)]
    if changed:
        return [
            f"{run.path} had {before[changed[0]]} batches of {changed[0]} images, {source} now gives "
            f"{now[changed[0]]}: if the data has changed since, its training may have seen some of these images"
        ]
    return []


# Images that several divisions have in common -------------------------------------------------------------------------


def _common(splits: Mapping[int, Any], split: str) -> dict[int, list[int]]:
    """Return for each seed the places of the images that the splits of all seeds have, in one common order.

    Images are recognised by their pixels, as decoding forgets where they came from; equal ones pass for one. That costs
    a pass over the images, and only where the seeds differ.
    """
    if len(splits) == 1:
        return {seed: list(range(len(images))) for seed, images in splits.items()}
    found = {seed: _by_pixels(images) for seed, images in splits.items()}
    first = next(iter(found.values()))
    shared = [pixels for pixels in first if all(pixels in places for places in found.values())]
    if len(shared) < _LEAST_IMAGES:
        raise InputError(
            f"the runs have different seeds ({', '.join(map(str, splits))}), which divide the data differently; only "
            f"{len(shared)} {split} images are held out by all, at least {_LEAST_IMAGES} are needed: compare runs of "
            "one seed, or, where the data has test images of its own, take --split test"
        )
    return {seed: [places[pixels] for pixels in shared] for seed, places in found.items()}


def _by_pixels(images: Any) -> dict[bytes, int]:
    """Return the place of each image by a digest of its pixels and label; of equal ones the last."""
    places: dict[bytes, int] = {}
    for place in range(len(images)):
        image_CHW, label = images[place]
        places[hashlib.sha256(image_CHW.numpy().tobytes() + label.to_bytes(8)).digest()] = place
    return places
