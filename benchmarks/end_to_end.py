"""The whole way on real data, as a user runs it: `psenet prune` for several seeds, and the table of what came out.

    python benchmarks/end_to_end.py digits --seeds 3
    python benchmarks/end_to_end.py cifar10-resnet20 --data FOLDER --seeds 3
    python benchmarks/end_to_end.py cifar10-mobilenetv2 --data FOLDER --seeds 1
    python benchmarks/end_to_end.py cifar10-fastnas --data FOLDER --seeds 1
    python benchmarks/end_to_end.py cifar10-fastnas-20M --data FOLDER --seeds 1

The last two are the task of the tutorial of NVIDIA Model Optimizer's FastNAS: the ResNet-20 with zero-padded shortcuts
to 29.6M MACs; and to 20M, which FastNAS refuses, from the supernet of the first. Run them from the repository's root.

Every seed is a run of its own in runs/end_to_end/CASE-SEED, and an interrupted one is resumed. The schedules of the
CIFAR-10 cases are short, for two CPU cores: they compare nets trained alike, not with published accuracies.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from evidence import write_result
from psenet.rundir import read_json

RUNS = Path("runs/end_to_end")
NETS = ("baseline", "pruned", "uniform", "searched")
CASES = {
    "digits": "--data digits --model psenet.models:digits_resnet --macs 50%",
    "cifar10-resnet20": (
        "--model psenet.models:resnet20 --macs 50% --max-train-images 15000 --distill 0.5 "
        "--baseline-epochs 12 --supernet-epochs 12 --finetune-epochs 5 --evaluations 60"
    ),
    "cifar10-mobilenetv2": (
        "--model timm:mobilenetv2_100 --macs 50% --image-size 64 --max-train-images 6000 --distill 0.5 "
        "--baseline-epochs 10 --supernet-epochs 10 --finetune-epochs 4 --evaluations 40"
    ),
    "cifar10-fastnas": (
        "--model benchmarks.nets:ZeroPaddedResNet20 --macs 29.6M --divisor 4 --max-train-images 15000 --distill 0.5 "
        "--baseline-epochs 12 --supernet-epochs 12 --finetune-epochs 5 --evaluations 60"
    ),
    "cifar10-fastnas-20M": "--from cifar10-fastnas --model benchmarks.nets:ZeroPaddedResNet20 --macs 20M",
}
"""The options of `psenet prune`; `--from` names the case whose run of the same seed gives the supernet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", help="the image folder, for the CIFAR-10 cases")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    settings = shlex.split(CASES[arguments.case])
    if "--data" not in settings and "--from" not in settings:
        if arguments.data is None:
            parser.error(f"{arguments.case} needs --data FOLDER, with train/<class> and test/<class>")
        settings += ["--data", arguments.data]
    records = [run(arguments.case, settings, seed) for seed in range(arguments.seeds)]
    command = shlex.join(
        ["psenet", "prune", *settings, *["--seed", "SEED"] * ("--from" not in settings), "--out", "RUN"]
    )
    figures = {"prune": command, "summary": summary(records), "runs": records}
    print(table(records))
    print(f"figures: {write_result(arguments.case, figures)}")


def run(case: str, settings: list[str], seed: int) -> dict[str, Any]:
    """Run one seed to its end, or read it if it is finished."""
    out = RUNS / f"{case}-{seed}"
    if "--from" in settings:
        place = settings.index("--from") + 1
        settings = [*settings[:place], str(RUNS / f"{settings[place]}-{seed}"), *settings[place + 1 :]]
    else:
        settings = [*settings, "--seed", str(seed)]
    if not (out / "result.json").exists():
        command = [sys.executable, "-m", "psenet", "prune", *settings, "--out", str(out)]
        subprocess.run([*command, "--resume"], check=True)
    record = read_json(out / "result.json")
    # A full list of widths for each seed says little and is long; the folder has it.
    return {key: value for key, value in record.items() if not key.endswith("_widths")}


def summary(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean and standard deviation over the seeds, by net and figure."""
    return {
        net: {
            key: {"mean": round(float(np.mean(values)), 4), "std": round(float(np.std(values)), 4)}
            for key in ("macs", "params", "latency_ms", "accuracy_before_finetune", "accuracy")
            if (values := [record[net][key] for record in records if key in record[net]])
        }
        for net in NETS
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return the summary as a Markdown table."""
    lines = ["| net | MACs | parameters | latency, ms | accuracy, % |", "| --- | --- | --- | --- | --- |"]
    for net, figures in summary(records).items():
        accuracies = [f"{record[net]['accuracy']:.2f}" for record in records]
        lines.append(
            f"| {net} | {figures['macs']['mean'] / 1e6:.2f}M | {figures['params']['mean'] / 1e6:.3f}M "
            f"| {figures['latency_ms']['mean']:.2f} | {figures['accuracy']['mean']:.2f} ({', '.join(accuracies)}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
