import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from psenet.files import remove_unfinished, write_atomically


def test_content_replaces_the_old_and_nothing_is_left_beside(tmp_path: Path):
    path = tmp_path / "deep" / "file.bin"
    for content in (b"old", b"new"):

        def write(file: BinaryIO, content: bytes = content) -> None:
            file.write(content)

        write_atomically(path, write)
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.bin"]


def test_a_failing_write_leaves_the_old_file_alone(tmp_path: Path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_the_old_content_can_be_kept(tmp_path: Path):
    path, before = tmp_path / "file.bin", tmp_path / "before.bin"
    for content in (b"1", b"2", b"3"):
        write_atomically(path, lambda file, content=content: file.write(content), keep=before)
    assert (path.read_bytes(), before.read_bytes()) == (b"3", b"2")


def test_a_failing_write_keeps_both(tmp_path: Path):
    path, before = tmp_path / "file.bin", tmp_path / "before.bin"
    path.write_bytes(b"2")
    before.write_bytes(b"1")

    def fail(file: BinaryIO) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail, keep=before)
    assert (path.read_bytes(), before.read_bytes()) == (b"2", b"1")


def test_what_a_killed_write_left_is_removed(tmp_path: Path):
    script = f"""
import os, signal
from psenet.files import remove_unfinished, write_atomically
write_atomically({str(tmp_path / "deep" / "file.bin")!r}, lambda file: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode != 0
    (tmp_path / "other.part").write_bytes(b"not ours")
    assert len(os.listdir(tmp_path / "deep")) == 1
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path / "deep") == [] and (tmp_path / "other.part").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_file_gets_ordinary_permissions(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", lambda file: None)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
