"""A report as Markdown: the same facts, charts replaced by what they show."""

import re

from psenet.report.blocks import Bar, Block, Bullets, Cell, Chart, Code, Paragraph, Report, Section, Slider, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$&])")


def markdown(report: Report) -> str:
    """Return the report as Markdown (CommonMark with tables)."""
    parts = [f"# {_plain(report.title)}", _plain(report.subtitle)]
    parts.append("\n".join(f"{number}. {_plain(line)}" for number, line in enumerate(report.decision, 1)))
    parts += [_section(section) for section in report.sections]
    parts.append(f"---\n\n{_plain(report.footer)}")
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {_plain(section.title)}", *map(_block, section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return f"*{_plain(block.text)}*" if block.is_note else _plain(block.text)
        case Bullets():
            return "\n".join(f"- {_plain(line)}" for line in block.lines)
        case Code():
            return f"```\n{block.text}\n```"
        case Table():
            return _table(block.header, block.rows, block.words)
        case Chart():
            return f"*{_plain(block.summary)}*"
        case Slider():
            return _choices(block)


def _table(header: tuple[str, ...], rows: tuple[tuple[Cell, ...], ...], words: frozenset[int]) -> str:
    rule = ["---" if column in words else "---:" for column in range(len(header))]
    lines = [list(map(_plain, header)), rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _choices(slider: Slider) -> str:
    """Return what the slider can pick: a row for each candidate on the front, its widths in the last column."""
    header = (*slider.labels, slider.words["width"])
    rows = tuple(
        (
            *choice.facts,
            ", ".join(f"{name}: {width}" for name, width in zip(slider.groups, choice.widths, strict=True)),
        )
        for choice in slider.choices
    )
    return _table(header, rows, frozenset({len(header) - 1}))


def _cell(cell: Cell) -> str:
    return cell.text if isinstance(cell, Bar) else _plain(cell)


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is: one line, nothing in it a mark."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
