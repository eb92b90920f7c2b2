"""Stopping early: tell from some of the samples that a net is hopeless beside another.

Two nets are compared on the same samples, in a random order, as in the races of Maron and Moore ("Hoeffding Races",
NeurIPS 1993): what they find equally hard falls out of the difference, so that few samples decide where one is worse.

Legend: M samples seen.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

LEAST_SEEN = 256
"""Samples before the first look: a standard error of fewer says little."""
BETWEEN_LOOKS = 64
"""Samples from one look to the next: every look is one more chance to be wrong."""
_ERRORS = 3.0
"""Hopeless is worse by so many standard errors."""
_BATCH_SIZE = 128
"""At most; a step between looks must not be large beside `LEAST_SEEN`."""


def is_hopeless(difference_M: np.ndarray, num_samples: int) -> bool:
    """Return whether a net that is worse so far can be taken for worse on all samples.

    It can if the mean difference is below zero by three standard errors. That of a mean over part of a finite set is
    smaller by `sqrt(1 - M / num_samples)` (Cochran, "Sampling Techniques", 1977, section 2.6): none is left at the end.

    Args:
        difference_M: What each sample seen adds to the net's score less what it adds to the other's, shape (M,); the
            samples are a random part of all.
        num_samples: How many there are in all.
    """
    num_seen = len(difference_M)
    if num_seen < 2:
        return False
    error = float(difference_M.std(ddof=1)) / math.sqrt(num_seen) * math.sqrt(1 - num_seen / num_samples)
    return float(difference_M.mean()) + _ERRORS * error < 0


def shuffled(batches: Sequence[Any], *, ignored: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Return labelled samples in a random order, always the same one: data are often sorted by class.

    Args:
        batches: Batches as the score function would get them.
        ignored: The label of samples that do not count, which are left out.

    Returns:
        Batches (x, labels), no larger than the first one given, each with memory of its own. None if the samples cannot
        be put into another order: the batches are not all pairs of tensors with one class number for each sample, the
        samples have different shapes, or none has a label.
    """
    kinds = {(batch[0].shape[1:], batch[0].dtype) if _is_labelled(batch) else None for batch in batches}
    if len(kinds) != 1 or None in kinds:
        return None
    labels_N = torch.cat([labels for _, labels in batches])
    counted = torch.nonzero(labels_N.cpu() != ignored).flatten()
    order = counted[torch.randperm(len(counted), generator=torch.Generator().manual_seed(0))]
    # Views: images are copied once, into the batches they end up in.
    samples = [sample for x, _ in batches for sample in x.unbind()]
    parts = [part for part in order.split(min(len(batches[0][0]), _BATCH_SIZE)) if len(part)]
    return [(torch.stack([samples[place] for place in part.tolist()]), labels_N[part]) for part in parts] or None


def _is_labelled(batch: Any) -> bool:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return False
    x, labels = batch
    if not isinstance(x, torch.Tensor) or not isinstance(labels, torch.Tensor) or x.ndim == 0:
        return False
    return labels.shape == x.shape[:1] and not (labels.is_floating_point() or labels.is_complex())
