"""From an exported ATen graph to *which channels vary together*.

Rules (see `rules`) walk the graph and say, op by op, what happens to the ids of channels (see `facts`): pass on,
repeat, concatenate, tie together, freeze. Nothing is decided while walking; `grouping` later takes the connected
components of all ties. Working on single channels instead of whole layers makes a cut or a tie in the middle of a layer
cost nothing: a group is split there by itself.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from psenet.errors import InputError, first_line
from psenet.tracing.call import Call, Rule
from psenet.tracing.facts import NO_CHANNEL, Freeze, MaskNeed, Reading, Value
from psenet.tracing.nodes import aliased, itemsize_of, results_of, shape_of, storages_of

COUNTED_OPS = frozenset(
    "mean sum var std amax amin max min linalg_vector_norm layer_norm rms_norm group_norm batch_norm".split()
)
"""Ops that may run over channels; the parallel pass finds them again by their order in the module."""


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
        reading: What was found so far, of another graph of the same model; it is added to.
        same_tensor: For further names of a tied parameter or buffer, its first name.
        same_module: For further paths of a module that stands in several places, its first path.
        in_order: The modules whose input has several rows for each sample on axis 0, one sample after the other;
            called when a module asks for it.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        rules: dict[str, Rule],
        reading: Reading,
        *,
        same_tensor: Mapping[str, str] | None = None,
        same_module: Mapping[str, str] | None = None,
        in_order: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.reading = reading
        self._in_order = in_order
        self.rules = rules
        self.same_module = same_module or {}
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.state_names = {node: (same_tensor or {}).get(name, name) for node, name in names.items()}
        self._user_inputs = set(signature.user_inputs)
        self._user_outputs = signature.user_outputs
        self._graph = program.graph
        self.batch_size = 0
        """Samples in the example; a tensor of another size on axis 0 has its samples elsewhere."""
        self._known: dict[fx.Node, Value | tuple[Value, ...]] = {}
        self._inner_names: dict[fx.Node, str] = {}
        self._activations: set[fx.Node] = set()
        self._states: dict[str, _State] = {}
        self._ops: dict[str, dict[str, list[str]]] = {}
        self._places: dict[fx.Node, int] = {}

    def read(self, *, counts: bool = True) -> None:
        """Walk the graph and note what is found, costs only if this graph `counts`."""
        costs = {name: copy.copy(getattr(self.reading, name)) for name in ("macs", "outputs_of", "moments")}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._known[node] = self._placeholder(node)
            elif node.op == "call_function":
                self._known[node] = self._apply(node)
            elif node.op == "output":
                self._freeze_outputs(node)
        for module, calls in self._ops.items():
            self.reading.ops.setdefault(module, []).extend(tuple(names) for names in calls.values())
        self._settle_states()
        self._settle_masks()
        if counts:
            self.reading.moments = list(self._moments())
        else:
            vars(self.reading).update(costs)

    def place_of(self, node: fx.Node) -> int:
        """Return which of the counted ops that its module calls itself this one is."""
        return self._places.get(node, 0)

    def _note_place(self, call: Call) -> None:
        """Count the ops that may have to see kept channels only, by module and by call of the module."""
        name = call.op.split(".")[1]
        if name not in COUNTED_OPS:
            return
        stack = call.node.meta.get("nn_module_stack") or {"": ("", None)}
        names = self._ops.setdefault(call.module, {}).setdefault(list(stack)[-1], [])
        self._places[call.node] = len(names)
        names.append(name)

    def holds_samples_in_order(self, module: str, shape: tuple[int, ...]) -> bool:
        """Tell whether the input of a module, of this shape, has the rows of each sample in one piece on axis 0."""
        return shape[:1] == (self.batch_size,) or module in self._in_order()

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
        shape = shape_of(node)
        name = self.state_names.get(node.name)
        ids = np.full([1] * len(shape), NO_CHANNEL, np.int64)
        if name is None:
            if node.name in self._user_inputs:  # the others are constants of the user's code
                self._activations.add(node)
                self.batch_size = self.batch_size or (shape[0] if shape else 0)
            return Value(ids, shape, True, itemsize_of(node))
        self.reading.shapes[name] = shape
        long = [axis for axis, size in enumerate(shape) if size > 1]
        if len(long) == 1:  # used as it is (a layer scale, say), it follows what it meets
            first = self._states.get(name)
            own = self._new_ids(shape[long[0]]) if first is None or first.ids is None else first.ids
            self._states[name] = _State(node, long[0], own)
            ids = own.reshape([size if axis == long[0] else 1 for axis, size in enumerate(shape)])
        else:
            self._states[name] = _State(node)
        return Value(ids, shape, False, itemsize_of(node), name)

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
            if need.kind == "op" and len(set(self.reading.ops[need.module])) > 1:
                self.reading.freezes.append(Freeze(_real(need.ids), f"{need.module} runs in several ways"))
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
        self._note_place(call)
        rule = self.rules.get(call.op) or self.rules.get(_out_of_place(call.op))
        if rule is None:
            call.freeze_inputs("no rule for this op")
            return _untracked(node)
        result = rule(call) if _is_ours(rule) else self._apply_foreign(rule, call)
        changed = node.args[0] if node.target._schema.is_mutable else None
        if isinstance(changed, fx.Node) and isinstance(result, Value):  # an in-place op changes its argument too
            self._known[changed] = result
            self._spoil(changed, result.zero)
        return result

    def _apply_foreign(self, rule: Rule, call: Call) -> Value | tuple[Value, ...]:
        """Apply a rule of the user's own, check what it says, and remember which channels it spoke of.

        Raises:
            InputError: The rule fails, or returns something else than the op does.
        """
        name = f"the rule {getattr(rule, '__qualname__', rule)!r} for {call.op}"
        try:
            result = rule(call)
        except Exception as error:  # the user's rule may raise anything
            raise InputError(f"{name} fails at {call.where()}: {first_line(error)}") from error
        values = result if isinstance(result, tuple) else (result,)
        shapes = [tuple(map(int, tensor.shape)) for tensor in results_of(call.node)]
        fits = len(values) == len(shapes) and all(
            isinstance(value, Value) and value.shape == shape and self._are_ids(value.ids, shape)
            for value, shape in zip(values, shapes, strict=True)
        )
        if not fits:
            said = [(value.shape, value.ids.shape) if isinstance(value, Value) else value for value in values]
            raise InputError(
                f"{name} must return a Value for each output, with its shape and known ids that broadcast to it; "
                f"the op returns {shapes} at {call.where()}, the rule said {said}"
            )
        touched = [_real(value.ids) for value in (*call.values(), *values)]
        self.reading.foreign.append((name, np.concatenate(touched)))
        return result

    def _are_ids(self, ids: np.ndarray, shape: tuple[int, ...]) -> bool:
        return (
            ids.ndim == len(shape)
            and all(size in (1, whole) for size, whole in zip(ids.shape, shape, strict=True))
            and np.issubdtype(ids.dtype, np.integer)
            and bool(((ids >= NO_CHANNEL) & (ids < self.reading.num_ids)).all())
        )

    def _spoil(self, node: fx.Node, zero: bool) -> None:
        """A tensor of which a view was changed is zero on dropped channels only if the view is."""
        base = aliased(node)
        while base is not None:
            known = self._known[base]
            if isinstance(known, Value):
                self._known[base] = replace(known, zero=known.zero and zero)
            base = aliased(base)

    def constant_outputs(self) -> frozenset[int]:
        """Return which of the model's output tensors, counted in order, do not depend on its input."""
        nodes = {node.name: node for node in self._graph.nodes}
        found = [nodes[name] for name in self._user_outputs if isinstance(name, str) and name in nodes]
        return frozenset(number for number, node in enumerate(found) if node not in self._activations)

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
        fixed = {key for node in self._graph.nodes if node.name in self.state_names for key in storages_of(node)}
        made: dict[int, Value] = {}
        last_use: dict[int, int] = {}
        births: dict[int, list[int]] = {}
        for position, node in enumerate(self._graph.nodes):
            if node.op not in ("placeholder", "call_function"):
                continue
            known = self._known[node]
            for key, value in zip(storages_of(node), known if isinstance(known, tuple) else (known,), strict=False):
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


def _real(ids: np.ndarray) -> np.ndarray:
    return ids[ids != NO_CHANNEL].reshape(-1)


def _is_ours(rule: Rule) -> bool:
    return rule.__module__.startswith("psenet.")


def _out_of_place(op: str) -> str:
    namespace, name, overload = op.split(".", 2)
    return f"{namespace}.{name.removesuffix('_')}.{overload}"


def _untracked(node: fx.Node) -> Value | tuple[Value, ...]:
    values = [
        Value(
            np.full([1] * tensor.ndim, NO_CHANNEL, np.int64), tuple(map(int, tensor.shape)), True, tensor.element_size()
        )
        for tensor in results_of(node)
    ]
    return tuple(values) if isinstance(node.meta.get("val"), tuple | list) else values[0] if values else _NOTHING


_NOTHING = Value(np.full((), NO_CHANNEL, np.int64), (), True, 0)
