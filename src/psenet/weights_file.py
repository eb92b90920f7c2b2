"""Weights as a safetensors file that notices damage: a checksum of all tensors stands in its header."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from psenet.errors import InputError
from psenet.files import write_bytes

_CHECKSUM = "sha256"
_SIZE = 8
"""Bytes that say how long the header is, at the beginning of the file."""


def write_weights(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, atomically; tied tensors and views as plain copies of their own.

    Args:
        path: The file.
        state: Tensors of any device.
        metadata: Texts for the header.
    """
    from safetensors.torch import save

    # safetensors takes neither shared memory nor strides.
    plain = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    content = save(plain)
    texts = {**(metadata or {}), _CHECKSUM: _checksum(content)}
    write_bytes(path, _with_texts(content, texts))


def read_weights(path: Path, *, advice: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a file, on the CPU, and the texts of its header.

    Args:
        path: A file of `write_weights`, or any safetensors file: without a checksum none is compared.
        advice: What to do about a damaged file, for the error.

    Raises:
        InputError: The file cannot be read, or differs from what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(_SIZE), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            metadata = json.loads(file.read(size)).get("__metadata__", {})
            checksum = hashlib.file_digest(file, _CHECKSUM).hexdigest()
        if metadata.get(_CHECKSUM, checksum) != checksum:
            raise ValueError("its checksum is another than when it was written")
        return load_file(path), metadata
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): {advice}") from error


def _header(content: bytes) -> dict[str, dict[str, str]]:
    return json.loads(content[_SIZE : _first_byte(content)])


def _with_texts(content: bytes, texts: Mapping[str, str]) -> bytes:
    """Return a file with texts in its header; safetensors itself would put several in an order of chance."""
    header = {"__metadata__": dict(sorted(texts.items())), **_header(content)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _SIZE)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(_SIZE, "little") + text + content[_first_byte(content) :]


def _first_byte(content: bytes) -> int:
    """Return where the header ends."""
    return _SIZE + int.from_bytes(content[:_SIZE], "little")


def _checksum(content: bytes) -> str:
    """Return the checksum of what follows the header."""
    return hashlib.sha256(memoryview(content)[_first_byte(content) :]).hexdigest()
