"""Several processes that train together, as `accelerate launch` or torchrun starts them; one alone needs nothing here.

Each process is a rank. Rank 0 decides what is there and writes all files; the others do the same training steps on
their parts of the batches. What is computed in common goes over the device's own connection (NCCL or gloo), words
between the processes over one on the CPU, where a rank may wait as long as a search takes.

Legend: R ranks.
"""

import atexit
import functools
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from psenet.errors import ElsewhereError

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=14)
"""For rank 0 to search, measure and export. A rank that has died is noticed at once all the same: its end closes the
connection."""
_BUCKET_ELEMENTS = 2**24
"""Gradients averaged at once: 64 MiB in float32."""


_words_reference: "weakref.ref[dist.ProcessGroup] | None" = None
"""To the connection for words. Only torch holds it, so that it ends where torch gives it up: see `leave`."""
_is_alone: ContextVar[bool] = ContextVar("psenet_is_alone", default=False)
"""Whether rank 0 is at something that the others wait for."""


def num_ranks() -> int:
    """Return how many processes train together, 1 for one alone."""
    return dist.get_world_size() if _are_joined() else 1


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return dist.get_rank() if _are_joined() else 0


def is_main() -> bool:
    """Return whether this process is the one that decides and writes."""
    return rank() == 0


def leave() -> None:
    """Part from the other ranks at the end of a program, if there are any.

    Ends the threads of gloo, too. One that is left when Python goes down and still holds a tensor aborts the process,
    after all its work is done.
    """
    if _are_joined():
        dist.destroy_process_group()


def _leave_gloo() -> None:
    """Do that for a program that has not.

    A connection over NCCL stays: to close it may mean to wait for other ranks.
    """
    if _are_joined():
        if dist.get_backend() == dist.Backend.GLOO:
            leave()
        elif (group := _known_words()) is not None:
            dist.destroy_process_group(group)


# Words ----------------------------------------------------------------------------------------------------------------


def from_main(make: Callable[[], T]) -> T:
    """Return on every rank what rank 0 makes; the others wait for it.

    Args:
        make: Called on rank 0 only, where meanwhile it is as if there were no others; with several ranks its result
            must be picklable.

    Raises:
        Exception: Whatever `make` raised, on rank 0.
        ElsewhereError: On the others, if it raised there.
    """
    if num_ranks() == 1:
        return make()
    told: list[Any] = [None, None]
    error: BaseException | None = None
    if is_main():
        try:
            with _alone():
                told[0] = make()
        except BaseException as caught:
            error = caught
            told[1] = f"{type(caught).__name__}: {caught}"
    if error is not None:
        with suppress(RuntimeError):  # where the others are gone already, there is nobody to be told
            dist.broadcast_object_list(told, group=_words())
        raise error
    dist.broadcast_object_list(told, group=_words())
    if told[1] is not None:
        raise ElsewhereError(f"the main process has failed: {told[1]}")
    return told[0]


@contextmanager
def _alone() -> Iterator[None]:
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def in_main(do: Callable[[], object]) -> None:
    """Do something on rank 0 only; the others wait until it is done, and fail where it fails."""

    def and_forget() -> None:
        do()

    from_main(and_forget)


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on every rank."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value, group=_words())
    return values


# Numbers --------------------------------------------------------------------------------------------------------------


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over all ranks of a tensor of one shape, to the last bit the same on each of them."""
    if num_ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / num_ranks()


def average_gradients(module: nn.Module) -> None:
    """Replace all gradients by their mean over the ranks.

    Called once a step, after all its backward passes, whichever parameters they reached: what no rank has reached stays
    without a gradient, and counts as zero on a rank that alone has not.
    """
    if num_ranks() == 1:
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    is_reached = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(is_reached, op=dist.ReduceOp.MAX, group=_words())
    gradients = []
    for parameter, reached in zip(parameters, is_reached.tolist(), strict=True):
        if reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = mean(torch.cat([gradient.flatten() for gradient in bucket]))
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def average_statistics(module: nn.Module) -> None:
    """Give all ranks the same buffers: of batch norms' running statistics the mean, of others those of rank 0."""
    if num_ranks() == 1:
        return
    averaged: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, _NormBase):
            for statistic in (layer.running_mean, layer.running_var):
                if statistic is not None:
                    statistic.copy_(mean(statistic))
                    averaged.add(id(statistic))
    for buffer in module.buffers():
        if id(buffer) not in averaged:
            _take_first(buffer)


def begin_alike(module: nn.Module) -> None:
    """Give all ranks the weights and buffers of rank 0."""
    if num_ranks() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                _take_first(tensor)


def _take_first(tensor: torch.Tensor) -> None:
    whole = tensor.contiguous()
    dist.broadcast(whole, src=0)
    tensor.copy_(whole)


def draw_differently() -> None:
    """Give every rank but the first random numbers of its own: dropout and augmentation must not repeat themselves."""
    if rank():
        seed = (torch.initial_seed() + int(torch.randint(2**31, ())) + rank()) % 2**32
        torch.manual_seed(seed)  # of the accelerators, too
        random.seed(seed)
        np.random.seed(seed)


def load_differently(loader: Any) -> None:
    """Do the same for the processes that load data for a rank; their seeds come from a generator that ranks share."""
    if rank():
        loads = getattr(loader, "base_dataloader", loader)  # accelerate's is a shell around it
        loads.worker_init_fn = functools.partial(_reseed, rank(), loads.worker_init_fn)


def _reseed(number: int, then: Callable[[int], None] | None, worker: int) -> None:
    seed = (torch.initial_seed() + number * 2**16) % 2**32
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    if then is not None:
        then(worker)


def _buckets(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return tensors in lists of one type each and of limited size, in an order that is the same on all ranks."""
    buckets: list[list[torch.Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets


def _are_joined() -> bool:
    return dist.is_available() and dist.is_initialized() and not _is_alone.get()


def _words() -> dist.ProcessGroup:
    """Return the connection for words between all ranks; all make it at their first one."""
    global _words_reference
    group = _known_words()
    if group is None:
        group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        assert isinstance(group, dist.ProcessGroup)
        _words_reference = weakref.ref(group)
        atexit.register(_leave_gloo)
    return group


def _known_words() -> dist.ProcessGroup | None:
    return _words_reference() if _words_reference is not None else None
