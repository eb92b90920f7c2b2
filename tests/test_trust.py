"""What psenet never does: run what a file holds, listen, call home, or tell a secret."""

import ast
import contextlib
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import psenet
from colours import prune_net
from psenet import History, InputError, Prior
from psenet.artifact import load
from psenet.data import load_data
from psenet.latency_model import LatencyModel
from psenet.space import WidthSpace

SOURCES = Path(psenet.__file__).parent
BUILTIN = {"eval", "exec", "compile", "__import__", "open_code"}
DOTTED = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "np.load", "torch.load", "yaml.load", "yaml.unsafe_load"),
    *("joblib.load", "dill.loads", "shelve.open", "marshal.loads", "torch.hub.load", "torch.jit.load"),
    *("os.system", "os.popen", "subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"),
    *("socket.socket", "socket.create_connection", "socket.create_server", "requests.get", "requests.post"),
}
ANYWHERE = {
    *("import_module", "run_module", "run_path", "extractall", "unpack_archive", "urlopen", "urlretrieve"),
    *("serve_forever", "load_state_dict_from_url"),
}
ALLOWED = {
    ("models.py", "import_module"): "the factory that the user names",
    ("export.py", "import_module"): "onnxruntime, by a fixed name",
    ("environment.py", "subprocess.run"): "git and the compiler, by fixed arguments",
    ("workers.py", "pickle.loads"): "from this program's own processes, over a pipe",
    ("history.py", "np.load"): "with allow_pickle=False",
    ("training/checkpoint.py", "torch.load"): "with weights_only=True",
    ("yaml_text.py", "yaml.load"): "with a loader that makes plain values only",
}
"""Every risky call there is, and why it may be."""
NEEDED = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield file, name and call of every risky call in the package."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                last = name.rpartition(".")[2]
                found = name if name in BUILTIN | DOTTED else last if last in ANYWHERE else None
                if found is not None:
                    yield path.relative_to(SOURCES).as_posix(), found, node


def test_every_call_that_could_run_code_is_known():
    found = {(file, name) for file, name, _ in _calls()}
    assert found == set(ALLOWED)
    for _, name, call in _calls():
        if name in NEEDED:
            keyword, value = NEEDED[name]
            given = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg == keyword}
            assert given == {keyword: value}
        if name == "yaml.load":
            assert [ast.unparse(one.value) for one in call.keywords] == ["_Loader"]


# Files that would run code if they were unpickled; the command line's are in the tables of tests/cli ------------------


class Executed:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    return psenet.trace(net.eval(), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("kind", ["a pickle", "an array of objects", "a checkpoint"])
@pytest.mark.parametrize("reader", ["history", "prior", "latency", "weights"])
def test_no_file_is_unpickled(reader: str, kind: str, space: WidthSpace, tmp_path: Path):
    path, mark = tmp_path / ("weights.safetensors" if reader == "weights" else "file.npz"), tmp_path / "executed"
    thing = Executed(mark)
    with path.open("wb") as file:
        if kind == "a pickle":
            pickle.dump(thing, file)
        elif kind == "a checkpoint":
            torch.save({"a": thing}, file)
        else:
            np.savez(file, kind=np.array([thing], dtype=object))
    readers = {
        "history": lambda: History.load(path, space),
        "prior": lambda: Prior.load(path, space),
        "latency": lambda: LatencyModel.load(path, space),
        "weights": lambda: load(path, lambda: nn.Linear(2, 2)),
    }
    with pytest.raises(InputError, match=path.name):
        readers[reader]()
    assert not mark.exists()


def test_a_data_set_whose_files_are_pickles_is_checked_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, mark = tmp_path / "cifar-10-batches-py", tmp_path / "executed"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Executed(mark)))
    with no_sockets(monkeypatch), pytest.raises(InputError, match="could not open 'torch/cifar10'"):
        load_data(f"torch/cifar10@{tmp_path}")
    assert not mark.exists()


# The network ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuse every connection and every listener; yields what was tried."""
    tried: list[str] = []

    def refuse(_socket: socket.socket, address: object = None, *_: object) -> None:
        tried.append(str(address))
        raise OSError("no network here")

    with monkeypatch.context() as patch:
        for name in ("connect", "connect_ex", "bind", "listen"):
            patch.setattr(socket.socket, name, refuse)
        yield tried


def test_importing_the_package_opens_no_socket():
    code = """
import socket
def refuse(*_):
    raise SystemExit("a socket was used")
for name in ("connect", "connect_ex", "bind", "listen"):
    setattr(socket.socket, name, refuse)
import psenet, psenet.cli.main
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_run_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with no_sockets(monkeypatch) as tried:
        prune_net(tmp_path / "run")
    assert tried == []
    assert (tmp_path / "run" / "report.html").exists()
