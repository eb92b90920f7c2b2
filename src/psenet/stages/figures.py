"""The last stage: every net measured side by side, and on test data once."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from psenet.budget import Budget
from psenet.devices import on_device
from psenet.inputs import num_samples
from psenet.latency import Latency, measure_latency
from psenet.result import FORMAT, hardware, net_record, versions
from psenet.stages.finetune import Finalist
from psenet.stages.run import Run


def figures(run: Run, *, baseline: nn.Module, nets: Mapping[str, Finalist], kept: str) -> dict[str, Any]:
    """Measure everything the result says. The only place that sees test data, once for each net."""
    seconds = run.folder.seconds()
    shown = nets if nets["searched"] is not nets["uniform"] else {kept: nets[kept]}
    records, num_tested = _records(run, baseline, shown)
    modules = {"full": baseline, "pruned": nets[kept].module, "uniform": nets["uniform"].module}
    return {
        "format": FORMAT,
        **run.names,
        "budget": plain_budget(run.budget),
        "limits": {resource.name: limit for resource, limit in run.limits.each()},
        "score_name": run.task.score_name,
        "score_unit": run.task.score_unit,
        "accuracy_on": "validation data" if run.loaders.test is None else "test data",
        "test_samples": num_tested,
        "seed": run.config.seed,
        "command": run.command,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "baseline": records["baseline"],
        "pruned": records[kept],
        **{name: records.get(name, records[kept]) for name in nets},
        "widths": dict(nets[kept].widths),
        **{f"{name}_widths": dict(net.widths) for name, net in nets.items()},
        "full_widths": dict(run.space.full()),
        "layers": layer_records(modules),
        "frozen": [asdict(layer) for layer in run.space.frozen],
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "settings": run.config.as_dict(),
    }


def plain_budget(budget: Budget) -> dict[str, int | float | str]:
    """Return the limits that are set, as given."""
    return {name: value for name, value in vars(budget).items() if value is not None}


def layer_records(nets: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Return the output channels of every convolution and linear layer in each of some nets of the same layers."""
    modules = {net: dict(module.named_modules()) for net, module in nets.items()}
    first = next(iter(modules.values()))
    return [
        {
            "name": name,
            "kind": type(layer).__name__,
            **{net: _channels(layers[name]) for net, layers in modules.items()},
        }
        for name, layer in first.items()
        if _channels(layer) is not None
    ]


def _channels(layer: nn.Module) -> int | None:
    """Return how many channels a layer makes; None if it is no convolution or linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, _ConvNd) else None


class _Counted:
    """Batches, and how many samples were in them when they were last read."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.num_samples = 0

    def __iter__(self) -> Iterator[Any]:
        self.num_samples = 0
        for batch in self._batches:
            self.num_samples += num_samples(batch[0])
            yield batch


def _records(run: Run, baseline: nn.Module, nets: Mapping[str, Finalist]) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the figures of the baseline and of other nets, and how many samples their accuracy is on."""
    test = _Counted(run.loaders.validation if run.loaders.test is None else run.loaders.test)
    latency = _latencies(run, {"baseline": baseline, **{name: net.module for name, net in nets.items()}})
    full = net_record(
        run.space,
        run.space.full(),
        latency=latency["baseline"],
        accuracy=run.score(baseline, test),
        weights_bytes=_bytes_of(baseline),
    )
    records = {
        name: net_record(
            run.space,
            net.widths,
            latency=latency[name],
            accuracy=run.score(net.module, test),
            before_finetune=run.score(net.before, test),
            weights_bytes=_bytes_of(net.module),
        )
        for name, net in nets.items()
    }
    return {"baseline": full, **records}, test.num_samples


def _bytes_of(module: nn.Module) -> int:
    """Return the size of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _latencies(run: Run, modules: Mapping[str, nn.Module]) -> Mapping[str, Latency]:
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(on_device(module, run.config.latency.place))
        return measure_latency(modules, run.example, runner=run.config.latency)
