"""Storages that cannot be opened: named with what to do, and without their passwords."""

import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import psenet
from psenet import Budget, InputError
from psenet.masking import told_without, without_password, without_passwords
from psenet.space import WidthSpace


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    return psenet.trace(net.eval(), torch.zeros(1, 1, 8, 8))


def _search(space: WidthSpace, storage: Any) -> None:
    psenet.search(space, Budget(macs="80%"), lambda widths: 1.0, num_evaluations=1, storage=storage)


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ("folder", "the storage 'folder' cannot be opened .IsADirectoryError.*give another path, or delete it"),
        ("garbage", "the storage 'garbage' cannot be opened .ValueError: .*no record of an Optuna journal"),
        ("garbage/below", "the storage 'garbage/below' cannot be opened .*: give another path"),
        ("sqlite:///folder", "give a file path or a URL such as sqlite:///study.db: .*unable to open database file"),
        ("sqlite:///no/such/folder/study.db", "unable to open database file"),
        ("sqlite:///garbage", "the storage 'sqlite:///garbage' cannot be opened; .*file is not a database"),
        ("nosuch://me@host/db", "the storage 'nosuch://me@host/db' cannot be opened; .*Can't load plugin"),
        ("://", "the storage '://' cannot be opened; give a file path or a URL"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named(
    storage: str, says: str, space: WidthSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("garbage").write_text("garbage" * 20)
    with pytest.raises(InputError, match=says):
        _search(space, storage)
    assert Path("garbage").read_text() == "garbage" * 20


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:s3cr@et@host:1/db", "postgresql://me:***@host:1/db"),
        ("postgresql://host/db?password=s3cret&sslmode=off", "postgresql://host/db?password=***&sslmode=***"),
        ("mysql://me:s3cret@host/db", "mysql://me:***@host/db"),
        ("nosuch://me:s3cret@host/db", "nosuch://me:***@host/db"),
        ("postgresql://me:s3cret@host:no-port/db", "postgresql://me:***@host:no-port/db"),
    ],
)
def test_no_password_is_shown_in_a_message_or_a_traceback(url: str, shown: str, space: WidthSpace):
    with pytest.raises(InputError) as raised:
        _search(space, url)
    told = "".join(traceback.format_exception(raised.value))
    assert f"the storage {shown!r} cannot be opened" in told
    # pytest's own frames hold the URL; what is printed does not.
    assert "s3cret" not in told and "s3cr@et" not in told


def test_a_driver_that_is_not_installed_is_named(space: WidthSpace, monkeypatch: pytest.MonkeyPatch):
    # SQLAlchemy's choice among them depends on its version.
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match="its driver, the package 'psycopg2?', is not installed"):
        _search(space, "postgresql://me@host/db")


def test_what_a_driver_repeats_of_a_url_is_masked():
    url = "postgresql://me:s3%21cret@host/db"
    assert told_without(url, ValueError(f"no such host in {url}")) == "no such host in postgresql://me:***@host/db"
    assert told_without(url, ValueError("login of me with s3!cret failed")) == "ValueError"
    assert without_password(Path("a:b@c")) == "a:b@c"
    assert (
        without_passwords("at https://me:pw@host/x?api_key=1 and ?size=3")
        == "at https://me:***@host/x?api_key=*** and ?size=3"
    )
