"""`psenet finetune`: the nets that a search has chosen become what they can be."""

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory whose search is finished.")],
    factory: Annotated[str | None, typer.Option(help="Of a run of a factory of yours: its name, to import it.")] = None,
    data_workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
) -> None:
    """Fine-tune the searched and the uniform net of a run, or go on with that.

    Example: psenet finetune runs/x
    """
    from psenet.cli.opening import continue_run

    continue_run(run, "finetune", command=context.obj, factory=factory, data_workers=data_workers)
