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
from dataclasses import dataclass, field, replace
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
        state: The parameter's or buffer's name, if the tensor is one itself.
    """

    ids: np.ndarray
    shape: tuple[int, ...]
    zero: bool
    itemsize: int = 4
    state: str | None = None

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
class Constant:
    """A size in the user's code that counts channels: an attribute of the module with this value follows them."""

    module: str
    value: int
    ids: np.ndarray


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
    constants: list[Constant] = field(default_factory=list)
    ordered: list[np.ndarray] = field(default_factory=list)
    """Ids whose order matters: they must not be sorted by importance."""
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

    @property
    def depends_on_input(self) -> bool:
        """Whether the op works on activations, and not on parameters and buffers alone."""
        return any(self._reader.is_activation(node) for node in self.node.all_input_nodes)

    def results(self) -> list[tuple[tuple[int, ...], int]]:
        """Return shape and bytes per element of every output of an op that returns several."""
        return [(tuple(int(size) for size in out.shape), out.element_size()) for out in self.node.meta["val"]]

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
        return self._reader.state_name(argument) if isinstance(argument, fx.Node) else None

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
            self._follow_computed(argument, axes)
            return
        known = self.reading.axes.setdefault(name, [None] * len(axes))
        for axis, ids in enumerate(axes):
            before = known[axis]
            if before is None:
                known[axis] = ids
            elif ids is not None:
                self.tie(before, ids)

    def _follow_computed(self, argument: Any, axes: list[np.ndarray | None]) -> None:
        value = self.value(argument)
        for axis, ids in enumerate(axes):
            if ids is None or not (ids != NO_CHANNEL).any():
                continue
            if _is_expanded(argument, axis):  # the same for every channel, however many there are
                self.constant(len(ids), ids)
            elif value.tracked() and (theirs := value.axis_ids(axis)) is not None:
                self.tie(ids, theirs)
            else:
                self.freeze(ids, "the weight is computed, not a parameter")

    def claim(self, value: Value, other: Value) -> Value:
        """Let a parameter or buffer of several axes, used as it is, follow the channels it is broadcast against."""
        if value.state is None or value.tracked() or not other.tracked():
            return value
        shift = other.ids.ndim - len(value.shape)
        axes: list[np.ndarray | None] = [None] * len(value.shape)
        for axis, size in enumerate(value.shape):
            if axis + shift >= 0 and size > 1 and other.ids.shape[axis + shift] == size:
                axes[axis] = other.axis_ids(axis + shift)
        found = [axis for axis, ids in enumerate(axes) if ids is not None]
        if len(found) != 1:
            return value
        self.follow(self._reader.node_of(value.state), axes)
        shape = [1] * len(value.shape)
        shape[found[0]] = value.shape[found[0]]
        ids = axes[found[0]]
        assert ids is not None
        return replace(value, ids=ids.reshape(shape))

    def constant(self, value: int, ids: np.ndarray) -> None:
        """Say that a number in the user's code counts these channels."""
        if value > 1 and (ids != NO_CHANNEL).any():
            self.reading.constants.append(Constant(self.module, int(value), np.ascontiguousarray(ids).reshape(-1)))

    def keep_order(self, ids: np.ndarray) -> None:
        """Say that neighbours matter: these channels may be dropped from the end, but not be sorted."""
        self.reading.ordered.append(ids)

    def count_macs(self, scale: int, left: np.ndarray | None, right: np.ndarray | None, out: np.ndarray) -> None:
        """Add `scale * left * right` MACs to this layer, whose output channels are `out`."""
        self.reading.macs.append(MacTerm(self.module, scale, left, right))
        self.reading.outputs_of.setdefault(self.module, out)

    def reads_across(self, value: Value, ids: np.ndarray, axis: int) -> None:
        """Say that this layer mixes the channels of its input, so dropped ones must be zero there."""
        if not value.zero and value.tracked():
            self.reading.masks.append(MaskNeed(self.module, ids, axis, "masked_input"))

    def needs_mask(self, ids: np.ndarray, axis: int, kind: str) -> None:
        """Say that the parallel pass must prepare this module; see `psenet.space.MaskPlan` for the kinds."""
        self.reading.masks.append(MaskNeed(self.module, ids, axis, kind))


Rule = Callable[[Call], Value | tuple[Value, ...]]


@dataclass(frozen=True)
class _State:
    """A parameter or buffer, and the channels of its own that it has if it is long on one axis only."""

    node: fx.Node
    axis: int = 0
    ids: np.ndarray | None = None


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
        self._inner_names: dict[fx.Node, str] = {}
        self._activations: set[fx.Node] = set()
        self._states: dict[str, _State] = {}

    def read(self) -> Reading:
        """Walk the graph and return what was found."""
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._known[node] = self._placeholder(node)
            elif node.op == "call_function":
                self._known[node] = self._apply(node)
            elif node.op == "output":
                self._freeze_outputs(node)
        self._settle_states()
        self._settle_masks()
        self.reading.moments = list(self._moments())
        return self.reading

    def is_activation(self, node: fx.Node) -> bool:
        """Tell whether a node depends on the model's input."""
        return node in self._activations

    def node_of(self, state: str) -> fx.Node:
        """Return the node of a parameter or buffer."""
        return self._states[state].node

    def state_name(self, node: fx.Node) -> str | None:
        """Return the name of the parameter or buffer that a node is, or None."""
        return self._inner_names.get(node) or (self.state_names.get(node.name) if node.op == "placeholder" else None)

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
        ids = self._new_ids(count)
        calls = sum(name.partition("#")[0] == maker for name, _ in self.reading.makers)
        maker = f"{maker}#{calls + 1}" if calls else maker
        self.reading.makers.append((maker, ids))
        return ids

    def _placeholder(self, node: fx.Node) -> Value:
        shape = _shape(node)
        name = self.state_names.get(node.name)
        ids = np.full([1] * len(shape), NO_CHANNEL, np.int64)
        if name is None:
            self._activations.add(node)
            return Value(ids, shape, True, _itemsize(node))
        self.reading.shapes[name] = shape
        long = [axis for axis, size in enumerate(shape) if size > 1]
        if len(long) == 1:  # used as it is (a layer scale, say), it follows what it meets
            first = self._states.get(name)
            own = self._new_ids(shape[long[0]]) if first is None or first.ids is None else first.ids
            self._states[name] = _State(node, long[0], own)
            ids = own.reshape([size if axis == long[0] else 1 for axis, size in enumerate(shape)])
        else:
            self._states[name] = _State(node)
        return Value(ids, shape, False, _itemsize(node), name)

    def _new_ids(self, count: int) -> np.ndarray:
        ids = np.arange(self.reading.num_ids, self.reading.num_ids + count, dtype=np.int64)
        self.reading.num_ids += count
        return ids

    def _settle_states(self) -> None:
        """Tie the channels of parameters and buffers used as they are to those they have as a layer's."""
        for name, state in self._states.items():
            if state.ids is None:
                continue
            axes = self.reading.axes.setdefault(name, [None] * len(self.reading.shapes[name]))
            ids = axes[state.axis]
            if ids is None:
                axes[state.axis] = state.ids
                continue
            both = ids != NO_CHANNEL
            self.reading.ties.append((state.ids[both], ids[both]))
            if not both.all():
                self.reading.freezes.append(Freeze(state.ids[~both], f"{name} stands for channels that always stay"))

    def _settle_masks(self) -> None:
        """A module is prepared once for all its calls: their channels must be the same."""
        first: dict[tuple[str, str], MaskNeed] = {}
        for need in self.reading.masks:
            known = first.setdefault((need.module, need.kind), need)
            if known is need:
                continue
            if (known.ids.shape, known.axis) != (need.ids.shape, need.axis):
                reason = f"{need.module} reads channels of different tensors in the same way"
                self.reading.freezes += [Freeze(_real(ids), reason) for ids in (known.ids, need.ids)]
                continue
            both = (known.ids != NO_CHANNEL) & (need.ids != NO_CHANNEL)
            self.reading.ties.append((known.ids[both], need.ids[both]))
            alone = [_real(ids[~both]) for ids in (known.ids, need.ids)]
            self.reading.freezes += [Freeze(ids, f"{need.module} also reads channels that stay") for ids in alone]

    def _apply(self, node: fx.Node) -> Value | tuple[Value, ...]:
        if any(source in self._activations for source in node.all_input_nodes):
            self._activations.add(node)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._apply_graph(node)
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
        if isinstance(changed, fx.Node) and isinstance(result, Value):  # an in-place op changes its argument too
            self._known[changed] = result
            self._spoil(changed, result.zero)
        return result

    def _spoil(self, node: fx.Node, zero: bool) -> None:
        """A tensor of which a view was changed is zero on dropped channels only if the view is."""
        base = _aliased(node)
        while base is not None:
            known = self._known[base]
            if isinstance(known, Value):
                self._known[base] = replace(known, zero=known.zero and zero)
            base = _aliased(base)

    def _freeze_outputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            known = self._known[source]
            for value in known if isinstance(known, tuple) else (known,):
                ids = value.ids[value.ids != NO_CHANNEL]
                if len(ids):
                    self.reading.freezes.append(Freeze(ids.reshape(-1), "the model's output"))

    def _apply_graph(self, node: fx.Node) -> Value | tuple[Value, ...]:
        """Walk a part of the forward that is a graph of its own: `torch.no_grad()`, `torch.autocast`."""
        nodes = [argument for argument in node.args if isinstance(argument, fx.Node)]
        graphs = [found for operand in nodes if (found := self._graph_of(operand)) is not None]
        operands = [operand for operand in nodes if self._graph_of(operand) is None]
        places = [inside for inside in graphs[0].nodes if inside.op == "placeholder"] if len(graphs) == 1 else []
        if len(places) != len(operands) or any(inside.op == "get_attr" for inside in graphs[0].nodes):
            for operand in operands:
                known = self._known[operand]
                for value in known if isinstance(known, tuple) else (known,):
                    self.reading.freezes.append(Freeze(_real(value.ids), f"no rule for this op ({node.target})"))
            return _untracked(node)
        for place, operand in zip(places, operands, strict=True):
            self._known[place] = self._known[operand]
            if operand in self._activations:
                self._activations.add(place)
            name = self.state_name(operand)
            if name is not None:
                self._inner_names[place] = name
        results: tuple[Value, ...] = ()
        for inside in graphs[0].nodes:
            if inside.op == "call_function":
                self._known[inside] = self._apply(inside)
            elif inside.op == "output":
                results = tuple(self.value(result) for result in inside.args[0])  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        return results

    def _graph_of(self, node: fx.Node) -> fx.Graph | None:
        found = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
        return found.graph if isinstance(found, fx.GraphModule) else None

    def _moments(self) -> Iterator[list[Value]]:
        """Yield the activations alive at each op: made, and needed by it or later. Tensors of one storage are one."""
        fixed = {key for node in self._graph.nodes if node.name in self.state_names for key in _storages(node)}
        made: dict[int, Value] = {}
        last_use: dict[int, int] = {}
        births: dict[int, list[int]] = {}
        for position, node in enumerate(self._graph.nodes):
            if node.op not in ("placeholder", "call_function"):
                continue
            known = self._known[node]
            for key, value in zip(_storages(node), known if isinstance(known, tuple) else (known,), strict=False):
                if key in fixed:
                    continue
                if key not in made:
                    made[key] = value
                    births.setdefault(position, []).append(key)
                last_use[key] = max(last_use.get(key, 0), position, *(self._position(user) for user in node.users))
        alive: set[int] = set()
        for position, keys in births.items():
            alive = {key for key in alive if last_use[key] >= position} | set(keys)
            yield [made[key] for key in alive]

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


def _real(ids: np.ndarray) -> np.ndarray:
    return ids[ids != NO_CHANNEL].reshape(-1)


def _is_expanded(argument: Any, axis: int) -> bool:
    """Tell whether a tensor is a repetition of one slice along an axis."""
    if not isinstance(argument, fx.Node) or not str(argument.target).startswith("aten.expand"):
        return False
    base, rank = _shape(argument.args[0]), len(_shape(argument))  # pyright: ignore[reportArgumentType]
    axis -= rank - len(base)
    return axis < 0 or base[axis] == 1


def _out_of_place(op: str) -> str:
    namespace, name, overload = op.split(".", 2)
    return f"{namespace}.{name.removesuffix('_')}.{overload}"


def _untracked(node: fx.Node) -> Value | tuple[Value, ...]:
    values = [
        Value(
            np.full([1] * tensor.ndim, NO_CHANNEL, np.int64), tuple(map(int, tensor.shape)), True, tensor.element_size()
        )
        for tensor in _results(node)
    ]
    return tuple(values) if isinstance(node.meta.get("val"), tuple | list) else values[0] if values else _NOTHING


def _results(node: fx.Node) -> list[torch.Tensor]:
    """Return the (fake) tensors that an op returns."""
    results = node.meta.get("val")
    results = results if isinstance(results, tuple | list) else [results]
    return [tensor for tensor in results if isinstance(tensor, torch.Tensor)]


def _storages(node: fx.Node) -> list[int]:
    """Return a key for the memory of each tensor that an op returns; export's fake tensors share it as real ones do."""
    return [tensor.untyped_storage()._cdata for tensor in _results(node)]


_NOTHING = Value(np.full((), NO_CHANNEL, np.int64), (), True, 0)


def _shape(node: fx.Node) -> tuple[int, ...]:
    tensor = node.meta.get("val")
    if isinstance(tensor, (tuple, list)):
        tensor = tensor[0]
    return tuple(int(size) for size in tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def _itemsize(node: fx.Node) -> int:
    results = _results(node)
    return results[0].element_size() if results else 0
