"""Keep a pruned module as two files, and rebuild it from them: `save_weights` and `load` are mirror images.

`weights.safetensors`
    Every entry of the module's `state_dict()`, under its own name and at its own shape. Tied tensors stand there under
    each of their names. The text of `widths.json` is in the header too, under the key `psenet`.

`widths.json`
    One JSON object, format 1; a detail that is not known is null::

        {"format": 1,
         "widths": {"conv1": 24, ...},      channels kept, by channel group
         "model": "timm:resnet18",          the original model, or null
         "input_shape": [3, 224, 224],      one sample, without the batch, or null
         "num_classes": 10,                 or null
         "in_channels": 3,                  or null
         "attributes": {"block": {"width": 24}, ...}}    numbers in the user's own modules that count channels

Shapes and attributes alone say how narrow each layer is, so rebuilding needs the original architecture and no trace.
Nothing is unpickled, and each file is replaced in one step.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from psenet.errors import InputError
from psenet.files import write_bytes
from psenet.slicing import Attributes, narrow_module
from psenet.weights_file import read_weights, write_weights
from psenet.widths import Widths

WEIGHTS_NAME = "weights.safetensors"
WIDTHS_NAME = "widths.json"
RUN_SUBFOLDER = "model"

_FORMAT = 1
_HEADER_KEY = "psenet"
_DETAILS = ("model", "input_shape", "num_classes", "in_channels", "attributes")
_MOST_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `widths.json` says of a pruned module."""

    widths: Widths
    """Channels kept, by channel group."""
    model: str | None = None
    """The original model, as given to the command line."""
    input_shape: tuple[int, ...] | None = None
    """Shape of one sample, without the batch."""
    num_classes: int | None = None
    in_channels: int | None = None
    attributes: Attributes = field(default_factory=dict)
    """By module path: attributes that count channels, at their narrow values (`psenet.slicing.narrow_attributes`)."""

    def __post_init__(self) -> None:
        problems = []
        if not _are_attributes(self.attributes):
            problems.append(f"attributes must be whole numbers or lists of them by module; got {self.attributes!r}")
        if not isinstance(self.widths, Widths):
            problems.append(f"widths must be psenet.Widths; got {type(self.widths).__name__}")
        if not (self.model is None or isinstance(self.model, str)):
            problems.append(f"model must be a string or None; got {self.model!r}")
        if self.input_shape is not None and not all(_is_count(size) for size in self.input_shape):
            problems.append(f"input_shape must be positive integers; got {list(self.input_shape)}")
        for name, value in (("num_classes", self.num_classes), ("in_channels", self.in_channels)):
            if not (value is None or _is_count(value)):
                problems.append(f"{name} must be a positive integer or None; got {value!r}")
        if problems:
            raise InputError("; ".join(problems))

    @classmethod
    def from_details(cls, widths: Widths, details: Mapping[str, object]) -> "Description":
        """Build a description from widths and any of its other fields.

        Raises:
            InputError: A key is unknown or a value is not of its kind.
        """
        unknown = [name for name in details if name not in _DETAILS]
        if unknown:
            raise InputError(f"unknown details {unknown}; known are {', '.join(_DETAILS)}")
        known = dict(details)
        shape = known.get("input_shape")
        if shape is not None:
            if not isinstance(shape, list | tuple):
                raise InputError(f"input_shape must be a list of positive integers; got {shape!r}")
            known["input_shape"] = tuple(shape)
        if known.get("attributes") is None:
            known.pop("attributes", None)
        return cls(widths=widths, **known)  # pyright: ignore[reportArgumentType]

    def to_json(self) -> str:
        """Return the text of `widths.json`."""
        shape = None if self.input_shape is None else list(self.input_shape)
        details = {**{name: getattr(self, name) for name in _DETAILS}, "input_shape": shape}
        return json.dumps({"format": _FORMAT, "widths": dict(self.widths), **details}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """Rebuild a description from `to_json`.

        Raises:
            InputError: The text is not such an object, or of another format.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON: {error}") from None
        if not isinstance(document, dict) or not isinstance(document.get("widths"), dict):
            raise InputError('not a JSON object with an object "widths"')
        if document.get("format") != _FORMAT:
            raise InputError(f"format {document.get('format')!r} is not known; this version reads format {_FORMAT}")
        details = {name: value for name, value in document.items() if name not in ("format", "widths")}
        return cls.from_details(Widths(document["widths"]), details)


def save_weights(
    module: nn.Module, folder: str | Path, *, widths: Widths, details: Mapping[str, object] | None = None
) -> tuple[Path, Path]:
    """Write `weights.safetensors` and `widths.json` into a folder, made if it is not there.

    Args:
        module: The plain module; unchanged.
        folder: Where to write; files of these names are replaced.
        widths: The channels it keeps.
        details: Any of `model`, `input_shape`, `num_classes`, `in_channels`, for whoever reads `widths.json`, and
            `attributes`, without which a module that has some cannot be rebuilt.

    Returns:
        The paths of the weights and of the widths.

    Raises:
        InputError: `folder` is not a folder, a detail is not of its kind, or the module's state holds more than
            tensors.
    """
    folder = Path(folder)
    text = Description.from_details(widths, details or {}).to_json()
    state: dict[str, object] = dict(module.state_dict())
    others = [f"{name} ({type(value).__name__})" for name, value in state.items() if not _is_tensor(value)]
    if others:
        raise InputError("only tensors can be saved; the module's state also holds " + _listed(others))
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} must be a folder to write the model into; it is a file")
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS_NAME, tensors, {_HEADER_KEY: text})
    write_bytes(folder / WIDTHS_NAME, text.encode())
    return folder / WEIGHTS_NAME, folder / WIDTHS_NAME


def load(path: str | Path, factory: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild the pruned module that `save_weights` wrote.

    Args:
        path: The folder with the two files, a run directory (they are in its `model/`), or the weights file alone.
        factory: Returns the original, full-width module, for example
            `lambda: timm.create_model("resnet18", num_classes=10)`. Its weights do not matter.

    Returns:
        The plain narrow module, in the training mode in which `factory` leaves its module.

    Raises:
        InputError: Files are missing, damaged or of two different exports, or `factory` makes another architecture.
    """
    weights_path, widths_path = _locate(Path(path))
    tensors, header = _read_weights(weights_path)
    description = None if header is None else _parse(header, weights_path)
    if widths_path is not None:
        beside = _read_description(widths_path)
        if description is not None and beside != description:
            raise InputError(f"{weights_path} and {widths_path} are of two different exports: export the model again")
        description = beside
    model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the factory for {weights_path} must return the full-width torch.nn.Module; got {type(model).__name__}"
        )
    problems = _mismatches(model.state_dict(), tensors)
    if problems:
        raise InputError(
            f"{weights_path} does not fit the module that the factory returns: {_listed(problems)}. "
            "The factory must build the original architecture, with the same number of classes"
        )
    attributes = {} if description is None else description.attributes
    _check_attributes(model, attributes, weights_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    module = narrow_module(model, shapes, attributes=attributes)
    module.load_state_dict(tensors, strict=True)
    _copy_constants(model, module)
    return module


def read_description(path: str | Path) -> Description:
    """Return what is known of a saved module without building it. Takes the `path` of `load`.

    Raises:
        InputError: Files are missing or damaged.
    """
    weights_path, widths_path = _locate(Path(path))
    if widths_path is not None:
        return _read_description(widths_path)
    header = _read_weights(weights_path)[1]
    if header is None:
        raise InputError(f"{weights_path} does not say its widths, and there is no {WIDTHS_NAME} beside it")
    return _parse(header, weights_path)


def _locate(path: Path) -> tuple[Path, Path | None]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{path} must be a folder or a .safetensors file")
        beside = path.with_name(WIDTHS_NAME)
        return path, beside if path.name == WEIGHTS_NAME and beside.is_file() else None
    if not path.is_dir():
        raise InputError(f"{path} does not exist: give the folder of an exported model, or a run directory")
    names = (WEIGHTS_NAME, WIDTHS_NAME)
    inside = path / RUN_SUBFOLDER
    folder = inside if inside.is_dir() and not any((path / name).is_file() for name in names) else path
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} must hold {WEIGHTS_NAME} and {WIDTHS_NAME}; missing: {', '.join(missing)}")
    return folder / WEIGHTS_NAME, folder / WIDTHS_NAME


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    state, header = read_weights(path, advice="export the model again")
    return state, header.get(_HEADER_KEY)


def _read_description(path: Path) -> Description:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: not UTF-8 ({error})") from None
    return _parse(text, path)


def _parse(text: str, path: Path) -> Description:
    try:
        return Description.from_json(text)
    except InputError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _mismatches(full: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"{name} is not in the file" for name in full if name not in saved]
    problems += [f"{name} is not in the module" for name in saved if name not in full]
    for name in full:
        if name not in saved:
            continue
        theirs, ours = tuple(full[name].shape), tuple(saved[name].shape)
        if len(theirs) != len(ours) or any(kept > size for kept, size in zip(ours, theirs, strict=True)):
            problems.append(f"{name} has shape {ours} in the file, which is no part of the module's {theirs}")
        if full[name].dtype != saved[name].dtype:
            problems.append(f"{name} is {saved[name].dtype} in the file and {full[name].dtype} in the module")
    return problems


def _check_attributes(model: nn.Module, attributes: Attributes, path: Path) -> None:
    """Make sure that only numbers that the modules have are replaced, by numbers of the same kind."""
    modules = dict(model.named_modules())
    problems = [
        f"{module}.{name}"
        for module, values in attributes.items()
        for name, value in values.items()
        if module not in modules or not _same_kind(vars(modules[module]).get(name), value)
    ]
    if problems:
        raise InputError(
            f"{path} sets numbers that the module which the factory returns does not have: {_listed(problems)}. "
            "The factory must build the original architecture"
        )


def _same_kind(old: object, new: object) -> bool:
    if isinstance(new, list | tuple):
        return isinstance(old, list | tuple) and len(old) == len(new) and all(_is_count(item) for item in old)
    return _is_count(old)


def _are_attributes(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(values, dict)
        and all(
            _is_count(new) or (isinstance(new, list | tuple) and all(_is_count(item) for item in new))
            for new in values.values()
        )
        for values in value.values()
    )


def _copy_constants(full: nn.Module, narrow: nn.Module) -> None:
    """Give the narrow module the buffers that no state dict holds (persistent=False), which the factory computed."""
    saved = full.state_dict()
    values = dict(full.named_buffers(remove_duplicate=False))
    for name, buffer in narrow.named_buffers(remove_duplicate=False):
        if name not in saved:
            buffer.copy_(values[name])


def _listed(items: list[str]) -> str:
    more = f"; and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return "; ".join(items[:_MOST_NAMED]) + more


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
