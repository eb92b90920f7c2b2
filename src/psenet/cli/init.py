"""`psenet init`: a recipe to start from."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="timm:NAME, torchvision:NAME or my.module:factory.")] = "timm:resnet18",
    data: Annotated[str, typer.Option(help="`digits`, an image folder, or a name of timm's dataset factory.")] = "DATA",
    macs: Annotated[str | None, typer.Option(help="Budget of MACs; 50% where no budget is given.")] = None,
    params: Annotated[str | None, typer.Option(help="Budget of parameters: 50%, 2M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Budget of peak activation memory: 50%, 4MB.")] = None,
    latency_ms: Annotated[str | None, typer.Option(help="Budget of measured latency: 4, 4ms, 50%.")] = None,
    template: Annotated[str, typer.Option(help="`pilot` (hours) or `full`.")] = "pilot",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other value: supernet.epochs=20; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented recipe: every value of a run, with its default.

    Example: psenet init recipe.yaml --model timm:mobilenetv2_100 --data photos --latency-ms 4 --template pilot
    """
    from psenet.cli.opening import make_console, read_overrides
    from psenet.errors import InputError
    from psenet.files import check_can_be_written, write_bytes
    from psenet.recipe import Override, read_recipe
    from psenet.recipe_text import commented_text

    check_can_be_written(path)
    if path.exists() and not force:
        raise InputError(f"{path} is there already; give another name, or --force to write over it")
    budget = {"macs": macs, "params": params, "memory": memory, "latency_ms": latency_ms}
    if not any(budget.values()):
        budget["macs"] = "50%"
    overrides = [
        Override(("model", "name"), model, "--model"),
        Override(("data", "source"), data, "--data"),
        *(Override(("budget", name), value, f"--{name.replace('_', '-')}") for name, value in budget.items()),
        *read_overrides(settings or ()),
    ]
    write_bytes(path, commented_text(read_recipe(template=template, overrides=overrides)).encode())
    make_console().print(
        f"written: {path}\nhow long it takes:  psenet prune --recipe {path} --dry-run\n"
        f"start:              psenet prune --recipe {path} --out runs/1",
        highlight=False,
        soft_wrap=True,
    )
