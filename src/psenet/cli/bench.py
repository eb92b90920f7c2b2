"""`psenet bench`: how long a net takes, by the engines that will run it, beside its pruned version."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from psenet.runners import Runner

FORMAT = 1
_IMAGE_SIZE, _NUM_CLASSES, _IN_CHANNELS = 224, 1000, 3


def bench(
    target: Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME, my.module:factory, or a run directory.")],
    engine: Annotated[list[str] | None, typer.Option(help="eager, compile or onnxruntime; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Samples in one pass; repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's number if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda, cuda:1, ...")] = "cpu",
    runs: Annotated[int, typer.Option(min=3, help="Measurements of each net.")] = 30,
    keep: Annotated[str | None, typer.Option(help="Of a model: add its uniform subnet of this ratio, 50%.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Of a model: height and width; 224.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Of a model; 1000.")] = None,
    channels: Annotated[int | None, typer.Option("--in-channels", "--channels", min=1, help="Of a model; 3.")] = None,
    factory: Annotated[str | None, typer.Option(help="Of a run of a factory of yours: its name, to import it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; bench.json in the run directory of a run.")] = None,
) -> None:
    """Measure the latency of a model, or of a run's baseline and pruned net, side by side.

    Example: psenet bench timm:resnet18 --keep 50% --engine eager --engine onnxruntime
    """
    import torch
    from rich.console import Console

    from psenet.errors import InputError
    from psenet.files import check_can_be_written
    from psenet.latency import measure_latency
    from psenet.result import hardware, versions
    from psenet.rundir import write_json
    from psenet.runners import Runner

    if out is not None:
        check_can_be_written(out)
    runners = [
        Runner(engine=name, device=device, num_threads=threads, batch_size=size)
        for name in dict.fromkeys(engine or ["eager"])
        for size in dict.fromkeys(batch or [1])
    ]
    for runner in runners:
        runner.check()
    if Path(target).is_dir():
        refuse_for_runs(keep=keep, image_size=image_size, num_classes=num_classes, in_channels=channels)
        model, shape, nets = run_nets(target, factory)
        out = out or Path(target) / "bench.json"
    elif ":" in target:
        size = image_size or _IMAGE_SIZE
        model, shape = target, (channels or _IN_CHANNELS, size, size)
        nets = model_nets(target, shape, num_classes=num_classes or _NUM_CLASSES, keep=keep)
    else:
        raise InputError(
            f"there is no run directory {target!r}; a model is timm:NAME, torchvision:NAME or my.module:factory"
        )
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for runner in runners:
        placed = {name: net.to(runner.place) for name, net in nets.items()}
        latencies = measure_latency(placed, example, runner=runner, num_runs=runs)
        rows += [_row(runner, name, latencies) for name in nets]
    console = Console(markup=False, emoji=False)
    console.print(bench_table(rows, f"{model}, input {' x '.join(map(str, shape))}"))
    if out is not None:
        record = {"format": FORMAT, "target": target, "model": model, "input_shape": list(shape)}
        write_json(out, {**record, "versions": versions(), "hardware": hardware(), "measurements": rows})
        console.print(f"figures: {out}", highlight=False, soft_wrap=True)


def refuse_for_runs(**options: str | int | None) -> None:
    """Make sure that none of the options that only models take is given.

    Raises:
        InputError: Some are; they are named.
    """
    from psenet.errors import InputError

    useless = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if useless:
        raise InputError(f"{', '.join(useless)}: for models only, as a run has its own nets and images; leave it out")


def run_nets(path: str, factory: str | None) -> "tuple[str, tuple[int, ...], dict[str, nn.Module]]":
    """Return the model's name, the shape of one sample, and the baseline and the pruned net of a finished run."""
    from psenet.finished import load_run

    run = load_run(path, factory=factory)
    return run.model, run.input_shape, {"baseline": run.baseline, "pruned": run.pruned}


def model_nets(
    spec: str, input_shape: tuple[int, ...], *, num_classes: int, keep: str | None
) -> "dict[str, nn.Module]":
    """Return a model as `baseline`, and its uniform subnet of a keep ratio, where asked, as `uniform RATIO`.

    Raises:
        InputError: The model cannot be built or traced, or `keep` is no ratio.
    """
    import torch

    from psenet.models import build_model
    from psenet.reading import trace
    from psenet.supernet import Supernet

    keep_ratio = None if keep is None else parse_ratio("--keep", keep)
    net = build_model(spec, num_classes=num_classes, in_channels=input_shape[0]).eval()
    if keep_ratio is None:
        return {"baseline": net}
    space = trace(net, torch.zeros(1, *input_shape))
    return {"baseline": net, f"uniform {keep}": Supernet(net, space).extract(space.uniform(keep_ratio))}


def parse_ratio(option: str, text: str) -> float:
    """Return a ratio given as `50%` or `0.5`.

    Raises:
        InputError: It is no number above 0 and at most 1.
    """
    from psenet.errors import InputError

    try:
        ratio = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise InputError(f"{option} must be a share of the channels, such as 50% or 0.5; got {text!r}")
    return ratio


def _row(runner: "Runner", name: str, latencies: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one net by one engine."""
    import torch

    latency = latencies[name]
    return {
        "engine": runner.engine,
        "device": runner.device,
        "threads": runner.num_threads or torch.get_num_threads(),
        "batch": runner.batch_size,
        "net": name,
        "median_ms": round(latency.median_ms, 5),
        "quartiles_ms": [round(latency.q1_ms, 5), round(latency.q3_ms, 5)],
        "num_runs": latency.num_runs,
        "speed_up": round(latencies["baseline"].median_ms / latency.median_ms, 4),
    }


def bench_table(rows: Sequence[dict[str, Any]], title: str) -> "Table":
    """Return the measurements for the terminal."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("engine", "device"):
        table.add_column(column)
    for column in ("threads", "batch"):
        table.add_column(column, justify="right")
    table.add_column("net")
    for column in ("median", "quartiles", "speed-up"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["quartiles_ms"]
        shown = f"{row['median_ms']:.3f} ms", f"{low:.3f}-{high:.3f} ms", f"{row['speed_up']:.2f}x"
        table.add_row(row["engine"], row["device"], str(row["threads"]), str(row["batch"]), row["net"], *shown)
    return table
