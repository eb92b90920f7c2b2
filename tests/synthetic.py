"""A width space without a model, and scores and losses on it that are known."""

import itertools

import numpy as np
import torch

from psenet.cost import LinearForm, PeakCost, ProductCost
from psenet.history import History
from psenet.space import ChannelGroup, SpaceCosts, WidthSpace
from psenet.widths import Widths


def make_space(num_groups: int = 4, choices: tuple[int, ...] = (2, 4, 6, 8), name: str = "g") -> WidthSpace:
    groups = [ChannelGroup(f"{name}{n}", choices[-1], choices, (f"{name}{n}",)) for n in range(num_groups)]
    forms = [LinearForm(3), *(LinearForm(0, ((n, 1),)) for n in range(num_groups))]
    pairs = list(itertools.pairwise(forms))
    costs = SpaceCosts(
        macs=ProductCost([(2 ** (4 - n % 4), a, b) for n, (a, b) in enumerate(pairs)], num_groups),
        params=ProductCost([(1, a, b) for a, b in pairs], num_groups),
        memory=PeakCost([forms[-1]], num_groups),
    )
    return WidthSpace(groups, costs)


class Additive:
    """A synthetic accuracy: each group adds a value of its own for each choice, wider mostly better."""

    def __init__(self, space: WidthSpace, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.space = space
        self.seen: list[Widths] = []
        self.value = {
            group.name: dict(
                zip(group.choices, np.sort(rng.random(len(group.choices))) ** rng.uniform(0.2, 3), strict=True)
            )
            for group in space.groups
        }

    def __call__(self, widths: Widths) -> float:
        self.seen.append(widths)
        return self.of(widths)

    def of(self, widths: Widths) -> float:
        return float(sum(self.value[name][width] for name, width in widths.items()))

    def best_inside(self, macs: int) -> float:
        """Look at every setting."""
        settings = itertools.product(*(group.choices for group in self.space.groups))
        all_widths = [Widths({g.name: w for g, w in zip(self.space.groups, row, strict=True)}) for row in settings]
        return max(self.of(widths) for widths in all_widths if self.space.macs(widths) <= macs)


def simulate_history(space: WidthSpace, score: Additive, *, seed: int, num: int, noise: float) -> History:
    """Return noisy losses that fall with training and with the score."""
    rng = np.random.default_rng(seed)
    history = History(space)
    for step in range(num // 8):
        visited = [space.sample(rng) for _ in range(8)]
        losses = [4 - score.of(widths) + 2 * np.exp(-step / 20) + noise * rng.normal() for widths in visited]
        history.append(step, visited, torch.tensor(losses))
    return history
