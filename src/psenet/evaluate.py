"""Score a subnet: give it normalisation statistics of its own, then measure it on validation batches.

The statistics that a supernet's training leaves behind are a mixture over many widths and right for none of them, so
every candidate is recalibrated first (design of slimmable networks; Yu and Huang, "Universally Slimmable Networks",
arXiv 1903.05134, section 3.3).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from psenet.devices import device_of, to_device
from psenet.errors import InputError
from psenet.inputs import as_arguments
from psenet.memory_format import ImageLayout
from psenet.widths import Widths

IGNORED = -100
"""The label of places that do not count, torch's own."""
ForwardFn = Callable[[nn.Module, Any], Any]
"""`forward_fn(module, batch)` runs the module on one batch and returns its outputs."""
ScoreFn = Callable[[nn.Module, Any], float]
"""`score_fn(module, batches)` goes through the batches, a list or a DataLoader, and returns a score, higher is better;
the module comes in eval mode, without gradients."""


class HasSubnets(Protocol):
    """What scoring needs of a supernet."""

    def subnet(self, widths: Widths, /) -> nn.Module:
        """Return the subnet of these widths, with normalisation statistics of its own."""
        ...


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode, and give every part of it its own training flag back afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def recalibrate(module: nn.Module, batches: Iterable[Any], *, forward_fn: ForwardFn | None = None) -> int:
    """Replace the statistics of all batch norms by their average over `batches`.

    Every batch counts the same (a cumulative average, in place of the exponential one of training). Only the norms
    run in training mode: dropout and the like stay off, so the result is the same every time. Momentum and training
    flags are as before afterwards. A module without batch norms that keep statistics is left alone.

    Args:
        module: Changed in place.
        batches: Best all of one size, at least two samples each.
        forward_fn: Runs the module on one batch; by default `module(batch[0])`.

    Returns:
        The number of batch norms recalibrated, 0 if there is nothing to do.

    Raises:
        InputError: There are no batches, or a batch is too small to give statistics.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    if not norms:
        return 0
    run = forward_fn or _forward_first
    num_batches, place = 0, device_of(module)
    with eval_mode(module), _cumulative_statistics(norms), torch.no_grad():
        for batch in (to_device(batch, place) for batch in batches):
            if num_batches == 0:
                for norm in norms:
                    norm.reset_running_stats()
            _run_calibration(run, module, batch, num_batches)
            num_batches += 1
    if num_batches == 0:
        raise InputError("recalibration needs at least one batch; got none: check the calibration data")
    return len(norms)


def accuracy(module: nn.Module, batches: Iterable[Any], *, forward_fn: ForwardFn | None = None) -> float:
    """Return the top-1 accuracy in percent, 0 to 100, in eval mode.

    Args:
        module: Returns logits of shape (B, classes), or (B, classes, ...) for dense labels. Its training flags are as
            before afterwards.
        batches: Pairs (x, y), y the class numbers, shape (B,) or (B, ...); labels -100 do not count.
        forward_fn: Runs the module on one batch; by default `module(batch[0])`.

    Returns:
        The accuracy, or NaN if any logit is NaN or infinite: a broken module is not merely a bad one.

    Raises:
        TypeError: The outputs or labels are not tensors.
        InputError: There are no labels, or their shape does not go with the logits.
    """
    run = forward_fn or _forward_first
    num_correct: torch.Tensor | int = 0
    num_labels: torch.Tensor | int = 0
    all_finite: torch.Tensor | bool = True
    place = device_of(module)
    with eval_mode(module), torch.no_grad():
        # Counted on the device: the one transfer at the end is the only point that waits for an accelerator.
        for batch in (to_device(batch, place) for batch in batches):
            logits, labels = _checked(run(module, batch), batch)
            num_correct = num_correct + (logits.argmax(dim=1) == labels).sum()
            all_finite = torch.isfinite(logits).all() & all_finite
            num_labels = num_labels + (labels != IGNORED).sum()
    if num_labels == 0:
        raise InputError("accuracy needs at least one labelled sample; got none: check the validation data")
    return 100.0 * float(num_correct) / float(num_labels) if bool(all_finite) else math.nan


def soft_accuracy(module: nn.Module, batches: Iterable[Any], *, forward_fn: ForwardFn | None = None) -> float:
    """Return the mean probability of the true class in percent, 0 to 100, in eval mode.

    On a few hundred samples many candidates classify the same number correctly, and which of them gets one more is
    chance. The probabilities tell them apart with much less noise, and unlike the loss they are bounded: one sample
    that is very wrong does not decide.

    Takes, returns and raises what `accuracy` does.
    """
    run = forward_fn or _forward_first
    total: torch.Tensor | float = 0.0
    num_labels: torch.Tensor | int = 0

    def run_and_add(module: nn.Module, batch: Any) -> Any:
        nonlocal total, num_labels
        logits, labels = _checked(run(module, batch), batch)
        counts = labels != IGNORED
        true = logits.float().softmax(dim=1).gather(1, (labels * counts).unsqueeze(1)).squeeze(1)
        total = total + (true * counts).sum()
        num_labels = num_labels + counts.sum()
        return logits

    is_finite = math.isfinite(accuracy(module, batches, forward_fn=run_and_add))
    return 100.0 * float(total) / float(num_labels) if is_finite else math.nan


def right_answers(module: nn.Module, batches: Iterable[Any], *, forward_fn: ForwardFn | None = None) -> torch.Tensor:
    """Return which labels a module gets right, in eval mode: bool on the CPU, one for each label, in their order.

    Takes and raises what `accuracy` does, but for NaN and no labels at all, which are no error here.
    """
    run, place = forward_fn or _forward_first, device_of(module)
    right = [torch.empty(0, dtype=torch.bool)]
    with eval_mode(module), torch.no_grad():
        for batch in (to_device(batch, place) for batch in batches):
            logits, labels = _checked(run(module, batch), batch)
            right.append((logits.argmax(dim=1) == labels)[labels != IGNORED].cpu())
    return torch.cat(right)


def paired_difference(
    module: nn.Module, other: nn.Module, batches: Iterable[Any], *, forward_fn: ForwardFn | None = None
) -> tuple[float, float]:
    """Return by how much a module's accuracy exceeds another's on the same samples, and the standard error of that.

    Only samples that one of them gets right and the other wrong tell them apart, so the error is much less than that of
    either accuracy. It is the error that the difference has where both are equally good (McNemar 1947: the root of the
    number of such samples), so that a single sample never counts as evidence.

    Args:
        module: See `accuracy`.
        other: What it is compared with.
        batches: Pairs (x, y) as for `accuracy`.
        forward_fn: Runs a module on one batch; by default `module(batch[0])`.

    Returns:
        Difference and standard error, both in points of a percent.
    """
    batches = list(batches)
    right, right_other = (right_answers(net, batches, forward_fn=forward_fn).double() for net in (module, other))
    difference = right - right_other
    if not len(difference):
        raise InputError("comparing two nets needs at least one labelled sample; got none: check the validation data")
    scale = 100 / len(difference)
    return scale * float(difference.sum()), scale * math.sqrt(float(difference.square().sum()))


def batch_difference(
    module: nn.Module, other: nn.Module, batches: Sequence[Any], score_fn: ScoreFn
) -> tuple[float, float]:
    """Return by how much a module's score exceeds another's, and the standard error of that, from any score.

    The error is that of the mean of the differences on single batches; of a single batch it is not known: infinite.

    Args:
        module: What is scored.
        other: What it is compared with.
        batches: Best many small ones.
        score_fn: (module, batches) to a score.
    """
    with eval_mode(module), eval_mode(other), torch.no_grad():
        difference = score_fn(module, list(batches)) - score_fn(other, list(batches))
        singles = [score_fn(module, [batch]) - score_fn(other, [batch]) for batch in batches]
    if len(singles) < 2:
        return difference, math.inf
    return difference, float(torch.tensor(singles, dtype=torch.float64).std()) / math.sqrt(len(singles))


class SupernetScore:
    """Estimate how good a subnet is by its score with the supernet's weights.

    Calling it with `Widths` returns the score, higher is better. Nothing of the supernet changes, and the same widths
    give the same score.

    Args:
        supernet: Gives out subnets with normalisation statistics of their own.
        calibration: Batches for the statistics; may come from training data.
        validation: Batches for the score. Both are read once, here, and kept: a few thousand samples, not more.
        score_fn: `score_fn(module, batches) -> float`; by default top-1 accuracy in percent, for batches (x, y).
        forward_fn: `forward_fn(module, batch)`, used for calibration and by the default score; by default
            `module(batch[0])`.
        device: Where the batches are kept. Default: where the supernet's parameters are; the batches stay where they
            came from if it has none.

    Raises:
        InputError: `calibration` or `validation` is empty.
    """

    def __init__(
        self,
        supernet: HasSubnets,
        calibration: Iterable[Any],
        validation: Iterable[Any],
        *,
        score_fn: ScoreFn | None = None,
        forward_fn: ForwardFn | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._supernet = supernet
        self._score_fn = score_fn
        self._forward_fn = forward_fn
        place = torch.device(device) if device is not None else device_of(supernet)
        self._is_laid_out = forward_fn is not None  # what another forward reads is not ours to arrange
        self._calibration = [to_device(batch, place) for batch in calibration]
        self._validation = [to_device(batch, place) for batch in validation]
        empty = [
            name
            for name, batches in (("calibration", self._calibration), ("validation", self._validation))
            if not batches
        ]
        if empty:
            raise InputError(
                f"scoring needs at least one batch each for calibration and validation; {' and '.join(empty)} gave "
                "none: check the data, or whether drop_last leaves out the only batch"
            )

    def __call__(self, widths: Widths) -> float:
        """Return the score of a subnet, NaN if its outputs are not finite (default score)."""
        module = self._supernet.subnet(widths)
        if not self._is_laid_out:
            self._lay_out(module)
        recalibrate(module, self._calibration, forward_fn=self._forward_fn)
        if self._score_fn is None:
            return accuracy(module, self._validation, forward_fn=self._forward_fn)
        with eval_mode(module), torch.no_grad():
            return float(self._score_fn(module, self._validation))

    def _lay_out(self, module: nn.Module) -> None:
        """Put the images channels-last, once, if the subnets can read them so: less than 3/4 of the time on a CPU."""
        layout = ImageLayout(module)
        with eval_mode(module):
            self._calibration = [_laid_out(batch, layout) for batch in self._calibration]
            self._validation = [_laid_out(batch, layout) for batch in self._validation]
        self._is_laid_out = True


def _laid_out(batch: Any, layout: ImageLayout) -> Any:
    if not isinstance(batch, tuple | list) or not isinstance(batch[0], torch.Tensor):
        return batch
    return (layout(batch[0]), *batch[1:])


@contextmanager
def _cumulative_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        # Not train(): a norm may hold other modules (timm puts dropout and activation inside), which stay off.
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _run_calibration(run: ForwardFn, module: nn.Module, batch: Any, number: int) -> None:
    try:
        run(module, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"calibration batch {number} has a single sample, which has no variance: give batches of two samples or "
            "more (drop_last=True leaves out a short last one)"
        ) from error


def _forward_first(module: nn.Module, batch: Any) -> Any:
    return module(*as_arguments(batch[0]))


def _checked(logits: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch[1]
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor):
        raise TypeError(
            f"accuracy needs tensors of logits and labels; got {type(logits).__name__} and {type(labels).__name__}: "
            "give a score_fn for other outputs"
        )
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise InputError(
            "accuracy needs logits (B, classes, ...) and class numbers (B, ...); got shapes "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}: give a score_fn for other outputs"
        )
    return logits, labels
