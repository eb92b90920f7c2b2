"""Write recipes: as plain YAML for a run directory, and with a comment at every value for a person to edit."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import yaml

from psenet.config import PruneConfig
from psenet.recipe import SECTIONS, Recipe, recipe_defaults

_WIDTH = 100
_HEAD = """\
# A recipe for psenet: psenet prune --recipe THIS --out RUN
# How long that will take:  psenet prune --recipe THIS --dry-run
# Lines behind # show the defaults. Any value can also be given as an option: --set supernet.epochs=20
"""


def plain_text(recipe: Recipe) -> str:
    """Return the recipe as YAML, every value written out."""
    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)


def commented_text(recipe: Recipe) -> str:
    """Return the recipe as YAML with a comment at every value; defaults stand behind `#`."""
    content = recipe.as_dict()
    about = _documents(PruneConfig) | {name: inspect.getdoc(kind) or "" for name, kind in SECTIONS.items()}
    lines, explained = [_HEAD], set[type]()
    for name, default in recipe_defaults().items():
        value = content[name]
        lines += _comment(about[name], "")
        if isinstance(default, Mapping):
            kind = _kind_of(name)
            lines += _section(name, value, default, {} if kind in explained else _documents(kind))
            explained.add(kind)
        else:
            lines.append(_line(name, value, default, ""))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _section(
    name: str, values: Mapping[str, Any], defaults: Mapping[str, Any], documents: Mapping[str, str]
) -> Iterator[str]:
    yield f"{name}:"
    for part, default in defaults.items():
        yield from _comment(documents.get(part, ""), "  ")
        yield _line(part, values.get(part), default, "  ")


def _line(name: str, value: Any, default: Any, indent: str) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    text = f"{name}: {written.removesuffix('...' + chr(10)).strip()}"
    return f"{indent}{text}" if value != default else f"{indent}# {text}"


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text.partition("\n\n")[0], _WIDTH - len(indent))]


def _kind_of(name: str) -> type:
    kind = SECTIONS.get(name)
    return type(getattr(PruneConfig(), name)) if kind is None else kind


def _documents(kind: type) -> dict[str, str]:
    """Return what the source says below each field of a dataclass."""
    assert is_dataclass(kind)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            assert isinstance(text, ast.Constant), f"{kind.__name__}.{statement.target.id} has no docstring"
            found[statement.target.id] = inspect.cleandoc(str(text.value)).replace("\n", " ")
    return found
