"""A finished run that all tests of the report read, and copies of it that they may damage."""

import shutil
from pathlib import Path

import pytest

from colours import export_weights_only, prune_net


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a small finished run; it must not be changed."""
    out = tmp_path_factory.mktemp("report") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psenet.pipeline.export_model", export_weights_only)
        prune_net(out, description={"model": "my.nets:colours", "data": "paint"}, command="psenet prune --data paint")
    return out


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
