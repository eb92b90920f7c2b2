"""From a `Reading` to channel groups, layouts and cost formulas.

1. Connected components of all ties: channels of one class live and die together.
2. A class is frozen when any of its channels is.
3. Classes that stand next to each other, in the same order, on every axis where any of them stands form one group
   (an *atom*): a convolution whose halves go different ways falls into two groups here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from psenet.cost import LinearForm, PeakCost, ProductCost
from psenet.space import ChannelGroup, ConstantListPlan, ConstantPlan, Frozen, MaskPlan, SpaceCosts, WidthSpace, Wiring
from psenet.tracing.facts import NO_CHANNEL, MaskNeed, Reading, Value
from psenet.tracing.layout import Layout, Run, frozen_layout, linear_form

_UNSEEN, _MANY, _END = -3, -2, -1

Choices = Callable[[int, int], Sequence[int]]
"""From a group's size and unit to its allowed widths, ascending, the size last."""


@dataclass(frozen=True)
class Atom:
    """A group before it has choices: its classes in order, and the layer that made them."""

    classes: np.ndarray
    maker: str
    offset: int
    """Position of the first channel among the maker's channels."""
    whole: bool
    """The atom is all that the maker made."""
    unit: int

    @property
    def name(self) -> str:
        """Return the maker's path, with the channel range where the maker's channels fall into several groups."""
        size = len(self.classes) * self.unit
        return self.maker if self.whole else f"{self.maker}[{self.offset}:{self.offset + size}]"


def build_space(
    reading: Reading, choices: Choices, *, frozen_groups: dict[str, str] | None = None, batch_size: int = 1
) -> WidthSpace:
    """Form groups, layouts and cost formulas.

    Args:
        reading: What the walk over the graph found.
        choices: The widths to offer for a group.
        frozen_groups: Names of groups not to offer, with the reason.
        batch_size: Samples in the example input.
    """
    grouping = _Grouping(reading, choices, frozen_groups or {})
    torn = grouping.torn()
    if torn:
        grouping = _Grouping(reading, choices, {**(frozen_groups or {}), **torn})
    groups = grouping.groups()
    layouts = {
        name: tuple(
            frozen_layout(size) if ids is None else grouping.layout(ids)
            for ids, size in zip(axes, reading.shapes[name], strict=True)
        )
        for name, axes in reading.axes.items()
    }
    # Statistics over the batch are per subnet, whether or not anything varies.
    needed = {need.module for need in reading.masks if need.kind == "norm" or grouping.elastic(need.ids)}
    masks = tuple(
        MaskPlan(need.module, grouping.layout(need.ids), need.axis, need.kind, *_masked_ops(reading, need))
        for need in _one_per_module(reading.masks)
        if need.module in needed
    )
    constants = tuple(
        ConstantPlan(constant.module, constant.value, grouping.count_form(constant.ids, 1))
        for constant in reading.constants
        if grouping.elastic(constant.ids)
    )
    constant_lists = tuple(
        ConstantListPlan(found.module, found.values, tuple(grouping.count_form(ids, 1) for ids in found.ids))
        for found in reading.constant_lists
        if any(grouping.elastic(ids) for ids in found.ids)
    )
    ordered = frozenset(group for ids in reading.ordered for group in grouping.groups_on(ids))
    return WidthSpace(
        groups,
        _costs(reading, grouping, layouts, batch_size),
        frozen=grouping.frozen_layers(),
        wiring=Wiring(layouts, masks, constants, constant_lists, ordered, dict(reading.constant_outputs)),
    )


class _Grouping:
    """Classes, atoms and the maps from ids to them."""

    def __init__(self, reading: Reading, choices: Choices, frozen_groups: dict[str, str]) -> None:
        self._reading = reading
        self._class_of = _classes(reading)  # by id; the last entry serves NO_CHANNEL
        self._reasons = self._frozen_classes()
        atoms = self._atoms()
        self._atoms_kept: list[Atom] = []
        self._choices: list[tuple[int, ...]] = []
        for atom in atoms:
            widths = tuple(choices(len(atom.classes) * atom.unit, atom.unit))
            if atom.name in frozen_groups:
                self._freeze(atom.classes, frozen_groups[atom.name] + self._suspects(atom))
            elif len(widths) < 2:
                self._freeze(atom.classes, f"no smaller width is allowed than {max(widths)}")
            else:
                self._atoms_kept.append(atom)
                self._choices.append(widths)
        self._group_of = np.full(len(self._class_of) + 1, -1, np.int64)  # by class
        for number, atom in enumerate(self._atoms_kept):
            self._group_of[atom.classes] = number
        self._layouts: dict[bytes, Layout] = {}

    def groups(self) -> list[ChannelGroup]:
        layers: list[dict[str, None]] = [{} for _ in self._atoms_kept]
        for name, axes in self._reading.axes.items():
            for ids in axes:
                for number in np.unique(self._groups_of(ids)) if ids is not None else ():
                    if number >= 0:
                        layers[number][_layer_of(name)] = None
        return [
            ChannelGroup(atom.name, widths[-1], widths, tuple(members), atom.unit)
            for atom, widths, members in zip(self._atoms_kept, self._choices, layers, strict=True)
        ]

    def elastic(self, ids: np.ndarray) -> bool:
        return bool(self.groups_on(ids))

    def groups_on(self, ids: np.ndarray) -> set[int]:
        return {int(group) for group in np.unique(self._groups_of(ids)) if group >= 0}

    def torn(self) -> dict[str, str]:
        """Return the groups that drop channels between others on an axis where neighbours matter, name to reason."""
        groups = {run.group for ids in self._reading.ordered for run in self.layout(ids)[:-1] if run.group is not None}
        return {self._atoms_kept[group].name: "dropping its channels would make others neighbours" for group in groups}

    def layout(self, ids: np.ndarray) -> Layout:
        """Return an axis of ids as runs."""
        key = ids.tobytes()
        if key not in self._layouts:
            self._layouts[key] = self._make_layout(ids)
        return self._layouts[key]

    def count_form(self, ids: np.ndarray, copies: int) -> LinearForm:
        """Return how many elements stay, `copies` for each id, whatever the order of the ids."""
        groups = self._groups_of(ids.reshape(-1))
        numbers, counts = np.unique(groups, return_counts=True)
        constant, coefficients = 0, []
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number < 0:
                constant += count * copies
            else:
                coefficients.append((number, count * copies // len(self._atoms_kept[number].classes)))
        return LinearForm(constant, tuple(coefficients))

    def frozen_layers(self) -> list[Frozen]:
        """Return the layers with MACs whose output channels (or some of them) are frozen, and why."""
        macs = _full_macs(self._reading)
        total = sum(macs.values()) or 1
        frozen = []
        for layer, ids in self._reading.outputs_of.items():
            fixed = self._class_of[ids[self._groups_of(ids) < 0]]
            if len(fixed):
                reasons = [self._reasons[label] for label in dict.fromkeys(fixed.tolist()) if label in self._reasons]
                alone = (
                    "one channel cannot be fewer" if len(ids) == 1 else "its channels are those of the model's input"
                )
                reason = reasons[0] if reasons else alone
                frozen.append(Frozen(layer, reason, macs.get(layer, 0) / total))
        return frozen

    def _groups_of(self, ids: np.ndarray) -> np.ndarray:
        return self._group_of[self._class_of[ids]]

    def _freeze(self, classes: Iterable[int], reason: str) -> None:
        for label in classes:
            self._reasons.setdefault(int(label), reason)

    def _suspects(self, atom: Atom) -> str:
        """Name the user's own rules that spoke of these channels."""
        names = [name for name, ids in self._reading.foreign if np.isin(self._class_of[ids], atom.classes).any()]
        return f" (a rule of your own was used here: {'; '.join(dict.fromkeys(names))})" if names else ""

    def _frozen_classes(self) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for freeze in self._reading.freezes:
            for label in np.unique(self._class_of[freeze.ids]).tolist():
                reasons.setdefault(label, freeze.reason)
        return reasons

    def _make_layout(self, ids: np.ndarray) -> Layout:
        labels = self._class_of[ids]
        groups = self._groups_of(ids)
        starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
        # Two runs of one group side by side: a new run begins where the first unit comes again.
        first_class = np.array([atom.classes[0] for atom in self._atoms_kept] + [-1])
        again = np.flatnonzero((labels[1:] == first_class[groups[1:]]) & (labels[:-1] != labels[1:])) + 1
        starts = np.unique(np.r_[starts, again])
        runs = []
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True):
            group = int(groups[start])
            if group < 0:
                runs.append(Run(None, 1, stop - start))
            else:
                repeat, rest = divmod(stop - start, len(self._atoms_kept[group].classes))
                assert rest == 0, f"group {self._atoms_kept[group].name} is cut on an axis"
                runs.append(Run(group, repeat, stop - start))
        return tuple(runs)

    def _atoms(self) -> list[Atom]:
        follows, precedes = self._neighbours()
        linked = np.zeros(len(follows), bool)
        inner = np.flatnonzero(follows >= 0)
        linked[inner] = precedes[follows[inner]] == inner
        atoms, done = [], set(self._reasons)
        for maker, ids in self._reading.makers:
            labels = self._class_of[ids]
            for label in dict.fromkeys(labels.tolist()):
                if label in done:
                    continue
                while (before := int(precedes[label])) >= 0 and linked[before] and before not in done:
                    label = before
                chain = [label]
                while linked[chain[-1]]:
                    chain.append(int(follows[chain[-1]]))
                done.update(chain)
                places = np.flatnonzero(np.isin(labels, chain))
                unit = max(1, int((labels == chain[0]).sum()))
                atoms.append(Atom(np.array(chain), maker, int(places[0]), len(places) == len(labels), unit))
        return atoms

    def _neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Return, for every class, the class that always follows it and the one that always precedes it."""
        size = len(self._class_of) + 1
        follows, precedes = np.full(size, _UNSEEN), np.full(size, _UNSEEN)
        arrays = {ids.tobytes(): ids for axes in self._reading.axes.values() for ids in axes if ids is not None}
        others = [need.ids for need in self._reading.masks]
        others += [constant.ids for constant in self._reading.constants] + self._reading.ordered
        arrays |= {ids.tobytes(): ids for ids in others}
        frozen_classes = np.array([*self._reasons, self._class_of[NO_CHANNEL]])
        for ids in arrays.values():
            labels = self._class_of[ids]
            starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
            counts = np.diff(np.r_[starts, len(labels)])
            labels = labels[starts]
            frozen = np.isin(labels, frozen_classes)
            joined = (counts[1:] == counts[:-1]) & ~frozen[1:] & ~frozen[:-1]
            _note(follows, labels, np.r_[np.where(joined, labels[1:], _END), _END])
            _note(precedes, labels, np.r_[_END, np.where(joined, labels[:-1], _END)])
        return follows, precedes


def _layer_of(name: str) -> str:
    """Return the path of the layer that has a tensor, also where it computes its weight from that tensor."""
    return name.rpartition(".")[0].partition(".parametrizations.")[0]


def _note(neighbour: np.ndarray, labels: np.ndarray, seen: np.ndarray) -> None:
    """Note the neighbour of each class; two different ones make _MANY."""
    order = np.lexsort((seen, labels))
    labels, seen = labels[order], seen[order]
    new = np.r_[True, labels[1:] != labels[:-1]]
    differs = np.r_[False, (labels[1:] == labels[:-1]) & (seen[1:] != seen[:-1])]
    many = np.unique(labels[differs])
    labels, seen = labels[new], seen[new]
    before = neighbour[labels]
    neighbour[labels] = np.where((before == _UNSEEN) | (before == seen), seen, _MANY)
    neighbour[many] = _MANY


def _classes(reading: Reading) -> np.ndarray:
    """Return the class of every id, shape (ids + 1,); the extra last one is the class of NO_CHANNEL."""
    # Here and not above: scipy and numpy's extras cost a tenth of what `import psenet` may take.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = reading.num_ids + 1
    a = np.concatenate([np.zeros(0, np.int64), *(pair[0].reshape(-1) for pair in reading.ties)])
    b = np.concatenate([np.zeros(0, np.int64), *(pair[1].reshape(-1) for pair in reading.ties)])
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _one_per_module(needs: list[MaskNeed]) -> Iterable[MaskNeed]:
    """A module called several times is prepared once; its calls are tied through its parameters."""
    return {(need.module, need.kind): need for need in needs}.values()


def _masked_ops(reading: Reading, need: MaskNeed) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return the counted ops of the module, and which of them need the mask."""
    if need.kind == "norm" and need.module not in reading.ops:  # inside an opaque module
        return ("batch_norm",), frozenset({0})
    if need.kind not in ("op", "norm"):
        return (), frozenset()
    calls = {other.call for other in reading.masks if (other.module, other.kind) == (need.module, need.kind)}
    return reading.ops[need.module][0], frozenset(calls)


def _full_macs(reading: Reading) -> dict[str, int]:
    macs: dict[str, int] = {}
    for term in reading.macs:
        sides = [1 if ids is None else len(ids) for ids in (term.left, term.right)]
        macs[term.module] = macs.get(term.module, 0) + term.scale * math.prod(sides)
    return macs


def _costs(
    reading: Reading, grouping: _Grouping, layouts: dict[str, tuple[Layout, ...]], batch_size: int
) -> SpaceCosts:
    num_groups = len(grouping.groups())
    one = LinearForm(1)

    def side(ids: np.ndarray | None) -> LinearForm:
        return one if ids is None else linear_form(grouping.layout(ids))

    macs = [(term.scale, side(term.left), side(term.right)) for term in reading.macs]
    params = []
    for name, shape in reading.params.items():
        forms = [linear_form(layout) for layout in layouts.get(name, ())]
        elastic = [form for form in forms if form.coefficients]
        if len(elastic) > 2:
            raise AssertionError(f"{name} has more than two elastic axes")
        fixed = math.prod(form.constant for form in forms if not form.coefficients) if forms else math.prod(shape)
        params.append((fixed, *elastic, *[one] * (2 - len(elastic))))

    def size(value: Value) -> LinearForm:
        return grouping.count_form(value.ids, math.prod(value.shape) * value.itemsize // value.ids.size)

    moments = [_sum([size(value) for value in alive], batch_size) for alive in reading.moments]
    return SpaceCosts(
        macs=ProductCost(macs, num_groups), params=ProductCost(params, num_groups), memory=PeakCost(moments, num_groups)
    )


def _sum(forms: list[LinearForm], divisor: int) -> LinearForm:
    coefficients: dict[int, int] = {}
    for form in forms:
        for group, coefficient in form.coefficients:
            coefficients[group] = coefficients.get(group, 0) + coefficient
    return LinearForm(
        sum(form.constant for form in forms) // divisor,
        tuple((group, coefficient // divisor) for group, coefficient in coefficients.items()),
    )
