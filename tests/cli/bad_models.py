"""Mistakes in models, in the user's own code that makes them, and in files of weights."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from bad_input import MODEL, START, Case
from safetensors.torch import save_file

from psenet.models import digits_resnet

_NETS = """
import threading
import torch
from torch import nn

def net(num_classes):
    body = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(16, num_classes))

def nineteen_classes():
    return net(19)

def broken(num_classes):
    raise OSError("the shelf is empty")

def verbose(num_classes):
    raise OSError("no\\n" * 100)

def leaves(num_classes):
    raise SystemExit(3)

def no_net(num_classes):
    return "net"

def wants_more(num_classes, depth):
    return net(num_classes)

def no_convolutions(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def half(num_classes):
    return net(num_classes).half()

def frozen(num_classes):
    return net(num_classes).requires_grad_(False)

def not_finite(num_classes):
    model = net(num_classes)
    nn.init.constant_(model[0].weight, float("nan"))
    return model

class Own(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 16, 3), nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

class Locked(Own):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.lock = threading.Lock()

class DependsOnData(Own):
    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 0:
            y = y * 2
        return self.fc(y.mean((2, 3)))

class TwoHeads(Own):
    def forward(self, x):
        return super().forward(x), x

class Raises(Own):
    def forward(self, x):
        raise ValueError("not today")
"""
_FILES = {
    "nets_of_mine.py": _NETS,
    "broken_nets.py": "def (",
    "leaving.py": "import sys; sys.exit(5)",
}


class Executed:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def _model(name: str, spec: str, *says: str) -> Case:
    return Case(name=name, command=f"{START} --model '{spec}'", files=_FILES, says=says)


def _weights(name: str, file: str, write: Callable[[Path], object], *says: str) -> Case:
    return Case(name=name, command=f"{START} --weights {file}", prepare=lambda: write(Path(file)), says=says)


def _state() -> dict[str, torch.Tensor]:
    return digits_resnet().state_dict()


def _save_half(path: Path) -> None:
    save_file(_state(), path) if path.suffix == ".safetensors" else torch.save(_state(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


_UNREADABLE = "cannot be read as tensors only: "
_NEVER = "it is damaged, or holds objects, which are never unpickled; a state dict is wanted: torch.save("

MODELS = (
    _model(
        "a model without source",
        "resnet18",
        "a model is timm:NAME, torchvision:NAME or my.module:factory; got 'resnet18'",
    ),
    _model(
        "a source without model", "timm:", "a model is timm:NAME, torchvision:NAME or my.module:factory; got 'timm:'"
    ),
    _model("a path for a module", "../nets:net", "'../nets' is no module"),
    _model(
        "a file for a module", "nets_of_mine.py:net", "no module 'nets_of_mine.py'", "my.module:factory, without .py"
    ),
    _model(
        "a model that timm has not", "timm:resnet1888", "timm has no classification model 'resnet1888'; did you mean "
    ),
    _model(
        "a model that torchvision has not",
        "torchvision:resnet1888",
        "torchvision has no classification model",
        "did you mean",
    ),
    _model(
        "a model of colour images",
        "torchvision:resnet18",
        "torchvision models take images of 3 channels; the data has 1",
    ),
    _model(
        "no such module", "no_such_module:net", "no module 'no_such_module' in the current directory or the environment"
    ),
    _model("no such factory", "psenet.models:digits_resnt", "has no 'digits_resnt'; did you mean digits_resnet"),
    _model(
        "a module that cannot be read", "broken_nets:net", "importing broken_nets raised SyntaxError: invalid syntax"
    ),
    _model("a module that ends the program", "leaving:net", "importing leaving raised SystemExit: 5"),
    _model(
        "a module for a factory",
        "nets_of_mine:torch",
        "must be a function or class that makes the model; it is a module",
    ),
    _model(
        "a factory that raises",
        "nets_of_mine:broken",
        "nets_of_mine:broken(num_classes=10) raised OSError: the shelf is empty",
    ),
    _model(
        "a factory that raises a long text",
        "nets_of_mine:verbose",
        "raised OSError: no no",
        "... (cut; `psenet --debug",
    ),
    _model(
        "a factory that ends the program",
        "nets_of_mine:leaves",
        "nets_of_mine:leaves(num_classes=10) raised SystemExit: 3",
    ),
    _model("a factory that returns no module", "nets_of_mine:no_net", "must return a torch.nn.Module; it returned str"),
    _model(
        "a factory that wants more",
        "nets_of_mine:wants_more",
        "raised TypeError: ",
        "missing 1 required positional argument: 'depth'",
    ),
    _model(
        "a model of other classes",
        "nets_of_mine:nineteen_classes",
        "the data has 10 classes",
        "must be of shape (1, 10); got (1, 19)",
    ),
    _model("a model with two outputs", "nets_of_mine:TwoHeads", "(1, 10); got tuple", "give a model for these classes"),
    _model(
        "a model without convolutions",
        "nets_of_mine:no_convolutions",
        "no width that could vary. What froze it: 1: the model's",
    ),
    _model(
        "a model in half precision",
        "nets_of_mine:half",
        "the model refuses images of shape (1, 8, 8): RuntimeError: Input type",
    ),
    _model(
        "a model that refuses its images",
        "nets_of_mine:Raises",
        "the model refuses images of shape (1, 8, 8): ValueError: not",
    ),
    _model(
        "a model that cannot be trained", "nets_of_mine:frozen", "must have parameters to train", "requires_grad_(True)"
    ),
    _model(
        "a model that is not finite",
        "nets_of_mine:not_finite",
        "the model's weights must be finite",
        "infinity: 0.weight",
    ),
    _model(
        "a model that cannot be copied",
        "nets_of_mine:Locked",
        "the model cannot be copied",
        "and psenet works on copies",
    ),
    _model(
        "a model that depends on the data",
        "nets_of_mine:DependsOnData",
        "the model cannot be traced at ",
        "opaque=[...]",
    ),
    Case(
        name="published weights of a factory",
        command=f"{START} --pretrained",
        says=("published weights exist for timm and torchvision models only; got 'psenet.models:digits_resnet'",),
    ),
    Case(name="no weights", command=f"{START} --weights none.pth", says=("there is no weights file none.pth",)),
    Case(
        name="no weights to inspect",
        command=f"inspect {MODEL} --weights none.pth",
        says=("there is no weights file none.pth",),
    ),
    _weights(
        "weights in a file of another kind",
        "w.bin",
        Path.touch,
        "a weights file is .safetensors, .pth or .pt; got w.bin",
    ),
    _weights("weights that are a folder", "w.pth", Path.mkdir, "there is no weights file w.pth"),
    _weights("an empty weights file", "w.pth", Path.touch, f"the weights file w.pth {_UNREADABLE}EOFError"),
    _weights("a truncated .pth", "w.pth", _save_half, f"the weights file w.pth {_UNREADABLE}"),
    _weights("a truncated .safetensors", "w.safetensors", _save_half, f"w.safetensors {_UNREADABLE}SafetensorError"),
    _weights(
        "a web page for weights",
        "w.safetensors",
        lambda path: path.write_text("<html>"),
        f"w.safetensors {_UNREADABLE}",
    ),
    _weights(
        "a pickle for weights",
        "w.pth",
        lambda path: path.write_bytes(pickle.dumps(Executed(), protocol=2)),
        f"w.pth {_UNREADABLE}{_NEVER}",
    ),
    _weights(
        "weights with an object",
        "w.pt",
        lambda path: torch.save({"a": Executed()}, path),
        f"w.pt {_UNREADABLE}{_NEVER}",
    ),
    _weights(
        "old weights with an object",
        "w.pth",
        lambda path: torch.save({"a": Executed()}, path, _use_new_zipfile_serialization=False),
        f"w.pth {_UNREADABLE}{_NEVER}",
    ),
    _weights(
        "a whole model for weights",
        "w.pth",
        lambda path: torch.save(digits_resnet(), path),
        f"w.pth {_UNREADABLE}{_NEVER}",
    ),
    _weights(
        "numbers for weights",
        "w.pth",
        lambda path: torch.save({"a": 3}, path),
        "w.pth must hold a state dict: tensors by name",
    ),
    _weights(
        "weights of other classes",
        "w.safetensors",
        lambda path: save_file(digits_resnet(num_classes=7).state_dict(), path),
        "w.safetensors do not fit the model. other shape: fc.weight is (7, 64), the model has (10, 64)",
    ),
    _weights(
        "weights of another model",
        "w.safetensors",
        lambda path: save_file({"extra": torch.zeros(1)}, path),
        "do not fit the model. missing: conv1.weight; ",
        "not in the model: extra",
    ),
    _weights(
        "weights rounded to integers",
        "w.safetensors",
        lambda path: save_file({name: tensor.int() for name, tensor in _state().items()}, path),
        "other type: conv1.weight is torch.int32, the model has torch.float32",
    ),
    _weights(
        "weights that are not finite",
        "w.safetensors",
        lambda path: save_file({**_state(), "fc.bias": torch.full((10,), float("inf"))}, path),
        "do not fit the model. NaN or infinite: fc.bias",
    ),
)
