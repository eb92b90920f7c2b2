"""Read YAML with the line of every value, so that a message can point at what is wrong.

YAML 1.2's idea of true and false is used: `no` and `off` are words, as in `mixed_precision: no`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from psenet.errors import InputError

Key = tuple[str, ...]
"""Where a value stands: the names that lead to it."""

_MAX_BYTES, _MAX_VALUES = 1_000_000, 10_000
"""A recipe is a page of text; anything longer is something else, also if only its aliases make it long."""


class _Loader(yaml.SafeLoader):
    """Makes plain values only."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


@dataclass(frozen=True)
class Document:
    """What a YAML file says, and where."""

    values: dict[str, Any]
    lines: Mapping[Key, int]
    """The line of every key, counted from 1."""


def read_yaml(path: Path) -> Document:
    """Read a file that holds one mapping.

    Raises:
        InputError: There is no such file, it is no YAML, holds something else than a mapping, or names a key twice.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} must be a page of YAML; it has {path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be text in UTF-8: {error}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        _check_size(node, path)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    except RecursionError as error:
        raise InputError(f"{path}: must be a page of YAML; its values are nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise InputError(f"{place}: this is no YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:
        return Document({}, {})
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}:1: must be a mapping of names to values, such as `model:` and `data:`")
    lines: dict[Key, int] = {}
    twice: list[str] = []
    _walk(node, (), lines, twice)
    if twice:
        raise InputError(f"{path}: " + "; ".join(twice))
    return Document(values, lines)


def read_scalar(text: str) -> Any:
    """Return the value that a piece of YAML on one line means: `3`, `0.1`, `true`, `[a, b]`, or text.

    Raises:
        InputError: It is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{text[:100]!r} is no YAML value: {getattr(error, 'problem', None) or error}") from error


def _check_size(root: yaml.Node | None, path: Path) -> None:
    """Make sure that a document stays a page when its aliases are put in.

    Raises:
        InputError: They multiply it, or a value contains itself.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise InputError(f"{path}:{node.start_mark.line + 1}: a value contains itself; write it without alias")
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(size(one, (*above, id(node))) for one in inner)
        return sizes[id(node)]

    if root is not None and size(root, ()) > _MAX_VALUES:
        raise InputError(f"{path} must be a page of YAML; with its aliases it has {size(root, ()):,} values")


def _walk(node: yaml.MappingNode, parent: Key, lines: dict[Key, int], twice: list[str]) -> None:
    for key_node, value_node in node.value:
        key, line = (*parent, str(key_node.value)), key_node.start_mark.line + 1
        if key in lines:
            twice.append(f"line {line}: {'.'.join(key)} is already given in line {lines[key]}")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _walk(value_node, key, lines, twice)
