"""`psenet report`: what a run found, for people, and what pruning returns in money."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run directory, finished or not.")],
    lang: Annotated[str | None, typer.Option(help="en or ja; that of the run's recipe, else en.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of one machine-hour.")] = None,
    requests_per_day: Annotated[float | None, typer.Option(help="Samples the net is run on in a day.")] = None,
    engineering_hours: Annotated[float | None, typer.Option(help="Hours people spent on pruning.")] = None,
    engineering_rate: Annotated[float | None, typer.Option(help="Cost of one such hour.")] = None,
    currency: Annotated[str | None, typer.Option(help="Shown beside amounts of money: EUR.")] = None,
    verify: Annotated[
        int | None,
        typer.Option(
            "--verify-ranking", min=4, help="Train so many subnets alone first: is the supernet's order right?"
        ),
    ] = None,
    factory: Annotated[
        str | None, typer.Option(help="With --verify-ranking, of a run of a factory: its name, to import it.")
    ] = None,
) -> None:
    """Write a run's report as report.html and report.md; in Japanese as report.ja.html and report.ja.md.

    Figures that are not given are those of the run's recipe, if it has any.

    Example: psenet report runs/x --price-per-hour 2.5 --requests-per-day 1000000 --currency EUR
    """
    from dataclasses import fields

    from psenet.cli.opening import RECIPE, make_console, reopen_run
    from psenet.recipe import ReportChoice, read_recipe
    from psenet.report import ReturnFigures, write_report
    from psenet.stages.verify import verify_ranking

    given = {
        "price_per_hour": price_per_hour,
        "requests_per_day": requests_per_day,
        "engineering_hours": engineering_hours,
        "engineering_rate": engineering_rate,
        "currency": currency,
    }
    chosen = read_recipe(run / RECIPE).report if (run / RECIPE).is_file() else ReportChoice()
    kept = {field.name: getattr(chosen, field.name) for field in fields(ReturnFigures)}
    figures = ReturnFigures(**{**kept, **{name: value for name, value in given.items() if value is not None}})
    console = make_console()
    if verify is not None:
        verify_ranking(reopen_run(run, command=context.obj, factory=factory), verify)
    for path in write_report(run, language=lang or chosen.language, figures=figures):
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
