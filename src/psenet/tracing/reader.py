"""From an exported ATen graph to *which channels vary together*.

Every channel position that a layer makes gets an id. Rules (see `rules`) walk the graph and say, op by op, what happens
to ids: pass on, repeat, concatenate, tie together, freeze. Nothing is decided while walking; `grouping` later takes the
connected components of all ties. Working on single channels instead of whole layers makes a cut or a tie in the middle
of a layer cost nothing: a group is split there by itself.

The ids of a tensor are an integer array of the tensor's rank, of size 1 along every axis on which the id does not
change: (1, C, 1, 1) for an ordinary activation. So numpy's own reshape, transpose and concatenate follow the channels
through any re-arrangement.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

NO_CHANNEL = -1


@dataclass(frozen=True)
class Value:
    """What is known of one tensor of the graph.

    Attributes:
        ids: Channel ids, broadcastable to `shape`; NO_CHANNEL where a position always stays.
        shape: Shape of the tensor, batch included.
        zero: In the parallel pass, dropped channels of this tensor are exactly zero.
        itemsize: Bytes per element.
    """

    ids: np.ndarray
    shape: tuple[int, ...]
    zero: bool
    itemsize: int = 4

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
    moments: list[list[Value]] = field(default_factory=list)
    """The tensors alive at each op, batch included."""
    outputs_of: dict[str, np.ndarray] = field(default_factory=dict)
    """Ids of the output channels of every layer with MACs."""


class Call:
    """One op of the graph as its rule sees it: arguments by name, values of tensors, and ways to say what happens."""

    def __init__(self, reader: "Reader", node: fx.Node) -> None:
        self.node = node
        self.reading = reader.reading
        self._reader = reader
        schema = node.target._schema.arguments  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        self.arguments: dict[str, Any] = {argument.name: argument.default_value for argument in schema}
        self.arguments.update(zip((argument.name for argument in schema), node.args, strict=False))
        self.arguments.update(node.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def op(self) -> str:
        """The op's name, `aten.conv2d.default`."""
        return str(self.node.target)

    @property
    def module(self) -> str:
        """Path of the innermost module that runs the op."""
        stack = self.node.meta.get("nn_module_stack") or {"": ("", None)}
        path = list(stack.values())[-1][0]
        return self._reader.same_module.get(path, path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the op's (first) output."""
        return _shape(self.node)

    def value(self, argument: Any) -> Value:
        """Return what is known of a tensor argument."""
        return self._reader.value(argument)

    def values(self) -> Iterator[Value]:
        """Yield what is known of every tensor argument, those inside lists too."""
        for node in self.node.all_input_nodes:
            known = self._reader.known(node)
            yield from known if isinstance(known, tuple) else (known,)

    def state_name(self, argument: Any) -> str | None:
        """Return the name of the parameter or buffer that an argument is, or None if it is computed."""
        return self._reader.state_names.get(argument.name) if isinstance(argument, fx.Node) else None

    def where(self) -> str:
        """Return the op and the module's path, for messages."""
        return f"{self.op} in {self.module or 'the model itself'}"

    # What a rule may say ------------------------------------------------------------------------------------------

    def output(self, ids: np.ndarray, *, zero: bool) -> Value:
        """Describe the op's output."""
        return Value(ids, self.shape, zero, _itemsize(self.node))

    def along(self, axis: int, ids_C: np.ndarray, *, zero: bool) -> Value:
        """Describe an output whose channels stand on one axis."""
        shape = [1] * len(self.shape)
        shape[axis] = len(ids_C)
        return self.output(np.ascontiguousarray(ids_C).reshape(shape), zero=zero)

    def untracked(self) -> Value:
        """Describe an output without channels that could vary."""
        return self.output(np.full([1] * len(self.shape), NO_CHANNEL, np.int64), zero=True)

    def fresh(self, count: int) -> np.ndarray:
        """Make ids for the output channels of this layer, shape (count,). One channel cannot vary and gets none."""
        if count == 1:
            return np.full(1, NO_CHANNEL, np.int64)
        return self._reader.fresh(count, self.module)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Make channels live and die together, pairwise; a channel tied to no channel is frozen."""
        a, b = np.broadcast_arrays(a, b)
        both = (a != NO_CHANNEL) & (b != NO_CHANNEL)
        self.reading.ties.append((a[both], b[both]))
        alone = np.concatenate([a[~both & (a != NO_CHANNEL)], b[~both & (b != NO_CHANNEL)]])
        if len(alone):
            self.freeze(alone, "meets channels that always stay")

    def freeze(self, ids: np.ndarray, reason: str) -> None:
        """Never vary these channels; `reason` is completed with the op and the module."""
        ids = ids[ids != NO_CHANNEL]
        if len(ids):
            self.reading.freezes.append(Freeze(ids.reshape(-1), f"{reason} ({self.where()})"))

    def freeze_inputs(self, reason: str) -> None:
        """Freeze the channels of every tensor argument."""
        for value in self.values():
            self.freeze(value.ids, reason)

    def follow(self, argument: Any, axes: list[np.ndarray | None]) -> None:
        """Say which channels stand on the axes of a parameter or buffer; a second use ties to the first."""
        if argument is None:
            return
        name = self.state_name(argument)
        if name is None:
            for ids in axes:
                if ids is not None:
                    self.freeze(ids, "the weight is computed, not a parameter")
            return
        known = self.reading.axes.setdefault(name, [None] * len(axes))
        for axis, ids in enumerate(axes):
            before = known[axis]
            if before is None:
                known[axis] = ids
            elif ids is not None:
                self.tie(before, ids)

    def count_macs(self, scale: int, left: np.ndarray | None, right: np.ndarray | None, out: np.ndarray) -> None:
        """Add `scale * left * right` MACs to this layer, whose output channels are `out`."""
        self.reading.macs.append(MacTerm(self.module, scale, left, right))
        self.reading.outputs_of.setdefault(self.module, out)

    def reads_across(self, value: Value, ids: np.ndarray, axis: int) -> None:
        """Say that this layer mixes the channels of its input, so dropped ones must be zero there."""
        if not value.zero and value.tracked():
            self.reading.masks.append(MaskNeed(self.module, ids, axis, "masked_input"))

    def normalises(self, ids: np.ndarray, axis: int) -> None:
        """Say that this layer is a batch norm: statistics per subnet, the mask folded into its scale and shift."""
        self.reading.masks.append(MaskNeed(self.module, ids, axis, "norm"))


Rule = Callable[[Call], Value | tuple[Value, ...]]


class Reader:
    """Walks an exported program in order, one rule per op.

    Args:
        program: The result of `torch.export.export`.
        rules: Rule by op name; an op without one freezes what it touches.
        same_tensor: For further names of a tied parameter or buffer, its first name.
        same_module: For further paths of a module that stands in several places, its first path.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        rules: dict[str, Rule],
        *,
        same_tensor: Mapping[str, str] | None = None,
        same_module: Mapping[str, str] | None = None,
    ) -> None:
        self.reading = Reading()
        self.rules = rules
        self.same_module = same_module or {}
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.state_names = {node: (same_tensor or {}).get(name, name) for node, name in names.items()}
        self._user_inputs = set(signature.user_inputs)
        self._graph = program.graph
        self._known: dict[fx.Node, Value | tuple[Value, ...]] = {}

    def read(self) -> Reading:
        """Walk the graph and return what was found."""
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._known[node] = self._placeholder(node)
            elif node.op == "call_function":
                self._known[node] = self._apply(node)
            elif node.op == "output":
                self._freeze_outputs(node)
        self.reading.moments = list(self._moments())
        return self.reading

    def known(self, node: fx.Node) -> Value | tuple[Value, ...]:
        """Return what is known of a node's result."""
        return self._known[node]

    def value(self, argument: Any) -> Value:
        """Return what is known of a tensor argument; a number is a tensor without channels."""
        if isinstance(argument, fx.Node):
            known = self._known[argument]
            if isinstance(known, Value):
                return known
        return Value(np.full((), NO_CHANNEL, np.int64), (), False)

    def fresh(self, count: int, maker: str) -> np.ndarray:
        """Return `count` new ids made by a layer."""
        ids = np.arange(self.reading.num_ids, self.reading.num_ids + count, dtype=np.int64)
        self.reading.num_ids += count
        self.reading.makers.append((maker, ids))
        return ids

    def _placeholder(self, node: fx.Node) -> Value:
        shape = _shape(node)
        name = self.state_names.get(node.name)
        if name is not None:
            self.reading.shapes[name] = shape
        return Value(np.full([1] * len(shape), NO_CHANNEL, np.int64), shape, name is None, _itemsize(node))

    def _apply(self, node: fx.Node) -> Value | tuple[Value, ...]:
        if not isinstance(node.target, torch._ops.OpOverload):  # operator.getitem on a tuple of results
            container = self._known[node.args[0]]  # pyright: ignore[reportArgumentType]
            index = node.args[1]
            if isinstance(container, tuple) and isinstance(index, int) and index < len(container):
                return container[index]
            return _untracked(node)
        call = Call(self, node)
        rule = self.rules.get(call.op) or self.rules.get(_out_of_place(call.op))
        if rule is None:
            call.freeze_inputs("no rule for this op")
            return _untracked(node)
        result = rule(call)
        changed = node.args[0] if node.target._schema.is_mutable else None
        if isinstance(changed, fx.Node):  # an in-place op changes its argument too
            self._known[changed] = result
        return result

    def _freeze_outputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            known = self._known[source]
            for value in known if isinstance(known, tuple) else (known,):
                ids = value.ids[value.ids != NO_CHANNEL]
                if len(ids):
                    self.reading.freezes.append(Freeze(ids.reshape(-1), "the model's output"))

    def _moments(self) -> Iterator[list[Value]]:
        """Yield the activations alive at each op: made, and needed by it or later."""
        root: dict[fx.Node, fx.Node] = {}
        last_use: dict[fx.Node, int] = {}
        for position, node in enumerate(self._graph.nodes):
            if node.name in self.state_names or node.op not in ("placeholder", "call_function"):
                continue
            source = _aliased(node)
            first = node if source is None else root.get(source, node)
            assert first is not None
            root[node] = first
            positions = [position, *(self._position(user) for user in node.users)]
            last_use[first] = max(last_use.get(first, 0), *positions)
        alive: set[fx.Node] = set()
        for position, node in enumerate(self._graph.nodes):
            if root.get(node) is not node:
                continue
            alive.add(node)
            known = [self._known[tensor] for tensor in alive]
            yield [value for value in known if isinstance(value, Value)]
            alive = {tensor for tensor in alive if last_use[tensor] > position}

    def _position(self, node: fx.Node) -> int:
        if not hasattr(self, "_positions"):
            self._positions = {node: position for position, node in enumerate(self._graph.nodes)}
        return self._positions[node]


def _aliased(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory the node's result shares: views, in-place ops, dropout in eval mode."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.args[0] if node.op == "call_function" and isinstance(node.args[0], fx.Node) else None
    schema = node.target._schema
    if str(node.target).startswith("aten.dropout") and isinstance(node.args[0], fx.Node):
        return node.args[0]
    if schema.returns and schema.returns[0].alias_info is not None and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def _out_of_place(op: str) -> str:
    namespace, name, overload = op.split(".", 2)
    return f"{namespace}.{name.removesuffix('_')}.{overload}"


def _untracked(node: fx.Node) -> Value:
    shape = _shape(node)
    return Value(np.full([1] * len(shape), NO_CHANNEL, np.int64), shape, True, _itemsize(node))


def _shape(node: fx.Node) -> tuple[int, ...]:
    tensor = node.meta.get("val")
    if isinstance(tensor, (tuple, list)):
        tensor = tensor[0]
    return tuple(int(size) for size in tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def _itemsize(node: fx.Node) -> int:
    tensor = node.meta.get("val")
    return tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
