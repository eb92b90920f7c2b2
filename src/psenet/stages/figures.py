"""The last stage: every net measured side by side, and on test data once."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from psenet.budget import Budget
from psenet.devices import on_device
from psenet.latency import Latency, measure_latency
from psenet.result import FORMAT, hardware, net_record, versions
from psenet.stages.finetune import Finalist
from psenet.stages.run import Run


def figures(run: Run, *, baseline: nn.Module, nets: Mapping[str, Finalist], kept: str) -> dict[str, Any]:
    """Measure everything the result says. The only place that sees test data, once for each net."""
    seconds = run.folder.seconds()
    records = _records(run, baseline, nets if nets["searched"] is not nets["uniform"] else {kept: nets[kept]})
    return {
        "format": FORMAT,
        **run.names,
        "budget": plain_budget(run.budget),
        "score_name": run.task.score_name,
        "score_unit": run.task.score_unit,
        "accuracy_on": "validation data" if run.loaders.test is None else "test data",
        "seed": run.config.seed,
        "versions": versions(),
        "hardware": hardware(),
        "baseline": records["baseline"],
        "pruned": records[kept],
        **{name: records.get(name, records[kept]) for name in nets},
        "widths": dict(nets[kept].widths),
        **{f"{name}_widths": dict(net.widths) for name, net in nets.items()},
        "full_widths": dict(run.space.full()),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "settings": run.config.as_dict(),
    }


def plain_budget(budget: Budget) -> dict[str, int | float | str]:
    """Return the limits that are set, as given."""
    return {name: value for name, value in vars(budget).items() if value is not None}


def _records(run: Run, baseline: nn.Module, nets: Mapping[str, Finalist]) -> dict[str, dict[str, Any]]:
    test = run.loaders.validation if run.loaders.test is None else run.loaders.test
    latency = _latencies(run, {"baseline": baseline, **{name: net.module for name, net in nets.items()}})
    full = net_record(run.space, run.space.full(), latency=latency["baseline"], accuracy=run.score(baseline, test))
    records = {
        name: net_record(
            run.space,
            net.widths,
            latency=latency[name],
            accuracy=run.score(net.module, test),
            before_finetune=run.score(net.before, test),
        )
        for name, net in nets.items()
    }
    return {"baseline": full, **records}


def _latencies(run: Run, modules: Mapping[str, nn.Module]) -> Mapping[str, Latency]:
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(on_device(module, run.config.latency.place))
        return measure_latency(modules, run.example, runner=run.config.latency)
