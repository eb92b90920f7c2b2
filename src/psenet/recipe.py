"""The recipe of a run: everything it is asked to do, from one YAML file, a template and the command line.

A recipe's top level holds `model`, `data`, `budget`, `report`, and the settings of `psenet.config.PruneConfig` by their
names. What is not given keeps its default; later sources win: template, file, command line.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from psenet.budget import Budget
from psenet.config import PruneConfig
from psenet.errors import InputError
from psenet.report.money import ReturnFigures
from psenet.report.text import Language
from psenet.yaml_text import Document, Key, read_yaml

_MOST = 2**31 - 1
"""Of what counts images or pixels."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which network is pruned."""

    name: str
    """timm:NAME, torchvision:NAME or my.module:factory."""
    weights: str | None = None
    """File with its trained weights (.safetensors, .pth, .pt); it is then the baseline as it comes."""
    pretrained: bool = False
    """Take the weights that timm or torchvision publish for it."""

    def __post_init__(self) -> None:
        if self.pretrained and self.weights is not None:
            raise InputError("pretrained weights and a weights file exclude each other; give one of them")


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """The images it is trained, scored and tested on."""

    source: str
    """`digits`, an image folder, or a name of timm's dataset factory such as torch/cifar10."""
    image_size: int | None = None
    """Height and width in pixels; derived from the images if not given."""
    batch_size: int = 128
    """Images in a training step."""
    max_train_images: int | None = None
    """Train on so many images only."""
    skip_unreadable: bool = False
    """Leave broken images out, with a warning, instead of refusing."""

    def __post_init__(self) -> None:
        least = {"image_size": 8, "batch_size": 2, "max_train_images": 1}
        problems = [
            f"{name} must be at least {least[name]} and at most {_MOST}; got {value}"
            for name in least
            if (value := getattr(self, name)) is not None and not least[name] <= value <= _MOST
        ]
        if not self.source.strip():
            problems.append(f"source must name the data: `digits`, a folder or a data set; got {self.source!r}")
        if problems:
            raise InputError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class ReportChoice(ReturnFigures):
    """What the report says beside the run's own figures."""

    language: Language = "en"
    """en or ja."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run is asked to do."""

    model: ModelChoice
    data: DataChoice
    budget: Budget
    """What the pruned net may cost: amounts (300M, 4MB, 4ms) or shares of the full model (50%), kept together."""
    settings: PruneConfig = field(default_factory=PruneConfig)
    report: ReportChoice = field(default_factory=ReportChoice)

    def prune_config(self) -> PruneConfig:
        """Return the settings; a model that brings weights is trained."""
        return replace(self.settings, trained=self.model.pretrained or self.model.weights is not None)

    def as_dict(self) -> dict[str, Any]:
        """Return what a YAML file of this recipe holds."""
        settings = _plain(self.settings)
        budget = {name: value for name, value in vars(self.budget).items() if value is not None}
        return {
            "model": asdict(self.model),
            "data": asdict(self.data),
            "budget": budget,
            **settings,
            "report": asdict(self.report),
        }


SECTIONS: Mapping[str, type] = {"model": ModelChoice, "data": DataChoice, "budget": Budget, "report": ReportChoice}
"""The top-level names that are not settings of `PruneConfig`."""

_SHORT: dict[str, Any] = {
    "data": {"max_train_images": 20_000},
    "baseline": {"epochs": 10},
    "supernet": {"epochs": 10},
    "finetune": {"epochs": 3},
    "num_evaluations": 50,
}
_LONG: dict[str, Any] = {
    "baseline": {"epochs": 100},
    "supernet": {"epochs": 100},
    "finetune": {"epochs": 30, "distill_weight": 0.5},
    "num_evaluations": 300,
    "num_front_evaluations": 60,
}
TEMPLATES: Mapping[str, Mapping[str, Any]] = {"pilot": _SHORT, "full": _LONG}
"""What differs from the defaults: a pilot answers within hours whether pruning is worth a full run."""


@dataclass(frozen=True)
class Override:
    """A value from the command line."""

    key: Key
    value: Any
    option: str
    """How the user gave it, for messages: `--macs`, `--set data.batch_size`."""


def read_recipe(path: Path | None = None, *, template: str | None = None, overrides: Sequence[Override] = ()) -> Recipe:
    """Put a recipe together and check it.

    Args:
        path: The YAML file, if any.
        template: A name of `TEMPLATES`, if any.
        overrides: What the command line says.

    Raises:
        InputError: The file cannot be read, or values are unknown, missing, of a wrong type, out of range or
            contradict each other; all are named, each with the line or the option it comes from.
    """
    if template is not None and template not in TEMPLATES:
        raise InputError(f"template must be one of {', '.join(TEMPLATES)}; got {template!r}")
    document = Document({}, {}) if path is None else read_yaml(path)
    values: dict[str, Any] = _merged(TEMPLATES[template] if template else {}, document.values)
    for override in overrides:
        values = _merged(values, _nested(override.key, override.value))
    return _checked(values, _Places(path, document.lines, overrides))


def recipe_defaults() -> dict[str, Any]:
    """Return the default of every value of a recipe, nested as in its file; None where a value must be given."""
    sections = {
        name: {part.name: None if part.default is MISSING else part.default for part in fields(kind)}
        for name, kind in SECTIONS.items()
        if name != "report"
    }
    settings = _plain(PruneConfig())
    return {**sections, **settings, "report": asdict(ReportChoice())}


@dataclass(frozen=True)
class _Places:
    """Knows where a value came from."""

    path: Path | None
    lines: Mapping[Key, int]
    overrides: Sequence[Override]

    def __call__(self, key: Key) -> str:
        """Return the place of a value, or of the innermost section that holds it, ready to stand before a message."""
        for override in reversed(self.overrides):
            if override.key == key:
                return f"{override.option}: "
        for length in range(len(key), 0, -1):
            line = self.lines.get(key[:length])
            if line is not None:
                return f"{self.path}:{line}: "
        inside = [override for override in self.overrides if override.key[: len(key)] == key]
        if inside:
            return f"{inside[-1].option}: "
        return "" if self.path is None else f"{self.path}: "


def _checked(values: Mapping[str, Any], places: _Places) -> Recipe:
    problems = [*_unknown(values, places), *_numbers_that_are_none(values, places)]
    parts: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        given = values.get(name)
        section = {} if given is None else given
        parts[name] = _valid(name, kind, _known(section, kind), places, problems)
    settings = {name: value for name, value in values.items() if name in _kinds() and name not in SECTIONS}
    parts["settings"] = _valid("", PruneConfig, _with_defaults(settings), places, problems)
    if problems:
        raise InputError("\n  ".join(["the recipe cannot be used:", *dict.fromkeys(problems)]))
    return Recipe(**parts)


def _unknown(values: Mapping[str, Any], places: _Places) -> Iterator[str]:
    """Yield a message for every name that a recipe does not have."""
    kinds = _kinds()
    for name, value in values.items():
        if name == "trained":
            yield f"{places((name,))}trained follows from the model's weights; leave it out"
        elif name not in kinds:
            yield f"{places((str(name),))}there is no {name!r}{_meant(name, kinds)}"
        elif is_dataclass(kinds[name]) and isinstance(value, Mapping):
            known = [part.name for part in fields(kinds[name])]
            for inner in value:
                if inner not in known:
                    yield f"{places((name, str(inner)))}there is no {inner!r} in {name!r}{_meant(str(inner), known)}"


def _numbers_that_are_none(values: Mapping[str, Any], places: _Places) -> Iterator[str]:
    """Yield a message for every `true` or `false` in a number's place, where Python would read it as 1 or 0."""
    kinds = _kinds()
    for name, value in values.items():
        if name not in kinds:
            continue
        section, hints = (value, get_type_hints(kinds[name])) if is_dataclass(kinds[name]) else ({name: value}, kinds)
        prefix: Key = (name,) if is_dataclass(kinds[name]) else ()
        for part, inner in section.items() if isinstance(section, Mapping) else ():
            expected = hints.get(part)
            if isinstance(inner, bool) and {int, float} & {expected, *get_args(expected)}:
                key = (*prefix, str(part))
                yield f"{places(key)}{'.'.join(key)}: must be a number; got {str(inner).lower()}"


def _meant(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    everywhere = [".".join(key) for key in _keys() if key[-1] == name]
    close = everywhere or difflib.get_close_matches(str(name), list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"


def _valid(name: str, kind: type, values: Any, places: _Places, problems: list[str]) -> Any:
    """Return the values as their dataclass, or None and more problems."""
    from pydantic import TypeAdapter, ValidationError

    prefix: Key = (name,) if name else ()
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        told: dict[Key, list[Any]] = {}
        for found in error.errors(include_url=False):
            key = (*prefix, *(str(part) for part in found["loc"] if not isinstance(part, int)))
            told.setdefault(_shortest_known(key), []).append(found)
        problems += [f"{places(key)}{_said(key, found)}" for key, found in told.items()]
        return None


_OURS = {
    "tuple_type": "must be a list, such as [stem, 'layer4.*']",
    "dataclass_type": "must be a mapping of names to values",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}
"""What pydantic says in Python's words, by its type of error."""


def _said(key: Key, errors: Sequence[Any]) -> str:
    """Return what is wrong with a value, in our words; what may be a number or a text has an error for each."""
    where, found = ".".join(key), errors[0]
    if len(errors) > 1:
        return f"{where}: must be a finite number or a text such as 50%; got {found['input']!r}"
    if found["type"] == "missing":
        return f"{where} must be given"
    message: str = _OURS.get(found["type"]) or found["msg"].removeprefix("Value error, ")
    if found["type"] == "value_error":
        return message if where.split(".")[0] in message else f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]}; got {found['input']!r}"


def _shortest_known(key: Key) -> Key:
    """Return a place without what pydantic adds to it, such as the members of a union."""
    known = _keys()
    for length in range(len(key), 0, -1):
        if key[:length] in known:
            return key[:length]
    return key[:1]


def _known(section: Any, kind: type) -> Any:
    """Return a section without unknown names, which are told apart; what is no mapping goes to the check as it is."""
    if not isinstance(section, Mapping):
        return section
    names = {part.name for part in fields(kind)}
    return {name: value for name, value in section.items() if name in names}


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose sections are complete: a training with two epochs keeps its own learning rate."""
    defaults = recipe_defaults()
    return {
        name: _merged(defaults[name], _known(value or {}, _kinds()[name]))
        if isinstance(defaults[name], Mapping) and (value is None or isinstance(value, Mapping))
        else value
        for name, value in settings.items()
    }


def _plain(settings: PruneConfig) -> dict[str, Any]:
    """Return the settings as they stand in a recipe; `trained` follows from the model's weights."""
    plain = {**settings.as_dict(), "tensorboard": settings.tensorboard}
    del plain["trained"]
    return plain


def _kinds() -> dict[str, Any]:
    """Return the types of all top-level names."""
    hints = get_type_hints(PruneConfig)
    del hints["trained"]
    return {**SECTIONS, **hints}


def _keys() -> list[Key]:
    """Return the place of every value that a recipe can hold."""
    return [
        (name, *inner)
        for name, value in recipe_defaults().items()
        for inner in ([(key,) for key in value] if isinstance(value, Mapping) else [()])
    ]


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values of which the second ones win."""
    merged = dict(low)
    for name, value in high.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _nested(key: Key, value: Any) -> dict[str, Any]:
    for name in reversed(key):
        value = {name: value}
    return value
