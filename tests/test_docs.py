"""The code in the documentation runs as it stands."""

import re
from pathlib import Path

import pytest

from psenet import slicing
from psenet.tracing.rules import RULES

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_on_own_layers_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slicing, "_RESIZERS", dict(slicing._RESIZERS))
    rules = dict(RULES)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "own_layers.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, object] = {"__name__": "own_layers"}
    try:
        for block in blocks:
            exec(compile(block, "own_layers.md", "exec"), namespace)
    finally:
        RULES.clear()
        RULES.update(rules)
