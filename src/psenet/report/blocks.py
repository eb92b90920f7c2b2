"""What a report consists of, whatever it is written as: sections of paragraphs, tables, charts and one slider."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A table's cell that is a share, drawn as a bar."""

    share: float
    """0 to 1."""

    @property
    def text(self) -> str:
        """The share as text."""
        return f"{100 * self.share:.0f} %"


Cell = str | Bar


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Sentences."""

    text: str
    is_note: bool = False
    """Said in a smaller voice."""


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """Short lines."""

    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    """What a terminal would show."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the first column names the row, the others hold numbers unless said otherwise."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: frozenset[int] = frozenset({0})
    """Columns of words, which stand left."""
    folded: str = ""
    """Where a page shall show it only on demand: what it then calls it."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plotly figure."""

    name: str
    """Identifier within the page."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    summary: str
    """What it shows, for those who cannot see it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate that the slider can pick, in words and numbers for the page."""

    share: float
    """Its MACs in percent of the full model's."""
    score: float
    facts: tuple[str, ...]
    """One value for each of the slider's labels."""
    widths: tuple[int, ...]
    """One for each of the slider's groups."""


@dataclass(frozen=True, kw_only=True)
class Slider:
    """Picks a budget; the best candidate inside it is shown on a chart and in words."""

    chart: str
    trace: int
    """Of the chart: the trace that marks the pick."""
    choices: tuple[Choice, ...]
    """By MACs, ascending: only candidates better than all cheaper ones, of which the last inside a budget is best."""
    start: int
    """Number of the choice that is shown at first."""
    labels: tuple[str, ...]
    groups: Mapping[str, int]
    """Full width by channel group."""
    words: Mapping[str, str]
    """`label`, `group`, `width`, `share`: what it says around them."""


Block = Paragraph | Bullets | Code | Table | Chart | Slider


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is below it."""

    name: str
    """Anchor within the page."""
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole report, in one language."""

    language: str
    title: str
    subtitle: str
    decision_title: str
    decision: tuple[str, ...]
    """The decision in three lines; fewer where the run does not say enough."""
    sections: tuple[Section, ...]
    contents: str
    """What the list of sections is called."""
    footer: str
