"""`psenet inspect`: what of a model can vary, what cannot and why, and how small it can get."""

import re
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from psenet.space import Frozen, WidthSpace


def inspect(
    model: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or my.module:factory.")],
    image_size: Annotated[int, typer.Option(min=1, help="Height and width of the input.")] = 224,
    num_classes: Annotated[int, typer.Option(min=1)] = 1000,
    in_channels: Annotated[int, typer.Option(min=1)] = 3,
    divisor: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 8,
    min_ratio: Annotated[float, typer.Option(help="Smallest width as a share of a group's size.")] = 0.25,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers that must not vary; repeatable.")] = None,
    opaque: Annotated[list[str] | None, typer.Option(help="Modules not to read at all; repeatable.")] = None,
    why: Annotated[str | None, typer.Option(help="Say only of these layers whether they vary.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Trained weights of the model.")] = None,
) -> None:
    """Show the channel groups of a model, what is frozen and why, and the reachable costs.

    Example: psenet inspect timm:mobilenetv2_100
    """
    import torch
    from rich.console import Console

    from psenet.errors import InputError
    from psenet.models import build_model
    from psenet.reading import trace

    console = Console(markup=False, emoji=False)
    net = build_model(model, num_classes=num_classes, in_channels=in_channels, weights=weights)
    start = time.perf_counter()
    space = trace(
        net,
        torch.zeros(1, in_channels, image_size, image_size),
        divisor=divisor,
        min_ratio=min_ratio,
        exclude=exclude,
        opaque=opaque or (),
    )
    seconds = time.perf_counter() - start
    if why is not None:
        answer = _answers(space, why)
        if not answer.row_count:
            raise InputError(f"--why: no layer with channels matches {why!r}")
        console.print(answer)
        return
    console.print(_groups(space, model))
    if space.frozen:
        console.print(_reasons(space.frozen))
    console.print(_costs(space, image_size))
    console.print(
        f"{space.elastic_share():.1%} of the MACs have a side that can vary; traced and proved in {seconds:.1f} s; "
        f"{space.num_settings():.2g} width settings",
        highlight=False,
    )


def _groups(space: "WidthSpace", model: str) -> "Table":
    table = _table(f"{len(space.groups)} channel groups of {model}", "group", ">size", "allowed widths", ">layers")
    for group in space.groups:
        table.add_row(group.name, str(group.size), say_choices(group.choices), str(len(group.layers)))
    return table


def _reasons(frozen: Sequence["Frozen"]) -> "Table":
    """Return what froze layers, the costliest reason first."""
    layers: dict[str, list[Frozen]] = {}
    for item in frozen:
        layers.setdefault(say_cause(item.reason), []).append(item)
    shares = {reason: sum(item.macs_share for item in items) for reason, items in layers.items()}
    table = _table("layers whose output width cannot vary", "layers", ">share of MACs", "why")
    for reason in sorted(layers, key=lambda reason: -shares[reason]):
        table.add_row(say_layers([item.layer for item in layers[reason]]), f"{shares[reason]:.1%}", reason)
    return table


def _costs(space: "WidthSpace", image_size: int) -> "Table":
    full, small = space.full(), space.smallest()
    table = _table(f"one {image_size} x {image_size} image", "", ">full", ">smallest reachable", ">share")
    for name, cost, unit, size in (
        ("MACs", space.macs, "M", 1e6),
        ("parameters", space.params, "M", 1e6),
        ("peak activations", space.memory, "MiB", 2**20),
    ):
        most, least = cost(full), cost(small)
        table.add_row(name, f"{most / size:.2f} {unit}", f"{least / size:.2f} {unit}", f"{least / most:.1%}")
    return table


def _answers(space: "WidthSpace", pattern: str) -> "Table":
    """Return, for every layer that matches, the groups its tensors follow and what keeps its outputs."""
    reasons = {item.layer: item.reason for item in space.frozen}
    groups: dict[str, list[str]] = {layer: [] for layer in reasons}
    for group in space.groups:
        for layer in group.layers:
            groups.setdefault(layer, []).append(f"{group.name}: {say_choices(group.choices)}")
    table = _table(f"layers like {pattern}", "layer", "follows", "output width cannot vary because")
    for layer, followed in groups.items():
        if fnmatchcase(layer, pattern):
            table.add_row(layer, "\n".join(followed) or "nothing", reasons.get(layer, ""))
    return table


def _table(title: str, *columns: str) -> "Table":
    """Return an empty table; a column that begins with > is right-aligned."""
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def say_cause(reason: str) -> str:
    """Return a reason without the place and the width, which differ from layer to layer."""
    return re.sub(r" than \d+$", "", re.sub(r" in [^ ]+\)$", ")", reason))


def say_layers(layers: Sequence[str]) -> str:
    """Return layers for a person: the first, and how many more."""
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def say_choices(choices: tuple[int, ...]) -> str:
    """Return allowed widths for a person: all if few, else first, second and last."""
    if len(choices) <= 6:
        return ", ".join(map(str, choices))
    return f"{choices[0]}, {choices[1]}, ... {choices[-1]} ({len(choices)})"
