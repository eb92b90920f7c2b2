"""Licences of what psenet needs: every one is permissive, or has been looked at."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "licences.py"


@pytest.fixture(scope="module")
def licences() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_every_package_may_be_used():
    ended = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    names = [line.split()[0] for line in ended.stdout.splitlines()]
    # Its own, theirs (sympy is torch's, sqlalchemy optuna's), and none of the developers' alone.
    assert {"torch", "timm", "optuna", "onnx", "sympy", "sqlalchemy", "markupsafe"} <= set(names)
    assert not {"psenet", "ruff", "pytest", "mkdocs-material"} & set(names)
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("licence", "is_fine"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND 0BSD AND Zlib", True),
        ("Apache Software License", True),
        ("GPL-3.0-or-later", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("MIT AND MPL-2.0", False),
        ("LicenseRef-Proprietary", False),
        ("unknown", False),
    ],
)
def test_a_licence_is_judged_by_its_name(licence: str, is_fine: bool, licences: dict[str, Any]):
    package = licences["Package"]("thing", "1.0", licence)
    assert (licences["verdict"](package) is not None) == is_fine


def test_a_package_that_was_looked_at_has_a_reason(licences: dict[str, Any]):
    assert all(len(reason) > 20 for reason in licences["LOOKED_AT"].values())
    assert licences["verdict"](licences["Package"]("tqdm", "4", "MPL-2.0 AND MIT")) is not None


def test_what_is_not_known_fails_with_its_name(licences: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    unknown = licences["Package"]("thing", "1.0", "unknown")
    names = licences["main"].__globals__
    names["required"] = lambda root: [unknown]
    assert licences["main"]() == 1
    assert capsys.readouterr().err == "thing: its licence 'unknown' is not known to be permissive: look at it\n"
