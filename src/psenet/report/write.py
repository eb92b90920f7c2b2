"""`write_report`: what a run found, for people, as HTML and as Markdown."""

from pathlib import Path

from psenet.files import write_bytes
from psenet.report.blocks import Report
from psenet.report.business import missing_section, provenance_section, return_section
from psenet.report.decision import decision_lines
from psenet.report.facts import RunFacts, read_facts
from psenet.report.html import html
from psenet.report.markdown import markdown
from psenet.report.money import ReturnFigures
from psenet.report.sections import (
    comparison,
    curves_section,
    front_section,
    frozen_section,
    prior_section,
    ranking_section,
    widths_section,
)
from psenet.report.text import Words
from psenet.result import versions


def report_name(language: str) -> str:
    """Return the name of the HTML report in a run directory."""
    return "report.html" if language == "en" else f"report.{language}.html"


def write_report(run: str | Path, *, language: str = "en", figures: ReturnFigures | None = None) -> list[Path]:
    """Write the report of a run, finished or not, into its directory.

    Args:
        run: The run directory. What is missing or damaged there is named in the report; the rest is shown.
        language: `"en"`, for `report.html` and `report.md`, or `"ja"`, for `report.ja.html` and `report.ja.md`.
        figures: What the return is worked out from; None for a report without it.

    Returns:
        The paths of the HTML and of the Markdown file.

    Raises:
        InputError: It is no run directory, or there is no such language.
        OSError: The files cannot be written.

    Example:
        >>> from psenet.report import ReturnFigures, write_report
        >>> write_report("runs/mine", language="ja", figures=ReturnFigures(price_per_hour=2.5))  # doctest: +SKIP
    """
    words = Words(language)
    report = make_report(read_facts(run), words, figures)
    name = report_name(language)
    contents = {name: html(report), name.removesuffix("html") + "md": markdown(report)}
    paths = [Path(run) / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        # A lone surrogate, from a path that is no UTF-8, must not cost the report.
        write_bytes(path, content.encode("utf-8", errors="replace"))
    return paths


def make_report(facts: RunFacts, words: Words, figures: ReturnFigures | None) -> Report:
    """Return the report, not yet written as anything."""
    sections = (
        comparison(facts, words) if facts.nets else None,
        front_section(facts, words),
        widths_section(facts, words),
        curves_section(facts, words),
        prior_section(facts, words),
        ranking_section(facts, words),
        frozen_section(facts, words),
        return_section(facts, figures, words),
        provenance_section(facts, words),
        missing_section(facts, words),
    )
    return Report(
        language=words.language,
        title=words("title", model=facts.model),
        subtitle=words("subtitle", data=facts.data, run=facts.path.resolve().name),
        decision_title=words("decision"),
        decision=decision_lines(facts, words),
        sections=tuple(section for section in sections if section is not None),
        contents=words("contents"),
        footer=words("footer", version=versions()["psenet"]),
    )
