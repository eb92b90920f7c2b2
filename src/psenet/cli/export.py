"""`psenet export`: the last stage, which tests, measures and exports."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory whose fine-tuning is finished.")],
    factory: Annotated[str | None, typer.Option(help="Of a run of a factory of yours: its name, to import it.")] = None,
) -> None:
    """Test, measure and export the nets of a run: result.json and the model folder.

    Example: psenet export runs/x
    """
    from psenet.cli.opening import continue_run, make_console
    from psenet.result import result_table
    from psenet.rundir import read_json

    continue_run(run, "export", command=context.obj, factory=factory)
    console = make_console()
    console.print(result_table(read_json(run / "result.json")))
    console.print(f"figures: {run / 'result.json'}\nmodel:   {run / 'model'}", highlight=False, soft_wrap=True)
