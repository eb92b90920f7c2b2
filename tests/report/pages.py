"""Reading a page without a browser: its text, tables, attributes and embedded data."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Keeps what a test asks of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.data: dict[str, Any] = {}
        self.rows: list[list[str]] = []
        self._script: str | None = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self._script = given.get("id") or "code"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            if self._script != "code":
                self.data[self._script] = json.loads(data)
        elif "style" not in self.open:
            self.text += data
            if self.open and ("td" in self.open or "th" in self.open):
                self.rows[-1][-1] += data.replace("\n", "")

    def row(self, title: str) -> list[str]:
        """Return the cells of the first table row with a title."""
        return next([cell.replace("\u00a0", " ") for cell in row[1:]] for row in self.rows if row[:1] == [title])

    def with_tag(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
