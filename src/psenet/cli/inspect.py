"""`psenet inspect`: what of a model can vary, what cannot and why, and how small it can get."""

import time
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME or my.module:factory.")],
    image_size: Annotated[int, typer.Option(min=1, help="Height and width of the input.")] = 224,
    num_classes: Annotated[int, typer.Option(min=1)] = 1000,
    in_channels: Annotated[int, typer.Option(min=1)] = 3,
    divisor: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 8,
    min_ratio: Annotated[float, typer.Option(help="Smallest width as a share of a group's size.")] = 0.25,
    weights: Annotated[Path | None, typer.Option(help="Trained weights of the model.")] = None,
) -> None:
    """Show the channel groups of a model, what is frozen and why, and the reachable costs.

    Example: psenet inspect timm:mobilenetv2_100
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from psenet.models import build_model
    from psenet.reading import trace

    console = Console(markup=False, emoji=False)
    net = build_model(model, num_classes=num_classes, in_channels=in_channels, weights=weights)
    start = time.perf_counter()
    space = trace(net, torch.zeros(1, in_channels, image_size, image_size), divisor=divisor, min_ratio=min_ratio)
    seconds = time.perf_counter() - start

    groups = Table(title=f"{len(space.groups)} channel groups of {model}")
    groups.add_column("group")
    groups.add_column("size", justify="right")
    groups.add_column("allowed widths")
    groups.add_column("layers", justify="right")
    for group in space.groups:
        groups.add_row(group.name, str(group.size), say_choices(group.choices), str(len(group.layers)))
    console.print(groups)

    if space.frozen:
        frozen = Table(title="layers whose output width cannot vary")
        frozen.add_column("layer")
        frozen.add_column("share of MACs", justify="right")
        frozen.add_column("why")
        for item in space.frozen:
            frozen.add_row(item.layer, f"{item.macs_share:.1%}", item.reason)
        console.print(frozen)

    full, small = space.full(), space.smallest()
    costs = Table(title=f"one {image_size} x {image_size} image")
    for title in ("", "full", "smallest reachable", "share"):
        costs.add_column(title, justify="right" if title else "left")
    for name, cost, unit, size in (
        ("MACs", space.macs, "M", 1e6),
        ("parameters", space.params, "M", 1e6),
        ("peak activations", space.memory, "MiB", 2**20),
    ):
        most, least = cost(full), cost(small)
        costs.add_row(name, f"{most / size:.2f} {unit}", f"{least / size:.2f} {unit}", f"{least / most:.1%}")
    console.print(costs)
    console.print(f"traced and proved in {seconds:.1f} s; {space.num_settings():.2g} width settings", highlight=False)


def say_choices(choices: tuple[int, ...]) -> str:
    """Return allowed widths for a person: all if few, else first, second and last."""
    if len(choices) <= 6:
        return ", ".join(map(str, choices))
    return f"{choices[0]}, {choices[1]}, ... {choices[-1]} ({len(choices)})"
