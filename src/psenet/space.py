"""The width space of a model: its channel groups, what is frozen and why, and the cost of any subnet.

Legend: N width settings, G channel groups.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from psenet.cost import LatencyCost, LinearForm, PeakCost, ProductCost
from psenet.errors import InputError
from psenet.tracing.layout import Layout
from psenet.widths import Widths

if TYPE_CHECKING:
    from psenet.latency_model import LatencyModel


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that must keep the same width."""

    name: str
    """Module path of the first layer that makes these channels."""
    size: int
    """Channels at full width, counted in the first layer."""
    choices: tuple[int, ...]
    """Allowed widths, ascending; the last is `size`."""
    layers: tuple[str, ...]
    """Module paths of the layers whose weights follow the width."""
    unit: int = 1
    """Channels that only live and die together (a conv-group of a grouped convolution); divides every choice."""


@dataclass(frozen=True)
class Frozen:
    """A layer whose width cannot vary."""

    layer: str
    """Module path of the layer."""
    reason: str
    """Why, with the op that decided it."""
    macs_share: float
    """The layer's share of the full model's MACs, 0 to 1."""


@dataclass(frozen=True)
class MaskPlan:
    """What the parallel pass must do at a module so that its result is that of each subnet alone.

    A module of kind `"norm"` normalises over the batch: it folds the 0/1 mask of its channels into scale and shift and
    keeps statistics per subnet. One of kind `"masked_input"` reads its input across channels and gets it multiplied by
    the mask first. One of kind `"op"` computes a mean or a norm over channels, which must be over the kept ones.
    One of kinds `"alone_in"` and `"alone_out"` (for its input's and its output's channels) computes its weights from
    parameters and is run subnet by subnet.
    """

    module: str
    layout: Layout
    axis: int
    kind: str
    ops: tuple[str, ...] = ()
    """The ops that may run over channels, in the order in which the module calls them itself."""
    masked: frozenset[int] = frozenset()
    """Which of them must see the kept channels only."""


@dataclass(frozen=True)
class ConstantPlan:
    """A number in the user's code that counts channels: attributes of the module with this value follow the widths."""

    module: str
    value: int
    """At full width."""
    form: LinearForm


@dataclass(frozen=True)
class ConstantListPlan:
    """Sizes in the user's code that count parts of an axis: a list attribute of the module with them follows."""

    module: str
    values: tuple[int, ...]
    """At full width."""
    forms: tuple[LinearForm, ...]


@dataclass(frozen=True)
class Wiring:
    """How the model's tensors follow the widths: what slicing and the parallel pass need, and nobody else.

    Attributes:
        layouts: For every parameter and buffer with an elastic axis, the layout of each of its axes.
        masks: The modules the parallel pass must prepare.
        constants: The numbers that modules keep as attributes and that count channels.
        constant_lists: The same for lists of numbers.
        ordered: The groups whose channels must keep their order.
        constant_outputs: The model's output tensors, counted in order, that do not depend on its input, by training
            mode; nothing for a mode that does the same as the other.
    """

    layouts: Mapping[str, tuple[Layout, ...]]
    masks: tuple[MaskPlan, ...] = ()
    constants: tuple[ConstantPlan, ...] = ()
    constant_lists: tuple[ConstantListPlan, ...] = ()
    ordered: frozenset[int] = frozenset()
    constant_outputs: Mapping[bool, frozenset[int]] = field(default_factory=dict)

    def outputs_without_samples(self, *, training: bool) -> frozenset[int]:
        """Return the output tensors, counted in order, that are the same for every sample."""
        return self.constant_outputs.get(training, self.constant_outputs.get(False, frozenset()))


@dataclass(frozen=True, kw_only=True)
class SpaceCosts:
    """The cost formulas of a space, over units per group."""

    macs: ProductCost
    params: ProductCost
    memory: PeakCost
    latency_ms: LatencyCost | None = None
    """Only once latency was measured; see `WidthSpace.with_latency`."""


class WidthSpace:
    """All width settings of one model.

    Args:
        groups: The channel groups, in the order data meets them.
        costs: The cost formulas.
        frozen: The layers that cannot vary.
        wiring: How tensors follow the widths; made by `psenet.trace`.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        costs: SpaceCosts,
        *,
        frozen: Sequence[Frozen] = (),
        wiring: Wiring | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.frozen = tuple(frozen)
        self.costs = costs
        self.wiring = wiring or Wiring(layouts={})
        self._index = {group.name: number for number, group in enumerate(self.groups)}
        self._choices = tuple(frozenset(group.choices) for group in self.groups)
        self._num_choices = [len(group.choices) for group in self.groups]
        self._unit_G = np.array([group.unit for group in self.groups], dtype=np.int64)
        self._full = Widths({group.name: group.size for group in self.groups})
        self._smallest = Widths({group.name: group.choices[0] for group in self.groups})

    def __repr__(self) -> str:
        return f"WidthSpace({len(self.groups)} groups, {self.num_settings():.3g} settings, {len(self.frozen)} frozen)"

    def num_settings(self) -> float:
        """Return how many width settings there are (a float: often beyond 1e30)."""
        return float(np.prod([float(len(group.choices)) for group in self.groups]))

    def digest(self) -> str:
        """Return a short fingerprint of groups and choices, to recognise data of another space."""
        text = repr([(group.name, group.size, group.choices) for group in self.groups])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def elastic_share(self) -> float:
        """Return the share of the full model's MACs, 0 to 1, of which at least one side can vary."""
        full, least = (np.array([self.units(widths)], dtype=np.float64) for widths in (self.full(), self.smallest()))
        before_T, after_T = self.costs.macs.by_term(full)[0], self.costs.macs.by_term(least)[0]
        return float(before_T[after_T < before_T].sum() / max(before_T.sum(), 1.0))

    # Settings -----------------------------------------------------------------------------------------------------

    def full(self) -> Widths:
        """Return the widths of the original model."""
        return self._full

    def smallest(self) -> Widths:
        """Return every group at its smallest choice."""
        return self._smallest

    def uniform(self, keep_ratio: float) -> Widths:
        """Return every group at the choice nearest to `keep_ratio` (0 to 1) of its size, the wider one of two."""
        if not 0 < keep_ratio <= 1:
            raise InputError(f"keep_ratio must be above 0 and at most 1; got {keep_ratio}")
        return Widths(
            {
                group.name: min(group.choices, key=lambda width: (abs(width - keep_ratio * size), -width))
                for group in self.groups
                for size in (group.size,)
            }
        )

    def sample(self, rng: np.random.Generator, ceiling: Widths | None = None) -> Widths:
        """Draw every group's width uniformly from its choices, none wider than `ceiling` allows."""
        counts = self._num_choices if ceiling is None else self._num_below(ceiling)
        drawn = rng.integers(counts).tolist()
        return Widths({group.name: group.choices[index] for group, index in zip(self.groups, drawn, strict=True)})

    def _num_below(self, ceiling: Widths) -> list[int]:
        return [bisect_right(group.choices, ceiling[group.name]) for group in self.groups]

    def check(self, widths: Widths) -> None:
        """Make sure that the widths belong to this space.

        Raises:
            TypeError: Not `Widths`.
            InputError: Groups are missing or unknown, or a width is not among the choices; all offenders are named.
        """
        if not isinstance(widths, Widths):
            raise TypeError(f"expected psenet.Widths; got {type(widths).__name__}")
        problems = [f"no width for group {name!r}" for name in self._index if name not in widths]
        problems += [f"unknown group {name!r}" for name in widths if name not in self._index]
        problems += [
            f"{widths[group.name]} is not a choice of group {group.name!r} (choices: {group.choices})"
            for group, allowed in zip(self.groups, self._choices, strict=True)
            if group.name in widths and widths[group.name] not in allowed
        ]
        if problems:
            raise InputError("these widths are not of this space: " + "; ".join(problems[:10]))

    def to_array(self, widths: Sequence[Widths]) -> np.ndarray:
        """Return settings as an int64 array of shape (N, G), groups in the order of `groups`."""
        names = list(self._index)
        rows = [[setting[name] for name in names] for setting in widths]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(names))

    def from_array(self, widths_NG: np.ndarray) -> list[Widths]:
        """Return the rows of an (N, G) array as `Widths`."""
        names = list(self._index)
        return [Widths(dict(zip(names, row, strict=True))) for row in np.asarray(widths_NG).tolist()]

    def units(self, widths: Widths) -> tuple[int, ...]:
        """Return how many units each group keeps, after checking that the widths are of this space."""
        self.check(widths)
        return tuple(widths[group.name] // group.unit for group in self.groups)

    def units_array(self, widths: Sequence[Widths]) -> np.ndarray:
        """Return how many units each group keeps, int64 of shape (N, G); the widths are not checked."""
        return self.to_array(widths) // self._unit_G

    # Costs --------------------------------------------------------------------------------------------------------

    @overload
    def macs(self, widths: Widths) -> int: ...
    @overload
    def macs(self, widths: Sequence[Widths] | np.ndarray) -> np.ndarray: ...
    def macs(self, widths: Widths | Sequence[Widths] | np.ndarray) -> int | np.ndarray:
        """Return multiply-accumulates of one forward pass of one sample: convolutions and linear layers.

        Args:
            widths: One setting, several, or an int array of shape (N, G).

        Returns:
            An int for one setting, else int64 of shape (N,).
        """
        return self._cost(self.costs.macs, widths)

    @overload
    def params(self, widths: Widths) -> int: ...
    @overload
    def params(self, widths: Sequence[Widths] | np.ndarray) -> np.ndarray: ...
    def params(self, widths: Widths | Sequence[Widths] | np.ndarray) -> int | np.ndarray:
        """Return the number of parameters, buffers not counted. Takes and returns what `macs` does."""
        return self._cost(self.costs.params, widths)

    @overload
    def memory(self, widths: Widths) -> int: ...
    @overload
    def memory(self, widths: Sequence[Widths] | np.ndarray) -> np.ndarray: ...
    def memory(self, widths: Widths | Sequence[Widths] | np.ndarray) -> int | np.ndarray:
        """Return the peak of activation memory in bytes for inference of one sample.

        The peak is over all ops: an op's inputs and outputs and every tensor that is still needed later, each tensor
        freed after its last use, views and in-place results sharing memory. Weights are not in it (see `params`).
        Takes and returns what `macs` does.
        """
        return self._cost(self.costs.memory, widths)

    @overload
    def latency_ms(self, widths: Widths) -> float: ...
    @overload
    def latency_ms(self, widths: Sequence[Widths] | np.ndarray) -> np.ndarray: ...
    def latency_ms(self, widths: Widths | Sequence[Widths] | np.ndarray) -> float | np.ndarray:
        """Return the predicted time of one forward pass in milliseconds; it never falls when a width grows.

        Takes what `macs` does; given in steps of a nanosecond.

        Returns:
            A float for one setting, else float64 of shape (N,).

        Raises:
            InputError: The space has no latency model; see `with_latency`.
        """
        if self.costs.latency_ms is None:
            raise InputError(
                "latency needs a latency model of this space, made where the net will run: use "
                "space.with_latency(psenet.LatencyModel.measure(model, space, example_input))"
            )
        return self._cost(self.costs.latency_ms, widths)

    def with_latency(self, model: "LatencyModel") -> "WidthSpace":
        """Return this space with the latency model's prediction as one more cost. Its digest is the same.

        Raises:
            InputError: The model was measured on another space.
        """
        costs = replace(self.costs, latency_ms=model.cost(self))
        return WidthSpace(self.groups, costs, frozen=self.frozen, wiring=self.wiring)

    def _cost(
        self,
        formula: ProductCost | PeakCost | LatencyCost,
        widths: Widths | Sequence[Widths] | np.ndarray,
    ) -> Any:
        if isinstance(widths, Widths):
            return formula(np.array([self.units(widths)], dtype=np.float64))[0].item()
        if not isinstance(widths, np.ndarray):
            for setting in widths:
                self.check(setting)
        widths_NG = widths if isinstance(widths, np.ndarray) else self.to_array(widths)
        return formula((widths_NG // self._unit_G).astype(np.float64))
