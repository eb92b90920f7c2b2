"""`psenet train`: the baseline and the supernet of a run."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="The run directory; made if it is not there.")],
    recipe: Annotated[Path | None, typer.Option(help="The YAML file of a new run; see `psenet init`.")] = None,
    template: Annotated[str | None, typer.Option(help="Start a new run from `pilot` or `full`.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any value of a new run's recipe: data.source=photos; repeatable.")
    ] = None,
    factory: Annotated[str | None, typer.Option(help="Of a run of a factory of yours: its name, to import it.")] = None,
    data_workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
) -> None:
    """Train the baseline and the supernet of a run, or go on with that.

    Example: psenet train runs/x --recipe recipe.yaml
    """
    from psenet.cli.opening import Place, continue_run, make_console, open_run, read_overrides
    from psenet.errors import InputError
    from psenet.pipeline import run_stage
    from psenet.recipe import read_recipe

    asked = recipe is not None or template is not None or settings
    if (run / "recipe.json").is_file():
        if asked:
            raise InputError(
                f"{run} already holds a run, with its own recipe: leave --recipe, --template and --set out"
            )
        continue_run(run, "train", command=context.obj, factory=factory, data_workers=data_workers)
        return
    if not asked:
        raise InputError(f"there is no run in {run}; start one: psenet train {run} --recipe FILE")
    chosen = read_recipe(recipe, template=template, overrides=read_overrides(settings or ()))
    place = Place(out=run, command=context.obj, data_workers=data_workers)
    run_stage(open_run(chosen, place, make_console()), "train")
