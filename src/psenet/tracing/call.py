"""One op of the graph, as its rule sees it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from psenet.errors import InputError
from psenet.tracing.facts import NO_CHANNEL, Constant, ConstantList, Freeze, MacTerm, MaskNeed, Value
from psenet.tracing.nodes import is_expanded, itemsize_of, shape_of

if TYPE_CHECKING:
    from psenet.tracing.reader import Reader


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
        return shape_of(self.node)

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
        return Value(ids, self.shape, zero, itemsize_of(self.node))

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
        """Never vary these channels; `reason` is completed with the op and the module.

        Does nothing where weights are computed from parameters: the layer that uses them says what may vary.
        """
        ids = ids[ids != NO_CHANNEL]
        if len(ids) and self.depends_on_input:
            self.reading.freezes.append(Freeze(ids.reshape(-1), f"{reason} ({self.where()})"))

    def freeze_inputs(self, reason: str) -> None:
        """Freeze the channels of every tensor argument."""
        for value in self.values():
            self.freeze(value.ids, reason)

    def channels(self, value: Value) -> np.ndarray | None:
        """Return the ids on axis 1; None, and every tensor argument frozen, if another axis carries channels."""
        ids = value.axis_ids(1)
        if ids is None:
            self.freeze_inputs("channels are not on axis 1")
        return ids

    def follow(self, argument: Any, axes: list[np.ndarray | None]) -> None:
        """Say which channels stand on the axes of a parameter or buffer; a second use ties to the first."""
        if argument is None:
            return
        name = self.state_name(argument) or self.computed_from(argument)
        if name is None:
            self._follow_computed(argument, axes)
            return
        if name != self.state_name(argument):
            self._follow_gains(argument, axes[0])
        known = self.reading.axes.setdefault(name, [None] * len(axes))
        for axis, ids in enumerate(axes):
            before = known[axis]
            if before is None:
                known[axis] = ids
            elif ids is not None:
                self.tie(before, ids)

    def computed_from(self, argument: Any) -> str | None:
        """Return the parameter from which its own layer computes this weight: standardised, normalised, rescaled.

        None if the weight is a parameter itself, or something else: made from activations, or from several.
        """
        if not isinstance(argument, fx.Node) or self.state_name(argument) or self._reader.is_activation(argument):
            return None
        same = [name for name in self._states_behind(argument) if self.reading.shapes[name] == shape_of(argument)]
        return same[0] if len(same) == 1 else None

    def _states_behind(self, argument: fx.Node) -> list[str]:
        """Return the parameters and buffers of this layer from which a weight is computed."""
        found: dict[str, None] = {}
        nodes, seen = [argument], set()
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            name = self.state_name(node)
            if name is not None and name.startswith(f"{self.module}."):
                found[name] = None
            nodes += node.all_input_nodes
        return list(found)

    def _follow_gains(self, argument: fx.Node, out_ids: np.ndarray | None) -> None:
        """Tie the factors of a computed weight (one for each output channel) to the channels."""
        for name in self._states_behind(argument):
            long = [size for size in self.reading.shapes[name] if size > 1]
            if out_ids is not None and long == [len(out_ids)]:
                self.follow(
                    self._reader.node_of(name),
                    [out_ids if size > 1 else None for size in self.reading.shapes[name]],
                )

    def _follow_computed(self, argument: Any, axes: list[np.ndarray | None]) -> None:
        value = self.value(argument)
        for axis, ids in enumerate(axes):
            if ids is None or not (ids != NO_CHANNEL).any():
                continue
            if is_expanded(argument, axis):  # the same for every channel, however many there are
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

    def constants(self, values: Sequence[int], ids: Sequence[np.ndarray]) -> None:
        """Say that a list of numbers in the user's code counts these parts of the channels, one each."""
        flat = tuple(np.ascontiguousarray(part).reshape(-1) for part in ids)
        self.reading.constant_lists.append(ConstantList(self.module, tuple(map(int, values)), flat))

    def fraction(self, ids_C: np.ndarray, cuts: Sequence[int]) -> None:
        """Say that an axis is cut at these places, which may be fractions of its length.

        They stay so where the parts that all cuts are multiples of live and die together.
        """
        size = math.gcd(len(ids_C), *cuts)
        if size < len(ids_C) and (ids_C != NO_CHANNEL).all():
            ids_NC = ids_C.reshape(-1, size)
            first_NC, ids_NC = np.broadcast_arrays(ids_NC[:1], ids_NC)
            self.reading.fractions.append((first_NC, ids_NC))

    def keep_order(self, ids: np.ndarray) -> None:
        """Say that neighbours matter: these channels may be dropped from the end, but not be sorted."""
        self.reading.ordered.append(ids)

    def count_macs(self, scale: int, left: np.ndarray | None, right: np.ndarray | None, out: np.ndarray) -> None:
        """Add `scale * left * right` MACs to this layer, whose output channels are `out`."""
        self.reading.macs.append(MacTerm(self.module, scale, left, right))
        self.reading.outputs_of.setdefault(self.module, out)

    def reads_across(self, value: Value, ids: np.ndarray, axis: int) -> None:
        """Say that this layer mixes the channels of its input, so dropped ones must be zero there."""
        if value.zero or not value.tracked():
            return
        if not self.depends_on_input:
            reason = f"is computed from parameters, once for all subnets of a pass ({self.where()})"
            self.reading.freezes.append(Freeze(ids[ids != NO_CHANNEL].reshape(-1), reason))
        elif self._has_samples_first(value, ids):
            self.reading.masks.append(MaskNeed(self.module, ids, axis, "masked_input"))

    def _has_samples_first(self, value: Value, ids: np.ndarray) -> bool:
        """Tell whether masks of subnets fit the tensor; where they do not, the channels are frozen."""
        if value.shape[:1] == (self._reader.batch_size,):
            return True
        self.freeze(ids, "the samples are not on axis 0")
        return False

    def runs_alone(self, in_ids: np.ndarray, out_ids: np.ndarray, axis: int) -> None:
        """Say that the parallel pass must run this layer subnet by subnet: its weights depend on what is kept."""
        value = self.value(self.node.args[0])
        if self._has_samples_first(value, np.concatenate([in_ids, out_ids])):
            self.reading.masks.append(MaskNeed(self.module, in_ids, axis, "alone_in"))
            self.reading.masks.append(MaskNeed(self.module, out_ids, axis, "alone_out"))

    def needs_mask(self, ids: np.ndarray, axis: int, kind: str) -> None:
        """Say that the parallel pass must prepare this module; see `psenet.space.MaskPlan` for the kinds.

        Raises:
            InputError: Statistics over the batch, where the samples of one subnet cannot be told from the others'.
        """
        value = self.value(self.node.args[0])
        if kind == "norm" and not self._reader.holds_samples_in_order(self.module, value.shape):
            raise InputError(
                f"{self.where()} normalises over the batch a tensor of shape {value.shape}, on whose axis 0 the "
                f"{self._reader.batch_size} samples do not stand one after the other: subnets in one pass cannot have "
                "statistics of their own"
            )
        if kind != "norm" and not self._has_samples_first(value, ids):
            return
        self.reading.masks.append(MaskNeed(self.module, ids, axis, kind, self._reader.place_of(self.node)))


Rule = Callable[[Call], Value | tuple[Value, ...]]
