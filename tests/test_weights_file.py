from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from psenet.errors import InputError
from psenet.weights_file import read_weights, write_weights

STATE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, 2], dtype=torch.int64),
    "c": torch.ones(4, dtype=torch.bfloat16),
    "scalar": torch.tensor(True),
}


def _assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path: Path):
    path = tmp_path / "deep" / "w.safetensors"
    write_weights(path, STATE, {"note": "ä text"})
    state, metadata = read_weights(path, advice="")
    _assert_equal(state, STATE)
    _assert_equal(load_file(path), STATE)
    assert metadata["note"] == "ä text"


def test_the_same_content_is_the_same_file(tmp_path: Path):
    for name in ("one", "other"):
        write_weights(tmp_path / name, STATE, {"z": "1", "a": "2", "psenet": "3"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_tied_tensors_and_views_become_plain_copies(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    tied = {"whole": whole, "again": whole, "view": whole.T[1:], "channels_last": torch.rand(2, 3, 4, 4)}
    tied["channels_last"] = tied["channels_last"].to(memory_format=torch.channels_last)
    write_weights(tmp_path / "w.safetensors", tied)
    _assert_equal(read_weights(tmp_path / "w.safetensors", advice="")[0], tied)


def test_no_tensors_are_a_file_too(tmp_path: Path):
    write_weights(tmp_path / "w.safetensors", {})
    assert read_weights(tmp_path / "w.safetensors", advice="")[0] == {}


def test_a_file_without_a_checksum_is_read(tmp_path: Path):
    save_file(STATE, tmp_path / "w.safetensors")
    _assert_equal(read_weights(tmp_path / "w.safetensors", advice="")[0], STATE)


def test_any_flipped_bit_of_the_tensors_and_any_cut_is_noticed(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    write_weights(path, STATE)
    whole = path.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(first, len(whole))]
    damaged += [whole[:size] for size in range(0, len(whole), 7)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"w\.safetensors is damaged \(.*\): ask for another"):
            read_weights(path, advice="ask for another")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="nothing.safetensors is damaged .*No such file"):
        read_weights(tmp_path / "nothing.safetensors", advice="")
