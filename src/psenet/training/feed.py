"""The batches of a training: from any step on the same ones, whatever random numbers the training itself draws."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

Batch = Any
_END = object()


class Feed:
    """Goes through a loader epoch by epoch, and into the middle of one.

    Loading (order, augmentation, the seeds of loading processes) draws from random numbers of its own, which no
    dropout or other use in training shifts. So the batches of an epoch follow from its beginning alone: to be at its
    k-th batch again, the first k are loaded and left out. These random numbers begin with one of torch's.

    Args:
        loader: What the batches come from, for its generators.
        batches: What to iterate over in its place, as accelerate prepared it; with `set_epoch`.
    """

    def __init__(self, loader: DataLoader, batches: Any) -> None:
        self._batches = batches
        self._generators = generators_of(loader)
        self._random: dict[str, Any] | None = None
        self._start = self._now()

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch after the first `skip`."""
        self._batches.set_epoch(number)
        if self._random is None:
            self._random = _random_state_seeded(int(torch.randint(2**32, ())))
        self._start = self._now()
        iterator: Iterator[Batch] | None = None
        place = 0
        while True:
            with self._own_random_numbers():
                iterator = iter(self._batches) if iterator is None else iterator
                batch = next(iterator, _END)
            if batch is _END:
                break
            if place >= skip:
                yield batch
            place += 1
        self._start = self._now()

    def state_dict(self) -> dict[str, Any]:
        """Return what the epoch begins with that is going on, or the next one if none is."""
        return self._start

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make what `epoch` gives next begin like that."""
        for generator, of_generator in zip(self._generators, state["generators"], strict=True):
            generator.set_state(of_generator)
        self._random = dict(state["random"])
        self._start = self._now()

    def _now(self) -> dict[str, Any]:
        return {"random": self._random, "generators": [generator.get_state() for generator in self._generators]}

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        assert self._random is not None
        of_training = random_state()
        set_random_state(self._random)
        try:
            yield
        finally:
            self._random = random_state()
            set_random_state(of_training)


def generators_of(loader: DataLoader) -> list[torch.Generator]:
    """Return the random generators that decide a loader's order, each once."""
    holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))


def generators_of_samplers(loader: DataLoader) -> list[tuple[Any, torch.Generator | None]]:
    """Return the samplers of a loader that may have a generator, each with its own or None."""
    samplers: Iterable[Any] = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return [(sampler, getattr(sampler, "generator", None)) for sampler in samplers if hasattr(sampler, "generator")]


def random_state() -> dict[str, Any]:
    """Return the states of the process's generators on the CPU (torch, Python, NumPy) as tensors and plain values."""
    of_numpy = np.random.get_state(legacy=False)
    assert isinstance(of_numpy, dict)
    inner = of_numpy["state"]
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {**of_numpy, "state": {**inner, "key": torch.from_numpy(inner["key"].astype(np.int64))}},
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take a state of `random_state` back."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})


def _random_state_seeded(seed: int) -> dict[str, Any]:
    before = random_state()
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    random.seed(seed)
    np.random.seed(seed)
    try:
        return random_state()
    finally:
        set_random_state(before)
