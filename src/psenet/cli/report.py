"""`psenet report`: what a run found, for people, and what pruning returns in money."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run directory, finished or not.")],
    lang: Annotated[str, typer.Option(help="en or ja.")] = "en",
    price_per_hour: Annotated[float | None, typer.Option(help="Price of one machine-hour.")] = None,
    requests_per_day: Annotated[float | None, typer.Option(help="Samples the net is run on in a day.")] = None,
    engineering_hours: Annotated[float | None, typer.Option(help="Hours people spent on pruning.")] = None,
    engineering_rate: Annotated[float | None, typer.Option(help="Cost of one such hour.")] = None,
    currency: Annotated[str | None, typer.Option(help="Shown beside amounts of money: EUR.")] = None,
) -> None:
    """Write a run's report as report.html and report.md; in Japanese as report.ja.html and report.ja.md.

    Example: psenet report runs/x --price-per-hour 2.5 --requests-per-day 1000000 --currency EUR
    """
    from rich.console import Console

    from psenet.report import ReturnFigures, write_report

    figures = ReturnFigures(
        price_per_hour=price_per_hour,
        requests_per_day=requests_per_day,
        engineering_hours=engineering_hours,
        engineering_rate=engineering_rate,
        currency=currency,
    )
    console = Console(markup=False, emoji=False)
    for path in write_report(run, language=lang, figures=figures):
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
