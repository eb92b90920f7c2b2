"""Score a subnet: give it normalisation statistics of its own, then measure it on validation batches.

The statistics that a supernet's training leaves behind are a mixture over many widths and right for none of them, so
every candidate is recalibrated first (design of slimmable networks; Yu and Huang, "Universally Slimmable Networks",
arXiv 1903.05134, section 3.3).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from psenet.devices import device_of, to_device
from psenet.errors import InputError
from psenet.inputs import as_arguments
from psenet.memory_format import ImageLayout
from psenet.scoring import Scored
from psenet.stopping import BETWEEN_LOOKS, LEAST_SEEN, is_hopeless, shuffled
from psenet.widths import Widths

IGNORED = -100
"""The label of places that do not count, torch's own."""
ForwardFn = Callable[[nn.Module, Any], Any]
"""`forward_fn(module, batch)` runs the module on one batch and returns its outputs."""
ScoreFn = Callable[[nn.Module, Any], float]
"""`score_fn(module, batches)` goes through the batches, a list or a DataLoader, and returns a score, higher is better;
the module comes in eval mode, without gradients."""
ValueFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`value_fn(logits, labels)` returns what a score is the mean of: one value for each label."""
_RIVALS_KEPT = 32
"""Settings whose values at all samples are remembered: the best so far of several budgets, and all first candidates."""


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
            num_correct = num_correct + _is_right(logits, labels).sum()
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
        total = total + _true_probability(logits, labels).sum()
        num_labels = num_labels + (labels != IGNORED).sum()
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
            right.append(_is_right(logits, labels)[labels != IGNORED].cpu())
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

    A search may ask for less, whether a subnet has any hope to beat another: `against`. That spares samples where the
    score is a mean over them (`accuracy`, `soft_accuracy`) and every sample is a tensor with one label; the samples are
    then put into an order of their own. Any other score, and one of dense labels, takes all samples every time.

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
        self._value_fn = _value_fn(score_fn)
        samples = None if self._value_fn is None else shuffled(self._validation, ignored=IGNORED)
        if samples is None:
            self._value_fn = None
        else:
            self._validation = samples
        self._known: OrderedDict[Widths, np.ndarray] = OrderedDict()

    def __call__(self, widths: Widths) -> float:
        """Return the score of a subnet, NaN if its outputs are not finite (scores of this module)."""
        if self._value_fn is not None:
            return _percent(self._measured(widths))
        module = self._recalibrated(widths)
        if self._score_fn is None:
            return accuracy(module, self._validation, forward_fn=self._forward_fn)
        with eval_mode(module), torch.no_grad():
            return float(self._score_fn(module, self._validation))

    def against(self, widths: Widths, rival: Widths) -> Scored:
        """Score a subnet, but no further than it takes to see that it is hopeless beside another one.

        After 256 samples, and then after every 64 or more, both are compared on the samples seen; see
        `psenet.stopping.is_hopeless`. The same two settings give the same result every time, in any process.

        Args:
            widths: The setting to score.
            rival: What it would have to beat. Scored on all samples, unless it is among the latest few that were:
                these are remembered, so a supernet that has been trained on needs a new object.

        Returns:
            The score as a call returns it. If the subnet is hopeless, the rival's score plus the mean difference on the
            samples seen, which is below the rival's score, and their share.
        """
        if self._value_fn is None:
            return Scored(self(widths))
        if rival in self._known:
            self._known.move_to_end(rival)
        rival_N = self._known[rival] if rival in self._known else self._measured(rival)
        seen_M, num_looked = np.empty(0), LEAST_SEEN - BETWEEN_LOOKS
        for more in self._values(self._recalibrated(widths)):
            seen_M = np.concatenate([seen_M, _plain(more)])
            share = len(seen_M) / len(rival_N)
            if not np.isfinite(seen_M[-len(more) :]).all():
                return Scored(math.nan, share)
            if len(seen_M) - num_looked < BETWEEN_LOOKS:
                continue
            num_looked = len(seen_M)
            difference_M = seen_M - rival_N[:num_looked]
            if is_hopeless(difference_M, len(rival_N)):
                return Scored(_percent(rival_N) + _percent(difference_M), share)
        self._remember(widths, seen_M)
        return Scored(_percent(seen_M))

    def _recalibrated(self, widths: Widths) -> nn.Module:
        module = self._supernet.subnet(widths)
        if not self._is_laid_out:
            self._lay_out(module)
        recalibrate(module, self._calibration, forward_fn=self._forward_fn)
        return module

    def _measured(self, widths: Widths) -> np.ndarray:
        """Return what the score of a setting is the mean of, at all N samples: float64, shape (N,)."""
        values_N = _plain(torch.cat(list(self._values(self._recalibrated(widths)))))
        self._remember(widths, values_N)
        return values_N

    def _values(self, module: nn.Module) -> Iterator[torch.Tensor]:
        """Yield what the score is the mean of, batch for batch, shape (B,); NaN where an output is not finite."""
        assert self._value_fn is not None
        run = _forward_first if self._forward_fn is None or self._score_fn is not None else self._forward_fn
        with eval_mode(module), torch.no_grad():
            for batch in self._validation:
                logits, labels = _checked(run(module, batch), batch)
                values_B = self._value_fn(logits, labels).float()
                yield values_B.where(torch.isfinite(logits).all(), math.nan)

    def _remember(self, widths: Widths, values_N: np.ndarray) -> None:
        self._known[widths] = values_N
        self._known.move_to_end(widths)
        if len(self._known) > _RIVALS_KEPT:
            self._known.popitem(last=False)

    def _lay_out(self, module: nn.Module) -> None:
        """Put the images channels-last, once, if the subnets can read them so: less than 3/4 of the time on a CPU."""
        layout = ImageLayout(module)
        with eval_mode(module):
            for batches in (self._calibration, self._validation):
                for number, batch in enumerate(batches):  # one by one: there may be little memory for all twice
                    batches[number] = _laid_out(batch, layout)
        self._is_laid_out = True


def _value_fn(score_fn: ScoreFn | None) -> ValueFn | None:
    """Return what a score of this module is the mean of, in percent; None of any other score."""
    if score_fn is None or score_fn is accuracy:
        return _is_right
    return _true_probability if score_fn is soft_accuracy else None


def _is_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return where the class with the largest logit is the true one, of the shape of the labels."""
    return logits.argmax(dim=1) == labels


def _true_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the probability of the true class, of the shape of the labels; 0 where none counts."""
    counts = labels != IGNORED
    return logits.float().softmax(dim=1).gather(1, (labels * counts).unsqueeze(1)).squeeze(1) * counts


def _plain(values: torch.Tensor) -> np.ndarray:
    return values.cpu().double().numpy()


def _percent(values: np.ndarray) -> float:
    return 100.0 * float(values.mean())


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
