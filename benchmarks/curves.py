"""Draw the curves of benchmarks/ranking.py: accuracy and ranking against the time of training.

    python benchmarks/curves.py                  benchmarks/results/ranking.json -> docs/ranking.svg

Bars are standard deviations over the seeds.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from evidence import RESULTS
from psenet.rundir import read_json

DOCS = Path(__file__).parent.parent / "docs"
PANELS = {"mean_accuracy": "mean accuracy of 24 subnets, %", "tau": "Kendall's tau", "tau_in_band": "tau in the band"}
COLOURS = {"parallel": "#0072b2", "single-path": "#e69f00", "sandwich": "#cc79a7", "bilateral": "#009e73"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULTS / "ranking.json")
    parser.add_argument("--out", type=Path, default=DOCS / "ranking.svg")
    arguments = parser.parse_args()
    draw(read_json(arguments.result), arguments.out)
    print(arguments.out)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw one panel for each quantity: mean over the seeds, with the standard deviation as bars."""
    mpl.rcParams.update(
        {"svg.hashsalt": "psenet", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for strategy in dict.fromkeys(point["strategy"] for point in result["points"]):
            rows = [row for row in result["summary"] if row["strategy"] == strategy]
            axis.errorbar(
                [row["seconds"]["mean"] for row in rows],
                [row[key]["mean"] for row in rows],
                [row[key]["std"] for row in rows],
                label=strategy,
                color=COLOURS.get(strategy),
                marker="o",
                markersize=3.5,
                capsize=2,
            )
        if key in result["by_macs_alone"]:
            axis.axhline(result["by_macs_alone"][key], color="grey", linestyle=":", label="MACs alone")
        axis.set(title=title, xlabel="seconds of training", xlim=(0, None))
        axis.grid(alpha=0.25)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
