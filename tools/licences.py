"""List the licence of every package that psenet needs at run time, and refuse those that nobody has looked at.

    python tools/licences.py

Read from the metadata of what is installed, without the network: the packages that psenet's own metadata require, and
theirs, and so on, without extras that nobody asked for. A licence is permissive by its name, or its package stands in
`LOOKED_AT` with the reason why it may be used all the same. Exit code 1 where one is neither.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|HPND|PSF|Python Software Foundation|Zlib|CC0|Unlicense)\b", re.I)
COPYLEFT = re.compile(r"\b(L?GPL|AGPL|MPL|EPL|EUPL|CDDL|GNU|Mozilla|copyleft)", re.I)
_OF_ITS_FILES = "MPL-2.0 asks for the source of its own files alone, which are used unchanged and not passed on"
LOOKED_AT: Mapping[str, str] = {"tqdm": _OF_ITS_FILES, "certifi": _OF_ITS_FILES}
"""Packages whose licence is copyleft, proprietary or not told, and why each may be used."""
NVIDIA = "NVIDIA's libraries, which torch's builds for CUDA bring; used as they come, passed on by nobody here"


class Package(NamedTuple):
    """A package, and what its metadata says of its licence."""

    name: str
    version: str
    licence: str


def main() -> int:
    """Print the list; return the exit code."""
    packages = sorted(required("psenet"))
    for name, version, licence in packages:
        print(f"{name:28} {version:18} {licence}")
    problems = [package for package in packages if verdict(package) is None]
    for name, _, licence in problems:
        print(f"{name}: its licence {licence!r} is not known to be permissive: look at it", file=sys.stderr)
    return 1 if problems else 0


def required(root: str) -> Iterator[Package]:
    """Yield the packages that one needs here, itself left out."""
    known: set[tuple[str, str]] = {(root, "")}
    left = list(known)
    while left:
        new = set(_required_by(*left.pop())) - known
        known |= new
        left += new
    for name in sorted({name for name, _ in known} - {root}):
        found = _installed(name)
        if found is not None:
            yield Package(name, found.version, licence_of(found))


def _required_by(name: str, extra: str) -> Iterator[tuple[str, str]]:
    """Yield what a package with an extra requires here: names, each alone and with every extra that is asked for."""
    found = _installed(name)
    for line in (found.requires if found else None) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield from ((canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras))


def _installed(name: str) -> Distribution | None:
    """Return an installed package; None for one that its metadata name and that is not installed here."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def licence_of(found: Distribution) -> str:
    """Return what a package says of its licence: an expression, else its classifiers, else the head of a text."""
    about = found.metadata
    expression = about.get_all("License-Expression")
    if expression:
        return expression[0]
    classifiers = [
        one.rpartition(" :: ")[2]
        for one in about.get_all("Classifier") or []
        if one.startswith("License ::") and one != "License :: OSI Approved"
    ]
    if classifiers:
        return ", ".join(classifiers)
    text = "".join(about.get_all("License") or []).strip() or _first_title(found)
    return text.splitlines()[0][:60] if text else "unknown"


def _first_title(found: Distribution) -> str:
    """Return the first line of the licence file that a package brings; empty without one."""
    files: list[PackagePath] = [one for one in found.files or [] if re.match(r"(LICEN[CS]E|COPYING)", one.name, re.I)]
    for file in files:
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if lines:
            return lines[0]
    return ""


def verdict(package: Package) -> str | None:
    """Return why a package may be used; None where that is to be looked at."""
    if package.name in LOOKED_AT:
        return LOOKED_AT[package.name]
    if package.name.startswith(("nvidia-", "cuda-")):
        return NVIDIA
    if PERMISSIVE.search(package.licence) and not COPYLEFT.search(package.licence):
        return "permissive"
    return None


if __name__ == "__main__":
    sys.exit(main())
