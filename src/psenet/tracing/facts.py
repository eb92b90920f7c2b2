"""What the walk over a graph finds out. Pure data.

Every channel position that a layer makes gets an id. The ids of a tensor are an integer array of the tensor's rank, of
size 1 along every axis on which the id does not change: (1, C, 1, 1) for an ordinary activation. So numpy's own
reshape, transpose and concatenate follow the channels through any re-arrangement.
"""

from dataclasses import dataclass, field

import numpy as np

NO_CHANNEL = -1


@dataclass(frozen=True)
class Value:
    """What is known of one tensor of the graph.

    Attributes:
        ids: Channel ids, broadcastable to `shape`; NO_CHANNEL where a position always stays.
        shape: Shape of the tensor, batch included.
        zero: In the parallel pass, dropped channels of this tensor are exactly zero.
        itemsize: Bytes per element.
        state: The parameter's or buffer's name, if the tensor is one itself.
        expanded: Axes along which the tensor is one slice repeated.
    """

    ids: np.ndarray
    shape: tuple[int, ...]
    zero: bool
    itemsize: int = 4
    state: str | None = None
    expanded: tuple[int, ...] = ()

    def axis_ids(self, axis: int) -> np.ndarray | None:
        """Return the ids along `axis`, shape (size,), or None if another axis carries channels."""
        axis %= max(len(self.shape), 1)
        if any(size != 1 for other, size in enumerate(self.ids.shape) if other != axis):
            return None
        return np.broadcast_to(self.ids.reshape(-1), (self.shape[axis],))

    def tracked(self) -> bool:
        """Tell whether any channel of the tensor has an id."""
        return bool((self.ids != NO_CHANNEL).any())


@dataclass(frozen=True)
class MacTerm:
    """MACs of one layer: `scale * kept(left) * kept(right)`; None stands for 1."""

    module: str
    scale: int
    left: np.ndarray | None
    right: np.ndarray | None


@dataclass(frozen=True)
class MaskNeed:
    """A module that the parallel pass must prepare (see `psenet.space.MaskPlan`)."""

    module: str
    ids: np.ndarray
    axis: int
    kind: str
    call: int = 0
    """For the kind `"op"`: which of the ops over channels it is that the module calls itself."""


@dataclass(frozen=True)
class Constant:
    """A size in the user's code that counts channels: an attribute of the module with this value follows them."""

    module: str
    value: int
    ids: np.ndarray


@dataclass(frozen=True)
class ConstantList:
    """Sizes in the user's code that count the channels of neighbouring parts: a list of them follows as a whole."""

    module: str
    values: tuple[int, ...]
    ids: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Freeze:
    """Ids that must not vary, and why."""

    ids: np.ndarray
    reason: str


@dataclass
class Reading:
    """Everything the walk over a graph found out."""

    num_ids: int = 0
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    makers: list[tuple[str, np.ndarray]] = field(default_factory=list)
    """Layers that made new ids, in graph order: (module path, ids)."""
    axes: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    """Ids on every axis of every parameter and buffer; None where nothing varies."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Full shape of every parameter and buffer that the graph uses."""
    params: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Full shape of every parameter of the model, used or not, tied ones once."""
    macs: list[MacTerm] = field(default_factory=list)
    masks: list[MaskNeed] = field(default_factory=list)
    ops: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    """The ops over channels or space that each module calls itself, in order, once for each call of the module."""
    constants: list[Constant] = field(default_factory=list)
    constant_lists: list[ConstantList] = field(default_factory=list)
    fractions: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Ties, as in `ties`, without which code that cuts an axis at a fraction of its length would be wrong."""
    ordered: list[np.ndarray] = field(default_factory=list)
    """Ids whose order matters: they must not be sorted by importance."""
    moments: list[list[Value]] = field(default_factory=list)
    """The tensors alive at each op, batch included."""
    outputs_of: dict[str, np.ndarray] = field(default_factory=dict)
    """Ids of the output channels of every layer with MACs."""
    foreign: list[tuple[str, np.ndarray]] = field(default_factory=list)
    """Rules of the user's own, and the ids of the tensors that they saw or described."""
    constant_outputs: dict[bool, frozenset[int]] = field(default_factory=dict)
    """Output tensors that do not depend on the input, by whether the model was in training mode."""
    trains_differently: bool = False
    """In training the model runs other code than in evaluation, or gives other outputs."""
