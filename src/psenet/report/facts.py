"""What a run directory says, read so that a missing or damaged piece costs that piece and nothing else."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from psenet.errors import InputError, first_line
from psenet.report.shown import percent
from psenet.rundir import read_json
from psenet.training.curves import Curves, EpochRecord

_T = TypeVar("_T")
NETS = ("baseline", "pruned", "uniform")
COSTS = ("macs", "params", "memory", "weights_bytes", "latency_ms", "accuracy", "accuracy_before_finetune")


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A piece of the run that cannot be shown."""

    file: str
    reason: str
    """Empty where the file is simply not there."""


@dataclass(frozen=True, kw_only=True)
class NetFacts:
    """The figures of one net; None where the run does not say."""

    macs: float | None = None
    params: float | None = None
    memory: float | None = None
    """Peak of activations, bytes."""
    weights_bytes: float | None = None
    latency_ms: float | None = None
    latency_quartiles_ms: tuple[float, float] | None = None
    accuracy: float | None = None
    """Percent."""
    accuracy_before_finetune: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """The width of one layer, or of one channel group in runs that do not keep layers."""

    name: str
    kind: str
    full: int
    pruned: int
    uniform: int


@dataclass(frozen=True, kw_only=True)
class FrozenFacts:
    """A layer whose width cannot vary."""

    layer: str
    reason: str
    macs_share: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A subnet that the search scored."""

    widths: Mapping[str, int]
    score: float
    macs: float
    params: float
    memory: float | None = None
    latency_ms: float | None = None
    share: float = 1.0
    """Of the validation samples, which the score is from; below 1 it is an estimate."""

    @property
    def is_estimate(self) -> bool:
        """Whether its scoring was stopped early."""
        return self.share < 1


@dataclass(frozen=True, kw_only=True)
class RankedSubnet:
    """A subnet that was also trained alone."""

    score: float
    accuracy_alone: float


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How well scores in the supernet rank subnets that were also trained alone."""

    subnets: tuple[RankedSubnet, ...]
    tau: float
    by_macs_tau: float | None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything that a report shows of a run."""

    path: Path
    model: str
    data: str
    result: Mapping[str, Any]
    """`result.json` as it is; empty while the run is not finished."""
    recipe: Mapping[str, Any]
    nets: Mapping[str, NetFacts] = field(default_factory=dict)
    layers: tuple[LayerFacts, ...] = ()
    frozen: tuple[FrozenFacts, ...] | None = None
    """None where the run does not say; empty where nothing is frozen."""
    candidates: tuple[Candidate, ...] = ()
    curves: Mapping[str, list[EpochRecord]] = field(default_factory=dict)
    prior: Mapping[str, Any] | None = None
    ranking: Ranking | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[Missing, ...] = ()

    @property
    def is_accuracy(self) -> bool:
        """Whether the score is accuracy, and not one of the user's own."""
        return self.result.get("score_name", "accuracy") == "accuracy"

    def show_score(self, score: float | None) -> str:
        """Return a score with its unit, for a person."""
        unit = self.result.get("score_unit", "%")
        if unit == "%" or score is None:
            return percent(score)
        return f"{score:.4g} {unit}".strip()

    @property
    def num_samples(self) -> int | None:
        """How many samples the accuracies are on."""
        count = self.result.get("test_samples")
        return count if isinstance(count, int) and count > 0 else None

    @property
    def runner(self) -> Mapping[str, Any]:
        """What latency was measured by."""
        settings = _mapping(self.result.get("settings")) or _mapping(self.recipe.get("settings"))
        return _mapping(settings.get("latency"))

    @property
    def batch_size(self) -> int:
        """Samples in one measured pass."""
        size = self.runner.get("batch_size", 1)
        return size if isinstance(size, int) and size > 0 else 1


def read_facts(run: str | Path) -> RunFacts:
    """Read a run directory, finished or not.

    Whatever is missing or damaged is named in `missing`, and the rest is there.

    Raises:
        InputError: The folder is not there or holds nothing of a run.
    """
    path = Path(run)
    if not any((path / name).exists() for name in ("recipe.json", "result.json")):
        raise InputError(
            f"{path} must be a run directory made by psenet prune; it holds neither recipe.json nor result.json"
        )
    reader = _Reader(path)
    recipe, result = reader.mapping("recipe.json"), reader.mapping("result.json")
    names = {
        key: next((source[key] for source in (result, recipe) if isinstance(source.get(key), str)), "?")
        for key in ("model", "data")
    }
    return RunFacts(
        path=path,
        model=names["model"],
        data=names["data"],
        result=result,
        recipe=recipe,
        nets=reader.nets(result),
        layers=reader.layers(result),
        frozen=reader.frozen(result),
        candidates=reader.read("stages/evaluated.json", _candidates, ()),
        curves=reader.curves("stages/curves.json"),
        prior=reader.read("stages/prior.json", _prior, None),
        ranking=reader.read("stages/ranking.json", _ranking, None, expected=False),
        seconds=reader.seconds(result),
        missing=tuple(reader.missing),
    )


class _Reader:
    """Reads pieces of a run, and notes what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.missing: list[Missing] = []

    def read(self, file: str, parse: Callable[[Any], _T], otherwise: _T, *, expected: bool = True) -> _T:
        """Return what a file holds, parsed; `otherwise` where it is not there or is damaged."""
        if not (self.path / file).exists():
            if expected:
                self.missing.append(Missing(file=file, reason=""))
            return otherwise
        try:
            return parse(read_json(self.path / file))
        except InputError as error:
            self._note(file, str(error.__cause__ or error))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            self._note(file, first_line(error))
        return otherwise

    def mapping(self, file: str) -> Mapping[str, Any]:
        return self.read(file, _checked_mapping, {})

    def curves(self, file: str) -> Mapping[str, list[EpochRecord]]:
        return self.read(file, lambda _: Curves(self.path / file).read(), {})

    def seconds(self, result: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the time of each stage: of a run that is not finished, of those it has begun."""
        if "seconds" in result:
            return self._part("result.json", "seconds", lambda: _numbers(result["seconds"]), {})
        stages = self.read("stages.json", _checked_mapping, {})
        return self._part("stages.json", "seconds", lambda: _numbers({k: v["seconds"] for k, v in stages.items()}), {})

    def nets(self, result: Mapping[str, Any]) -> Mapping[str, NetFacts]:
        if not result:
            return {}
        found = {name: self._net(name, result) for name in NETS}
        kept = _mapping(result.get("search")).get("kept", "searched")
        files = {"baseline": "baseline", "pruned": kept, "uniform": "uniform"}
        return {name: self._weighed(net, files[name]) for name, net in found.items() if net is not None}

    def _net(self, name: str, result: Mapping[str, Any]) -> NetFacts | None:
        """Return the figures of a net; one that is damaged costs itself alone."""
        record = self._part("result.json", name, lambda: _checked_mapping(result[name]), None)
        if record is None:
            return None
        values = {
            cost: self._part("result.json", f"{name}.{cost}", lambda value=value: _number(value), None)
            for cost in COSTS
            if (value := record.get(cost)) is not None
        }
        spread = None
        if "latency_quartiles_ms" in record:
            place = f"{name}.latency_quartiles_ms"
            quartiles = record["latency_quartiles_ms"]
            spread = self._part("result.json", place, lambda: _pair(quartiles), None)
        return NetFacts(**values, latency_quartiles_ms=spread)

    def _weighed(self, net: NetFacts, stage: str) -> NetFacts:
        """Return a net with the size of its weights' file, where a run of an earlier version does not say it."""
        file = self.path / f"stages/{stage}.safetensors"
        if net.weights_bytes is not None or not file.is_file():
            return net
        return NetFacts(**{**vars(net), "weights_bytes": file.stat().st_size})

    def layers(self, result: Mapping[str, Any]) -> tuple[LayerFacts, ...]:
        if "layers" in result:
            return self._part("result.json", "layers", lambda: tuple(map(_layer, result["layers"])), ())
        if "full_widths" not in result:  # not finished
            return ()
        return self._part("result.json", "widths", lambda: _layers_of_groups(result), ())

    def frozen(self, result: Mapping[str, Any]) -> tuple[FrozenFacts, ...] | None:
        if not result:
            return None
        return self._part("result.json", "frozen", lambda: tuple(map(_frozen, result["frozen"])), None)

    def _part(self, file: str, part: str, parse: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return parse()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            self._note(f"{file}: {part}", "" if isinstance(error, KeyError) else first_line(error))
        return otherwise

    def _note(self, file: str, reason: str) -> None:
        self.missing.append(Missing(file=file, reason=reason))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _checked_mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must hold a JSON object; got {type(value).__name__}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"must be a finite number; got {value!r}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be a whole number; got {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text; got {value!r}")
    return value


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(_number(value)) for name, value in values.items()}


def _pair(values: Any) -> tuple[float, float]:
    low, high = map(_number, values)
    return low, high


def _layer(record: Any) -> LayerFacts:
    widths = {net: _count(record[net]) for net in ("full", "pruned", "uniform")}
    return LayerFacts(name=_text(record["name"]), kind=_text(record["kind"]), **widths)


def _layers_of_groups(result: Mapping[str, Any]) -> tuple[LayerFacts, ...]:
    """Return the channel groups in place of layers, which runs of earlier versions do not keep."""
    pruned, uniform = result["widths"], result["uniform_widths"]
    return tuple(
        LayerFacts(name=name, kind="", full=_count(full), pruned=_count(pruned[name]), uniform=_count(uniform[name]))
        for name, full in result["full_widths"].items()
    )


def _frozen(record: Any) -> FrozenFacts:
    share = float(_number(record["macs_share"]))
    return FrozenFacts(layer=_text(record["layer"]), reason=_text(record["reason"]), macs_share=share)


def _candidates(content: Any) -> tuple[Candidate, ...]:
    optional = ("memory", "latency_ms", "share")
    return tuple(
        Candidate(
            widths={_text(name): _count(width) for name, width in one["widths"].items()},
            **{name: _number(one[name]) for name in ("score", "macs", "params")},
            **{name: _number(one[name]) for name in optional if one.get(name) is not None},
        )
        for one in content["candidates"]
    )


def _prior(content: Any) -> Mapping[str, Any]:
    """Return what the prior learned, after drawing it once: a figure that cannot be drawn is no fact."""
    from psenet.charts import draw_prior

    if not len(content["keeps"]) == len(content["macs_shares"]) > 0:
        raise ValueError("keeps must have a row for each share of MACs")
    if any(len(row) != len(content["groups"]) for row in content["keeps"]):
        raise ValueError("keeps must have a column for each group")
    draw_prior(content)
    return content


def _ranking(content: Any) -> Ranking:
    subnets = tuple(
        RankedSubnet(score=_number(one["score"]), accuracy_alone=_number(one["accuracy_alone"]))
        for one in content["subnets"]
    )
    by_macs = content.get("by_macs_tau")
    return Ranking(
        subnets=subnets, tau=_number(content["tau"]), by_macs_tau=None if by_macs is None else _number(by_macs)
    )
