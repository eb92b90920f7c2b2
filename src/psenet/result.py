"""The figures of a run: `RUN/result.json`, and the table a person reads.

`result.json` is stable. Accuracies are percent on test data, latencies the median in milliseconds:

    format       1
    score_name   what nets are judged by: "accuracy", or a score of the user's own, which then stands under `accuracy`;
                 score_unit: what stands behind its numbers
    accuracy_on  "test data", or "validation data" where there was none
    test_samples how many samples the accuracies are on
    model, data  as given; budget: the limits as given; limits: the same as absolute numbers; seed
    command      the command line, or null where the run is of a Python program; finished_at: when, in UTC
    versions     of python, torch, timm, psenet; hardware: what it ran on
    baseline     macs, params, memory (bytes of activations), weights_bytes (of parameters and buffers, in the precision
                 they are kept in: float32 as a rule), latency_ms, latency_quartiles_ms, accuracy
    pruned       the same, and accuracy_before_finetune
    uniform      the same for the uniform-width net of the same MACs, trained by the same recipe
    searched     the same for the net that the search found, whether it was kept or not
    widths       group name to width of the pruned net; uniform_widths, searched_widths, full_widths: the same of the
                 others
    layers       of every convolution and linear layer its name, kind and output channels in the full, the pruned and
                 the uniform net
    frozen       of every layer whose width cannot vary the layer, the reason and its macs_share, 0 to 1
    seconds      baseline, supernet, search, finetune, total
    settings     everything else the run was asked for
    search       num_evaluations; best_score: mean probability of the true class on validation data, in percent;
                 history: how many subnets training visited; kept: which net the pruned one is, "searched", or "uniform"
                 where validation data did not tell the searched one to be better; with a budget on latency also
                 latency: predicted_ms and measured_ms of the winner, keeps_budget, searched_within_ms, rounds
    export       bytes by file name, problems, onnx_max_relative_difference, onnx_opset, batch_is_dynamic
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psenet.latency import Latency
from psenet.space import WidthSpace
from psenet.widths import Widths

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
_RECORDED = ("psenet", "torch", "torchvision", "timm", "optuna", "onnxruntime")


def net_record(
    space: WidthSpace,
    widths: Widths,
    *,
    latency: Latency,
    accuracy: float,
    weights_bytes: int,
    before_finetune: float | None = None,
) -> dict[str, Any]:
    """Return the figures of one net."""
    record: dict[str, Any] = {
        "macs": space.macs(widths),
        "params": space.params(widths),
        "memory": space.memory(widths),
        "weights_bytes": weights_bytes,
        "latency_ms": round(latency.median_ms, 4),
        "latency_quartiles_ms": [round(latency.q1_ms, 4), round(latency.q3_ms, 4)],
        "accuracy": round(accuracy, 4),
    }
    if before_finetune is not None:
        record["accuracy_before_finetune"] = round(before_finetune, 4)
    return record


def versions(packages: Iterable[str] = _RECORDED) -> dict[str, str]:
    """Return the versions of Python and of packages; by default of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Return what the run ran on."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _processor() -> str:
    """Return the processor's name; Python knows it only outside Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def result_table(record: Mapping[str, Any]) -> "Table":
    """Return the final table for the terminal: baseline, pruned and uniform side by side."""
    from rich.table import Table

    names = ("baseline", "pruned", "uniform")
    table = Table(title=f"{record['model']} on {record['data']}")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    base = record["baseline"]
    score, unit = record.get("score_name", "accuracy"), record.get("score_unit", "%")
    rows: list[tuple[str, list[str]]] = [
        ("MACs", [_with_share(record[name]["macs"], base["macs"]) for name in names]),
        ("FLOPs", [_short(2 * record[name]["macs"]) for name in names]),
        ("parameters", [_with_share(record[name]["params"], base["params"]) for name in names]),
        ("peak activations", [f"{record[name]['memory'] / 1024:,.0f} KiB" for name in names]),
        (_latency_title(record), [f"{record[name]['latency_ms']:.2f} ms" for name in names]),
        ("  its quartiles", [_range(record[name]["latency_quartiles_ms"]) for name in names]),
        (
            f"{score} before fine-tuning",
            [_scored(record[name].get("accuracy_before_finetune"), unit) for name in names],
        ),
        (f"{score} on {record['accuracy_on']}", [_scored(record[name]["accuracy"], unit) for name in names]),
    ]
    for title, cells in rows:
        table.add_row(title, *cells)
    return table


def _latency_title(record: Mapping[str, Any]) -> str:
    runner = record.get("settings", {}).get("latency", {})
    engine = runner.get("engine", "eager")
    return f"latency, batch {runner.get('batch_size', 1)}" + f", {engine}" * (engine != "eager")


def _range(quartiles_ms: Sequence[float]) -> str:
    low, high = quartiles_ms
    return f"{low:.2f}-{high:.2f} ms"


def _scored(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.2f} {unit}".strip()


def _with_share(value: int, whole: int) -> str:
    return f"{_short(value)} ({value / whole:.0%})"


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # what rounds to 1000 of the next smaller unit
            return f"{value / size:.3g} {unit}"
    return str(int(value))
