import importlib.metadata
import io
import platform
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import psenet
from psenet.latency import Latency
from psenet.result import hardware, net_record, result_table, versions

LATENCY = Latency(median_ms=1.23456789, q1_ms=1.0, q3_ms=2.00006, num_runs=30)


def _net(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1), nn.Flatten())


def _record(**changes: Any) -> dict[str, Any]:
    def net(macs: int, params: int, latency_ms: float, accuracy: float, **more: float) -> dict[str, Any]:
        quartiles = [latency_ms - 0.25, latency_ms + 0.5]
        latencies = {"latency_ms": latency_ms, "latency_quartiles_ms": quartiles}
        return {"macs": macs, "params": params, "memory": 8192, **latencies, "accuracy": accuracy, **more}

    return {
        "model": "timm:resnet18",
        "data": "pets",
        "accuracy_on": "test data",
        "baseline": net(1_800_000_000, 11_000_000, 12.0, 91.234),
        "pruned": net(899_000_000, 4_400_000, 7.0, 90.5, accuracy_before_finetune=71.0),
        "uniform": net(900_000_000, 5_500_000, 8.5, 89.0, accuracy_before_finetune=12.345),
        **changes,
    }


def _printed(record: dict[str, Any], width: int = 160) -> list[list[str]]:
    """Return the table's rows as a person sees them, cell by cell."""
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False).print(result_table(record))
    lines = stream.getvalue().splitlines()
    rows = [line for line in lines if line.startswith(("│", "┃"))]
    return [
        [lines[0].strip()],
        *([cell.strip() for cell in row.strip("│┃").replace("┃", "│").split("│")] for row in rows),
    ]


# The figures of a net -------------------------------------------------------------------------------------------------


def test_the_figures_of_a_net_are_those_of_its_widths():
    space = psenet.trace(_net(), torch.zeros(1, 3, 5, 5))
    record = net_record(space, psenet.Widths({"0": 8}), latency=LATENCY, accuracy=12.345678, weights_bytes=1024)
    # 25 pixels; convolutions of 3 to 8 channels with 9 weights each and of 8 to 4 with one; two biases.
    assert record == {
        "macs": 25 * (3 * 8 * 9 + 8 * 4),
        "params": 3 * 8 * 9 + 8 + 8 * 4 + 4,
        "memory": space.memory(psenet.Widths({"0": 8})),
        "weights_bytes": 1024,
        "latency_ms": 1.2346,
        "latency_quartiles_ms": [1.0, 2.0001],
        "accuracy": 12.3457,
    }
    assert {type(value) for value in record.values()} == {int, float, list}


def test_the_accuracy_before_fine_tuning_is_there_where_it_is_known():
    space = psenet.trace(_net(), torch.zeros(1, 3, 5, 5))
    record = net_record(space, space.full(), latency=LATENCY, accuracy=50.0, weights_bytes=1, before_finetune=0.0)
    assert record["accuracy_before_finetune"] == 0.0


# Surroundings ---------------------------------------------------------------------------------------------------------


def test_the_versions_are_those_installed():
    found = versions()
    assert list(found) == ["python", "psenet", "torch", "torchvision", "timm", "optuna", "onnxruntime"]
    assert found["python"] == platform.python_version()
    assert torch.__version__.startswith(found["torch"])
    assert found["psenet"] == importlib.metadata.version("psenet")


def test_a_package_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch):
    def version(package: str) -> str:
        if package == "timm":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr("psenet.result.version", version)
    assert versions()["timm"] == "not installed"
    assert versions()["torch"] == "1"


def test_the_hardware_is_named():
    found = hardware()
    assert isinstance(found.pop("processor"), str)
    assert found == {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_shows_baseline_pruned_and_uniform_side_by_side():
    assert _printed(_record()) == [
        ["timm:resnet18 on pets"],
        ["", "baseline", "pruned", "uniform"],
        ["MACs", "1.8 G (100%)", "899 M (50%)", "900 M (50%)"],
        ["FLOPs", "3.6 G", "1.8 G", "1.8 G"],
        ["parameters", "11 M (100%)", "4.4 M (40%)", "5.5 M (50%)"],
        ["peak activations", "8 KiB", "8 KiB", "8 KiB"],
        ["latency, batch 1", "12.00 ms", "7.00 ms", "8.50 ms"],
        ["its quartiles", "11.75-12.50 ms", "6.75-7.50 ms", "8.25-9.00 ms"],
        ["accuracy before fine-tuning", "", "71.00 %", "12.35 %"],
        ["accuracy on test data", "91.23 %", "90.50 %", "89.00 %"],
    ]


def test_the_table_says_on_which_data_the_accuracy_is():
    assert _printed(_record(accuracy_on="validation data"))[-1][0] == "accuracy on validation data"


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        *((7, "7"), (999, "999"), (1000, "1 k"), (12_345, "12.3 k"), (999_499, "999 k")),
        # What rounds up to the next unit is written in it.
        *((999_500, "1 M"), (999_999, "1 M"), (999_500_000, "1 G"), (999_499_999, "999 M"), (4_100_000_000, "4.1 G")),
    ],
)
def test_amounts_are_short_and_in_the_right_unit(amount: int, shown: str):
    record = _record()
    record["pruned"]["params"] = amount
    assert _printed(record)[4][2].split(" (")[0] == shown


def test_a_zero_accuracy_is_shown():
    record = _record()
    record["pruned"]["accuracy_before_finetune"] = 0.0
    assert _printed(record)[8][2] == "0.00 %"


def test_the_table_of_a_whole_run_fits_a_terminal_of_80_columns():
    stream = io.StringIO()
    Console(file=stream, width=80).print(result_table(_record()))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in stream.getvalue()
    for words in ("MACs", "FLOPs", "899 M (50%)", "90.50 %", "7.00 ms"):
        assert any(words in line for line in lines)
