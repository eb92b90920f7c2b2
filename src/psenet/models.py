"""Where models come from: timm, torchvision or a factory of the user's; and two small residual nets of our own.

Legend: B batch, C channels, H height, W width.
"""

import difflib
import importlib
import inspect
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from psenet.errors import InputError, first_line

_MAX_LISTED = 10
_TRUSTED = ("timm", "torchvision", "psenet.models")
"""Where a model may come from without the user's naming it: a recipe in a folder may be a stranger's."""


def build_model(
    spec: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    pretrained: bool = False,
    weights: Path | None = None,
) -> nn.Module:
    """Build the model that a specification names, with trained weights where asked.

    Args:
        spec: `timm:NAME`, `torchvision:NAME` or `my.module:factory`. The current directory is importable. A factory
            is called with `num_classes` and `in_channels` as far as its signature accepts them.
        num_classes: Outputs of the model.
        in_channels: Channels of its input images.
        pretrained: Load the weights that timm or torchvision publish for the name (downloads them).
        weights: A `.safetensors`, `.pth` or `.pt` file with the model's state dict; never unpickles code.

    Raises:
        InputError: The specification, the model or the weights cannot be used; the message says why.
    """
    source, colon, name = spec.partition(":")
    if not (source and colon and name):
        raise InputError(f"a model is timm:NAME, torchvision:NAME or my.module:factory; got {spec!r}")
    if num_classes < 1 or in_channels < 1:
        raise InputError(f"a model needs at least one class and one input channel; got {num_classes} and {in_channels}")
    if pretrained and weights is not None:
        raise InputError("pretrained weights and a weights file exclude each other; give one of them")
    if source == "timm":
        model = _build_timm(name, num_classes, in_channels, pretrained)
    elif source == "torchvision":
        model = _build_torchvision(name, num_classes, in_channels, pretrained)
    else:
        if pretrained:
            raise InputError(f"published weights exist for timm and torchvision models only; got {spec!r}: give a file")
        model = _build_from_factory(source, name, num_classes, in_channels)
    if weights is not None:
        _load_weights(model, Path(weights))
    return model


def check_trusted(spec: str, named: str | None, what: str, *, option: str = "--factory") -> None:
    """Make sure that a module is imported only if the user names it.

    Args:
        spec: The model as a file in a run directory says.
        named: The model as the user says, if at all.
        what: What holds the file, for the message.
        option: What the user names a model with.

    Raises:
        InputError: The model is a factory that the user did not name.
    """
    if spec.partition(":")[0] not in _TRUSTED and spec != named:
        raise InputError(
            f"{what} is of {spec!r}, which its recipe alone is not trusted to import; name it, if you trust "
            f"it: {option} {spec}"
        )


def _build_timm(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise InputError(_unknown_model("timm", name, timm.list_models()))
    if pretrained and not timm.models.is_model_pretrained(name):
        raise InputError(f"timm publishes no weights for {name!r}; leave pretrained out, or give a weights file")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(_build_failure(f"timm:{name}", error, pretrained)) from error


def _build_torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise InputError(_unknown_model("torchvision", name, names))
    if in_channels != 3:
        raise InputError(
            f"torchvision models take images of 3 channels; the data has {in_channels}: use a timm model or a factory"
        )
    if pretrained:
        published = len(models.get_model_weights(name)["DEFAULT"].meta["categories"])
        if published != num_classes:
            raise InputError(
                f"the published weights of torchvision:{name} are for {published} classes and the data has "
                f"{num_classes}; use the timm model of that name (its head is replaced), or give a weights file"
            )
    try:
        return models.get_model(name, weights="DEFAULT" if pretrained else None, num_classes=num_classes)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(_build_failure(f"torchvision:{name}", error, pretrained)) from error


def _unknown_model(source: str, name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name.partition(".")[0], names, n=5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"{source} has no classification model {name!r}{hint}"


def _build_failure(spec: str, error: Exception, pretrained: bool) -> str:
    if not pretrained:
        return f"{spec} could not be built: {error}"
    return (
        f"the published weights of {spec} could not be loaded ({type(error).__name__}: {error}). Without a network, "
        "fetch the file elsewhere and give it with --weights FILE"
    )


def _build_from_factory(module_name: str, name: str, num_classes: int, in_channels: int) -> nn.Module:
    spec = f"{module_name}:{name}"
    with _current_directory_importable():
        factory = _find_factory(module_name, name)
        arguments = _accepted(factory, {"num_classes": num_classes, "in_channels": in_channels})
        # The factory is the user's code and may raise anything; the cause stays chained.
        try:
            model = factory(**arguments)
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{key}={value}" for key, value in arguments.items())
            raise InputError(f"{spec}({given}) raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} must return a torch.nn.Module; it returned {type(model).__name__}")
    return model


def _find_factory(module_name: str, name: str) -> Callable[..., object]:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(f"a model is timm:NAME, torchvision:NAME or my.module:factory; {module_name!r} is no module")
    # Importing runs the user's code, which may raise anything; the cause stays chained.
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            hint = ", without .py" if module_name.endswith(".py") else ""
            raise InputError(
                f"no module {module_name!r} in the current directory or the environment; "
                f"a model is timm:NAME, torchvision:NAME or my.module:factory{hint}"
            ) from error
        raise InputError(f"importing {module_name} needs the package {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {module_name} raised {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if factory is None:
        close = difflib.get_close_matches(name, dir(module), n=5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise InputError(f"the module {module_name} ({module.__file__}) has no {name!r}{hint}")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(
            f"{module_name}:{name} must be a function or class that makes the model; it is a {type(factory).__name__}"
        )
    return factory


def _accepted(factory: Callable[..., object], arguments: Mapping[str, int]) -> dict[str, int]:
    """Return those of the arguments that the factory's signature takes by keyword."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # Some callables written in C have no signature.
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    by_keyword = {
        name for name, parameter in parameters.items() if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
    }
    return {name: value for name, value in arguments.items() if name in by_keyword}


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    directory = str(Path.cwd())
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(directory)


def _load_weights(model: nn.Module, path: Path) -> None:
    """Copy a state dict from a file into the model; every name and shape must match."""
    state = _read_state(path)
    wanted = model.state_dict()
    # Files older than PyTorch 0.4.1 have no batch counters; they change nothing in evaluation.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    rounded = [
        f"{name} is {state[name].dtype}, the model has {tensor.dtype}"
        for name, tensor in wanted.items()
        if name in state and tensor.is_floating_point() and not state[name].is_floating_point()
    ]
    infinite = [name for name, tensor in state.items() if name in wanted and not torch.isfinite(tensor).all()]
    found = {"missing": missing, "not in the model": unexpected, "other shape": shapes, "other type": rounded}
    found["NaN or infinite"] = infinite
    problems = [f"{title}: {_listed(items)}" for title, items in found.items() if items]
    if problems:
        raise InputError(f"the weights in {path} do not fit the model. {'. '.join(problems)}")
    model.load_state_dict({**wanted, **state})


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise InputError(f"a weights file is .safetensors, .pth or .pt; got {path}")
    if not path.is_file():
        raise InputError(f"there is no weights file {path}")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError) as error:
        # torch's own words, and timm's, advise to unpickle it all the same.
        holds_objects = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it is damaged, or holds objects, which are never unpickled" if holds_objects else first_line(error)
        raise InputError(
            f"the weights file {path} cannot be read as tensors only: {reason}; a state dict is wanted: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"the weights file {path} must hold a state dict: tensors by name")
    return dict(state)


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return "; ".join(items[:_MAX_LISTED]) + more


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, channels, ceil(H / stride), ceil(W / stride))."""
        y_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        return self.relu(self.bn2(self.conv2(y_BCHW)) + self.shortcut(x_BCHW))


class SmallResNet(nn.Module):
    """A residual net for small images: a 3x3 stem, stages of basic blocks, global average pooling, a linear layer.

    Args:
        stage_channels: Channels of each stage; the stem has those of the first, later stages halve the resolution.
        blocks_per_stage: Basic blocks in each stage.
        num_classes: Outputs.
        in_channels: Channels of the input images.
    """

    def __init__(
        self, stage_channels: tuple[int, ...], blocks_per_stage: int, *, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        channels = stage_channels[0]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        stages = []
        for index, width in enumerate(stage_channels):
            blocks = []
            for block in range(blocks_per_stage):
                blocks.append(BasicBlock(channels, width, stride=2 if index > 0 and block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the logits, shape (B, num_classes)."""
        y_BCHW = self.stages(self.relu(self.bn1(self.conv1(x_BCHW))))
        return self.fc(self.pool(y_BCHW).flatten(1))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> SmallResNet:
    """Return the CIFAR ResNet-20 of He et al. (arXiv 1512.03385, section 4.2), with 1x1-convolution shortcuts.

    Example:
        >>> sum(parameter.numel() for parameter in resnet20().parameters())
        272474
    """
    return SmallResNet((16, 32, 64), 3, num_classes=num_classes, in_channels=in_channels)


def digits_resnet(num_classes: int = 10, in_channels: int = 1) -> SmallResNet:
    """Return a small residual net for 8x8 images of digits: two stages of two blocks, 32 and 64 channels."""
    return SmallResNet((32, 64), 2, num_classes=num_classes, in_channels=in_channels)
