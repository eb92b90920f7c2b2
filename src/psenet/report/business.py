"""The sections of the report on what surrounds a run: return, provenance, and what is missing."""

from collections.abc import Mapping
from typing import Any

from psenet.report.blocks import Block, Cell, Code, Paragraph, Section, Table
from psenet.report.facts import NetFacts, RunFacts
from psenet.report.money import DAYS_PER_MONTH, Line, ReturnFigures, return_lines
from psenet.report.shown import DASH, money
from psenet.report.text import Words

_STAGES = ("baseline", "supernet", "search", "finetune", "total")


def return_section(facts: RunFacts, figures: ReturnFigures | None, words: Words) -> Section:
    """Return savings, cost and pay-back, every formula with its numbers; without figures, how to give them."""
    if figures is None or figures == ReturnFigures():
        command = (
            "psenet report RUN --price-per-hour ... --requests-per-day ... \\\n"
            "    --engineering-hours ... --engineering-rate ... --currency ..."
        )
        blocks: tuple[Block, ...] = (Paragraph(text=words("return_ask")), Code(text=command))
        return Section(name="return", title=words("return"), blocks=blocks)
    before, after = (facts.nets.get(name, NetFacts()).latency_ms for name in ("baseline", "pruned"))
    seconds = facts.seconds.get("total", sum(facts.seconds.values()) if facts.seconds else None)
    lines = return_lines(
        figures,
        baseline_ms=None if before is None else before / facts.batch_size,
        pruned_ms=None if after is None else after / facts.batch_size,
        run_hours=None if seconds is None else seconds / 3600,
    )
    rows = tuple((words(line.key), line.formula or DASH, _value(line, figures, words)) for line in lines)
    table = Table(header=(words("step"), words("formula"), words("value")), rows=rows)
    blocks = (Paragraph(text=words("return_lead", days=DAYS_PER_MONTH, batch=facts.batch_size)), table)
    if not figures.currency:
        blocks += (Paragraph(text=words("no_currency"), is_note=True),)
    return Section(name="return", title=words("return"), blocks=blocks)


def _value(line: Line, figures: ReturnFigures, words: Words) -> str:
    if line.never:
        return words("never")
    if line.value is None:
        needed = words("joined").join(words(f"figure_{name}") for name in line.missing)
        return words("needs", figures=needed)
    if line.unit == "money":
        return money(line.value, figures.currency)
    digits = f"{line.value:,.2f}" if line.value >= 0.01 else f"{line.value:.2g}"
    return words(f"unit_{line.unit}", value=digits)


def provenance_section(facts: RunFacts, words: Words) -> Section:
    """Return where the figures come from: command, versions, seeds, hardware, times, settings."""
    source = facts.result or facts.recipe
    settings = source.get("settings")
    command = source.get("command") or words("from_python" if "command" in source else "unknown")
    seed = source.get("seed", settings.get("seed") if isinstance(settings, Mapping) else None)
    rows: list[tuple[Cell, ...]] = [
        (words("model"), facts.model),
        (words("data"), facts.data),
        (words("command"), str(command)),
        (words("budget"), _pairs(source.get("budget"), words)),
        (words("seed"), words("unknown") if seed is None else str(seed)),
        (words("finished_at"), str(source.get("finished_at") or words("unknown"))),
        (words("versions"), _pairs(source.get("versions"), words)),
        (words("hardware"), _pairs(source.get("hardware"), words)),
        (words("time"), _times(facts, words)),
    ]
    export = source.get("export")
    if isinstance(export, Mapping) and isinstance(export.get("bytes"), Mapping):
        files = [f"{name} ({size / 1000:,.0f} kB)" for name, size in export["bytes"].items() if isinstance(size, int)]
        rows.append((words("exported"), words("joined").join(files)))
    both = frozenset({0, 1})
    blocks: list[Block] = [Table(header=(words("what"), words("value")), rows=tuple(rows), words=both)]
    if isinstance(settings, Mapping) and settings:
        flat = tuple((name, value) for name, value in _flat(settings))
        header = (words("setting"), words("value"))
        blocks.append(Table(header=header, rows=flat, words=both, folded=words("settings")))
    return Section(name="provenance", title=words("provenance"), blocks=tuple(blocks))


def missing_section(facts: RunFacts, words: Words) -> Section | None:
    """Return what could not be shown and why; None where everything is there."""
    if not facts.missing:
        return None
    rows = tuple((piece.file, piece.reason or words("absent")) for piece in facts.missing)
    table = Table(header=(words("file"), words("reason")), rows=rows, words=frozenset({0, 1}))
    lead = Paragraph(text=words("missing_lead"))
    return Section(name="missing", title=words("missing"), blocks=(lead, table))


def _times(facts: RunFacts, words: Words) -> str:
    seconds = facts.seconds
    parts = [words(f"stage_{stage}", time=_duration(seconds[stage])) for stage in _STAGES if stage in seconds]
    return words("joined").join(parts) or words("unknown")


def _duration(seconds: float) -> str:
    """Return a time that reads the same in every language."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _pairs(values: Any, words: Words) -> str:
    """Return a mapping in one line."""
    if not isinstance(values, Mapping) or not values:
        return words("unknown")
    shown = (
        ", ".join(map(str, value)) or words("none") if isinstance(value, list) else str(value)
        for value in values.values()
    )
    return words("joined").join(f"{name} {value}" for name, value in zip(values, shown, strict=True))


def _flat(settings: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{parent}{name}.")
        else:
            found.append((parent + name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found
