"""What all examples share: their options, the table they end with, and the file that keeps their figures."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from psenet import PruneResult
from psenet.result import hardware, versions
from psenet.rundir import write_json

RESULTS = Path(__file__).parent / "results"
NETS = ("baseline", "pruned", "uniform")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What an example returns."""

    model: nn.Module
    """The pruned, fine-tuned net."""
    record: Mapping[str, Any]
    """What is in the result file."""


def parser(doc: str | None, *, name: str, epochs: int, data: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every example has; `data` is None where there is nothing to choose."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data is not None:
        options.add_argument("--data", default=data, help="where the data is; default: %(default)s")
    options.add_argument("--epochs", type=int, default=epochs, help="of baseline and supernet; default: %(default)s")
    options.add_argument("--finetune-epochs", type=int, default=max(1, epochs // 3), help="default: %(default)s")
    options.add_argument(
        "--evaluations", type=int, default=24, help="nets that the search scores; default: %(default)s"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("runs") / name, help="the run; default: %(default)s")
    options.add_argument("--tiny", action="store_true", help="little or made-up data, a small net: a trial of seconds")
    return options


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None, *, tiny_epochs: int = 5) -> argparse.Namespace:
    """Return what was asked for; a trial is short where nothing else was asked for."""
    if options.parse_args(argv).tiny:
        options.set_defaults(epochs=tiny_epochs, finetune_epochs=2, evaluations=6)
    return options.parse_args(argv)


def folder_of(arguments: argparse.Namespace, must_hold: str) -> Path:
    """Return the data folder, or end with what it should be."""
    folder = Path(arguments.data).expanduser()
    if not (folder / must_hold).is_dir():
        raise SystemExit(
            f"--data must be a folder with {must_hold} in it; got {folder}, which has none: give the folder that the "
            "docstring of this example describes, or try it with --tiny"
        )
    return folder


def show(result: PruneResult, name: str, arguments: argparse.Namespace, argv: Sequence[str] | None) -> Shown:
    """Print the table of a pruned net, keep its figures and return both."""
    run = result.record
    figures = {
        **{key: run[key] for key in ("model", "data", "budget", "score_name", "score_unit")},
        "score_on": f"{run['accuracy_on']}, {run['test_samples']} samples",
        **{net: _of_run(run[net]) for net in (*NETS, "searched")},
        "kept": run["search"]["kept"],
        "seconds": run["seconds"],
        "export_problems": list(result.export.problems),
        "settings": run["settings"],
    }
    return Shown(model=result.model, record=keep(name, figures, arguments, argv))


def keep(
    name: str, figures: Mapping[str, Any], arguments: argparse.Namespace, argv: Sequence[str] | None
) -> Mapping[str, Any]:
    """Print the table of some figures, write them with all that they depend on, and return what was written."""
    record = {
        "command": shlex.join(["python", f"examples/{name}.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": _commit(),
        "seed": arguments.seed,
        "versions": versions(),
        "hardware": hardware(),
        **figures,
    }
    # A trial on made-up data must not take the place of real figures.
    path = (arguments.out if arguments.tiny else RESULTS) / f"{name}.json"
    write_json(path, record)
    print(table(record))
    print(f"figures: {path}")
    return record


def table(record: Mapping[str, Any]) -> str:
    """Return baseline, pruned and uniform net side by side."""
    unit, nets = record["score_unit"], [record[net] for net in NETS]
    before, after = (
        [f"{net[key]:.2f} {unit}" if key in net else "" for net in nets] for key in ("score_before_finetune", "score")
    )
    rows = [
        ("", NETS),
        ("MACs", [f"{net['macs'] / 1e6:.2f}M ({net['macs'] / nets[0]['macs']:.0%})" for net in nets]),
        ("parameters", [f"{net['params'] / 1e3:.1f}k" for net in nets]),
        (f"{record['score_name']} before fine-tuning", before),
        (record["score_name"], after),
    ]
    return "\n".join(title.ljust(32) + "".join(cell.rjust(18) for cell in cells) for title, cells in rows)


def _of_run(net: Mapping[str, Any]) -> dict[str, Any]:
    """Return a net's figures under the names of the examples: a run calls any score its accuracy."""
    names = {"accuracy": "score", "accuracy_before_finetune": "score_before_finetune"}
    kept = ("macs", "params", "latency_ms", "accuracy_before_finetune", "accuracy")
    return {names.get(key, key): net[key] for key in kept if key in net}


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"
