"""`psenet env`: what psenet runs on, to be pasted into a bug report."""

import json
from typing import Annotated

import typer


def env(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, for programs.")] = False,
) -> None:
    """Show versions, processor, GPUs and engines, for a bug report; without user name, host name or home directory.

    Example: psenet env
    """
    from psenet.environment import as_lines, environment

    facts = environment()
    # Not by rich: a report must be what it is on any terminal, and in a file.
    print(json.dumps(facts, indent=2, ensure_ascii=True) if as_json else "\n".join(as_lines(facts)))
