"""A supernet whose subnets give known answers: what each of them makes of each sample is drawn beforehand."""

import zlib

import numpy as np
import torch
from torch import nn

from psenet.evaluate import SupernetScore, soft_accuracy
from psenet.space import WidthSpace
from psenet.widths import Widths
from synthetic import Additive


class Answers:
    """Samples are their own numbers; the wider a subnet, the surer it is of the true class, 1 or 0, of most.

    Args:
        space: The width space.
        num_samples: How many samples there are; labels come sorted, as in many folders of images.
        noise: How differently two subnets find the same samples.
    """

    def __init__(self, space: WidthSpace, *, num_samples: int = 2000, noise: float = 0.3) -> None:
        rng = np.random.default_rng(0)
        self.quality = Additive(space)
        self.noise = noise
        self.labels_N = np.sort(rng.integers(2, size=num_samples))
        self.easy_N = 2 * rng.normal(size=num_samples)
        self.num_seen = 0
        self.broken: dict[int, float] = {}
        """Logits of single samples, of every subnet."""

    def probability(self, widths: Widths) -> np.ndarray:
        """Return the probability of the true class of every sample, shape (N,)."""
        rng = np.random.default_rng(zlib.crc32(str(tuple(widths.values())).encode()))
        logit_N = self.easy_N + self.quality.of(widths) + self.noise * rng.normal(size=len(self.easy_N))
        return 1 / (1 + np.exp(-logit_N))

    def subnet(self, widths: Widths, /) -> nn.Module:
        """Return the net that gives these answers."""
        logit_N = np.log(self.probability(widths) / (1 - self.probability(widths)))
        signed_N = np.where(self.labels_N == 1, logit_N, -logit_N)
        for sample, value in self.broken.items():
            signed_N[sample] = value
        return _Net(self, torch.from_numpy(np.stack([np.zeros_like(signed_N), signed_N], axis=1)))

    def batches(self, size: int = 250) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return all samples (number, label), in order."""
        numbers_N, labels_N = torch.arange(len(self.labels_N))[:, None].float(), torch.from_numpy(self.labels_N)
        return list(zip(numbers_N.split(size), labels_N.split(size), strict=True))

    def score(self) -> SupernetScore:
        """Return the mean probability of the true class as a search takes it."""
        return SupernetScore(self, self.batches()[:1], self.batches(), score_fn=soft_accuracy)


class _Net(nn.Module):
    def __init__(self, answers: Answers, logits_NC: torch.Tensor) -> None:
        super().__init__()
        self.answers = answers
        self.logits_NC = logits_NC

    def forward(self, x_B1: torch.Tensor) -> torch.Tensor:
        self.answers.num_seen += len(x_B1)
        return self.logits_NC[x_B1[:, 0].long()]
