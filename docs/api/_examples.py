"""Read `Example:` in docstrings as the section that griffe calls `Examples:`, so that doctests become code."""

import re
from typing import Any

import griffe


class OneExample(griffe.Extension):
    """Rename the section before the docstring is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename it in one object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
