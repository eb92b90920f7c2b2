"""`psenet search`: the best widths inside the run's budget, or inside another one on the same supernet."""

from pathlib import Path
from typing import Annotated

import typer


def search(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory whose supernet is trained.")],
    out: Annotated[Path | None, typer.Option(help="With another budget: the run directory of its search.")] = None,
    macs: Annotated[str | None, typer.Option(help="Another budget of MACs: 50%, 300M.")] = None,
    params: Annotated[str | None, typer.Option(help="Of parameters: 50%, 2M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of peak activation memory: 50%, 4MB.")] = None,
    latency_ms: Annotated[str | None, typer.Option(help="Of measured latency: 4, 4ms, 50%.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="With --out, any value but of training: num_evaluations=200.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that score candidates.")] = 1,
    factory: Annotated[str | None, typer.Option(help="Of a run of a factory of yours: its name, to import it.")] = None,
) -> None:
    """Search a trained supernet; another budget starts another run that takes this one's training.

    Example: psenet search runs/x --macs 30% --out runs/x-30 && psenet finetune runs/x-30 && psenet export runs/x-30
    """
    from psenet.budget import RESOURCES
    from psenet.cli.opening import (
        Place,
        continue_run,
        make_console,
        open_run,
        read_kept_recipe,
        read_overrides,
    )
    from psenet.errors import InputError
    from psenet.pipeline import run_stage
    from psenet.recipe import Override

    given = {"macs": macs, "params": params, "memory": memory, "latency_ms": latency_ms}
    limits = {name: value for name, value in given.items() if value is not None}
    if out is None:
        if limits or settings:
            raise InputError(
                "another budget, or other settings, are another run, which takes the trained supernet over: give its "
                "folder, --out RUN"
            )
        continue_run(run, "search", command=context.obj, factory=factory, workers=workers)
        return
    # A new budget stands alone: what the old one limited besides is not kept.
    cleared = [Override(("budget", resource.name), None, "--out") for resource in RESOURCES] if limits else []
    overrides = [Override(("budget", name), value, f"--{name.replace('_', '-')}") for name, value in limits.items()]
    recipe = read_kept_recipe(run, factory, [*cleared, *overrides, *read_overrides(settings or ())])
    place = Place(out=out, command=context.obj, resume=True, trained_in=run, workers=workers)
    run_stage(open_run(recipe, place, make_console()), "search")
