"""Which subnets each training step trains, and in which passes.

Register another with `@strategy("name")`; `make_strategy` builds it by name.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from psenet.budget import Budget, Limits, resolve_limits
from psenet.errors import InputError
from psenet.history import History
from psenet.prior import Prior
from psenet.proposal import Levels, bend, draw_levels
from psenet.space import WidthSpace
from psenet.supernet import DEFAULT_STRATA
from psenet.training.steps import TrainSubnets, train_distilled, train_on_both_sides, train_together
from psenet.widths import Widths

FULL_CEILING_SHARE = 0.4
"""Share of the steps computed at full width; the other strata share the rest equally. Steps at the full ceiling train
the wide subnets, which lower ceilings never reach, and cost the most."""
FOCUSED_FULL_SHARE = 0.2
"""The same with a focus, where lower ceilings hold most of what is searched."""
_LEAST_VISITS = 8
"""Visits for each choice of all groups before a steered strategy learns from them."""
_LEAST_MASS = 1e-6
"""A group whose likely widths all lie above a ceiling is drawn uniformly below it."""


class Strategy(Protocol):
    """Chooses the subnets of each step."""

    train: TrainSubnets
    """How they are trained: one of the functions of `psenet.training.steps`, or your own (a `staticmethod`)."""

    def next_widths(self) -> list[Widths]:
        """Return the subnets that the next step trains."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue the sequence of subnets."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the sequence from a `state_dict`."""
        ...


@runtime_checkable
class LearningStrategy(Strategy, Protocol):
    """A strategy that is steered by the losses seen so far."""

    learns_every: int
    """Steps after which it is told again."""

    def learn(self, history: History) -> None:
        """Take in what training has seen."""
        ...


_STRATEGIES: dict[str, Callable[[WidthSpace, int, np.random.Generator], Strategy]] = {}


def strategy(name: str) -> Callable[[type], type]:
    """Register a strategy class, built as `cls(space, num_subnets, rng)`.

    Raises:
        ValueError: The name is taken.
    """

    def register(cls: type) -> type:
        if name in _STRATEGIES:
            raise ValueError(f"strategy {name!r} is registered already")
        _STRATEGIES[name] = cls
        return cls

    return register


def make_strategy(
    name: str,
    space: WidthSpace,
    *,
    num_subnets: int = 8,
    seed: int = 0,
    focus: Budget | Limits | None = None,
) -> Strategy:
    """Build a strategy.

    Args:
        name: `"parallel"`, `"steered"`, `"sandwich"`, `"bilateral"` or `"single-path"`.
        space: The width space to draw from.
        num_subnets: Subnets per step of `parallel` and `steered`; the others have their own number.
        seed: Of the sequence of subnets.
        focus: Of the parallel strategy: train mostly subnets that cost about as much as this allows.

    Raises:
        InputError: An unknown name, fewer than one subnet, a focus that no subnet reaches or that the strategy has not.
    """
    if name not in _STRATEGIES:
        raise InputError(f"unknown strategy {name!r}; there are {sorted(_STRATEGIES)}")
    if num_subnets < 1:
        raise InputError(f"num_subnets must be at least 1; got {num_subnets}")
    rng = np.random.default_rng(seed)
    if focus is None:
        return _STRATEGIES[name](space, num_subnets, rng)
    if _STRATEGIES[name] is not ParallelStrategy:
        raise InputError(f"only the parallel strategy can focus on a budget; got {name!r}")
    return ParallelStrategy(space, num_subnets, rng, resolve_limits(focus, space))


class _Seeded:
    """A strategy whose whole state is its random generator."""

    train = staticmethod(train_together)

    def __init__(self, space: WidthSpace, num_subnets: int, rng: np.random.Generator) -> None:
        self._space = space
        self._num_subnets = num_subnets
        self._rng = rng

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]


@strategy("parallel")
class ParallelStrategy(_Seeded):
    """PSE-Net: n subnets below one stratum share a pass; a step at full width has the full network among them, one at
    the lowest ceiling the smallest.

    With limits, the strata that lie within them are left out, and below the others subnets are drawn from widths bent
    towards the limits, so that most of them cost about as much as a searched net will.
    """  # noqa: D205

    def __init__(
        self, space: WidthSpace, num_subnets: int, rng: np.random.Generator, limits: Limits | None = None
    ) -> None:
        super().__init__(space, num_subnets, rng)
        strata = sorted({space.uniform(keep_ratio): None for keep_ratio in DEFAULT_STRATA}, key=space.macs)
        self.ceilings = [ceiling for ceiling in strata if limits is None or not limits.holds(space, ceiling)]
        self.ceilings = self.ceilings or [space.full()]
        full_share = FULL_CEILING_SHARE if limits is None else FOCUSED_FULL_SHARE
        lower = len(self.ceilings) - 1
        self.shares = [(1 - full_share) / lower] * lower + [full_share] if lower else [1.0]
        self._levels = Levels(space)
        self._bent = None if limits is None else [self._bend(ceiling, limits) for ceiling in self.ceilings]

    def next_widths(self) -> list[Widths]:
        """Return n subnets below one ceiling."""
        number = int(self._rng.choice(len(self.ceilings), p=self.shares))
        widths = self._draw(number)
        if self.ceilings[number] == self._space.full():
            widths[0] = self.ceilings[number]
        elif self._bent is None and number == 0:
            widths[0] = self._space.smallest()
        return widths

    def _draw(self, number: int) -> list[Widths]:
        """Draw n subnets below a ceiling."""
        if self._bent is None:
            return [self._space.sample(self._rng, self.ceilings[number]) for _ in range(self._num_subnets)]
        levels_nG = draw_levels(self._bent[number], self._num_subnets, self._rng)
        return self._space.from_array(self._levels.widths(levels_nG))

    def _bend(self, ceiling: Widths, limits: Limits) -> np.ndarray:
        """Return probabilities of the choices, shape (G, C): uniform below the ceiling, bent towards the limits."""
        return bend(self._levels, self._uniform_below(ceiling), limits)

    def _uniform_below(self, ceiling: Widths) -> np.ndarray:
        """Return equal probabilities of the choices that a ceiling allows, shape (G, C)."""
        top_G = self._levels.levels(self._space.to_array([ceiling]))[0]
        return (np.arange(self._levels.top) <= top_G[:, None]) / (1 + top_G[:, None])


@strategy("steered")
class SteeredStrategy(ParallelStrategy):
    """The parallel strategy, half of whose subnets have widths that did well so far, at the cost of the other half.

    What did well is what a prior says that is fitted to the history of this training (see `psenet.Prior`), again every
    hundred steps. Before there are a few visits for each choice, all subnets are drawn uniformly.
    """

    learns_every = 100

    def __init__(self, space: WidthSpace, num_subnets: int, rng: np.random.Generator) -> None:
        super().__init__(space, num_subnets, rng)
        self._usual_macs = [self._mean_macs(ceiling) for ceiling in self.ceilings]
        self._steered_SGC: np.ndarray | None = None
        """Probability of each choice of each group below each of S ceilings; None before there is enough to learn."""

    def learn(self, history: History) -> None:
        """Fit the prior again, once there are a few visits for each choice."""
        if len(history) >= _LEAST_VISITS * self._levels.valid_GC.sum():
            prior = Prior.fit(history, self._space)
            self._steered_SGC = np.stack([self._steered(prior, number) for number in range(len(self.ceilings))])

    def state_dict(self) -> dict[str, Any]:
        """Return the random state and what was learned."""
        return {**super().state_dict(), "steered": None if self._steered_SGC is None else self._steered_SGC.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the sequence from a `state_dict`."""
        super().load_state_dict(state)
        self._steered_SGC = None if state["steered"] is None else np.array(state["steered"])

    def _draw(self, number: int) -> list[Widths]:
        """Draw n subnets below a ceiling, every second one steered."""
        widths = super()._draw(number)
        if self._steered_SGC is not None:
            levels_nG = draw_levels(self._steered_SGC[number], len(widths[1::2]), self._rng)
            widths[1::2] = self._space.from_array(self._levels.widths(levels_nG))
        return widths

    def _mean_macs(self, ceiling: Widths, num: int = 256) -> int:
        rng = np.random.default_rng(0)
        return int(self._space.macs([self._space.sample(rng, ceiling) for _ in range(num)]).mean())

    def _steered(self, prior: Prior, number: int) -> np.ndarray:
        """Return the prior's probabilities at the cost that uniform subnets below a ceiling have, shape (G, C)."""
        probability_GC = prior.proposal(Limits(macs=self._usual_macs[number])).probability
        below_GC = self._uniform_below(self.ceilings[number])
        steered_GC = np.where(below_GC > 0, probability_GC, 0.0)
        mass_G1 = steered_GC.sum(axis=1, keepdims=True)
        return np.where(mass_G1 > _LEAST_MASS, steered_GC / np.maximum(mass_G1, _LEAST_MASS), below_GC)


@strategy("sandwich")
class SandwichStrategy(_Seeded):
    """US-Nets and AutoSlim (Yu and Huang 2019): the full network on the labels, then the smallest and two random ones
    on the full network's outputs, each on the whole batch."""  # noqa: D205, D209

    train = staticmethod(train_distilled)

    def next_widths(self) -> list[Widths]:
        """Return the full network, the smallest and two random ones."""
        randoms = [self._space.sample(self._rng) for _ in range(2)]
        return [self._space.full(), self._space.smallest(), *randoms]


@strategy("bilateral")
class BilateralStrategy(_Seeded):
    """BCNet (Su et al. 2021): a random subnet and its complement, each on its first and on its last channels."""

    train = staticmethod(train_on_both_sides)

    def next_widths(self) -> list[Widths]:
        """Return a random subnet and its complement, in which every narrow group is wide and the other way round."""
        widths = self._space.sample(self._rng)
        complement = Widths(
            {group.name: group.choices[-1 - group.choices.index(widths[group.name])] for group in self._space.groups}
        )
        return [widths, complement]


@strategy("single-path")
class SinglePathStrategy(_Seeded):
    """One random subnet a step, on the whole batch (Guo et al. 2020)."""

    def next_widths(self) -> list[Widths]:
        """Return one random subnet."""
        return [self._space.sample(self._rng)]
