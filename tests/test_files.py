import os
from pathlib import Path
from typing import BinaryIO

import pytest

from psenet.files import write_atomically


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


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_file_gets_ordinary_permissions(tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", lambda file: None)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
