"""`psenet compare`: is one net really better than another, or is it the luck of the images?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from psenet.contest import Net, Pair

FORMAT = 1
_SAMPLE = 500
_ON_VALIDATION = (
    "these validation images chose among the nets of each run, which flatters what was chosen a little; test images "
    "did not (--split test), but what is chosen by them, again and again, has no test left"
)
_ON_TEST = (
    "each run used these test images once, for its own figures; whoever chooses a net by them, again and again, has no "
    "test left: choose by validation images"
)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories, one or more.", metavar="RUN")],
    data: Annotated[
        str, typer.Option(help="What they were made with: `digits`, an image folder, or a name of timm's.")
    ],
    repeats: Annotated[int, typer.Option(min=2, help="Samples to draw.")] = 100,
    sample: Annotated[int | None, typer.Option(min=1, help="Images in a sample; 500, at most half of all.")] = None,
    split: Annotated[str, typer.Option(help="validation, or test for a last look.")] = "validation",
    seed: Annotated[int, typer.Option(min=0, help="Of samples and intervals.")] = 0,
    factory: Annotated[str | None, typer.Option(help="Of runs of a factory of yours: its name, to import it.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Height and width; each run's own if not given.")
    ] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave broken images out.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write all figures, as JSON.")] = None,
) -> None:
    """Compare the nets of one run, or those of several, on images that none of them has trained on.

    Example: psenet compare runs/a runs/b --data photos
    """
    from rich.console import Console

    from psenet.comparison import draw_samples, verdict
    from psenet.contest import answers_of, compared, nets_of, open_runs
    from psenet.errors import InputError
    from psenet.files import check_can_be_written
    from psenet.heldout import SPLITS, load_held_out

    console = Console(markup=False, emoji=False)
    if split not in SPLITS:
        raise InputError(f"--split must be validation or test; got {split!r}")
    if out is not None:
        check_can_be_written(out)
    opened = open_runs(runs, factory)
    held_out = load_held_out(
        opened,
        data,
        split="test" if split == "test" else "validation",
        image_size=image_size,
        skip_unreadable=skip_unreadable,
        say=lambda line: console.print(line, highlight=False),
    )
    num_images = len(held_out.images[0])  # pyright: ignore[reportArgumentType]
    size = min(_SAMPLE, num_images // 2) if sample is None else sample
    samples = draw_samples(num_images, num_repeats=repeats, sample_size=size, seed=seed)
    nets, names = nets_of(opened)
    right = answers_of(nets, held_out.images, show_progress=console.is_terminal)
    pairs = compared(names, right, samples, seed=seed)
    console.print(nets_table(nets, right, samples, f"{num_images} {split} images of {data}"))
    console.print(pairs_table(pairs, size))
    console.print()
    for pair in pairs:
        console.print(verdict(pair.comparison, pair.first, pair.second), highlight=False)
    notes = [*_notes(pairs, num_images=num_images, repeats=repeats, size=size, split=split), *held_out.notes]
    console.print()
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    if out is not None:
        settings = {"runs": [str(path) for path in runs], "data": data, "split": split, "num_images": num_images}
        settings |= {"sample": size, "repeats": repeats, "seed": seed}
        _write(out, settings, nets, right, samples, pairs, notes)
        console.print(f"figures: {out}", highlight=False, soft_wrap=True)


# What is shown --------------------------------------------------------------------------------------------------------


def nets_table(nets: "Sequence[Net]", right: "dict[str, np.ndarray]", samples: "np.ndarray", title: str) -> "Table":
    """Return the accuracy of each net, on all images and on samples."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("net")
    for column in ("MACs", "accuracy", f"{len(samples)} samples of {samples.shape[1]}: mean", "lowest", "highest"):
        table.add_column(column, justify="right")
    for net in nets:
        points = _sampled_accuracies(right[net.name], samples)
        shown = [100 * float(right[net.name].mean()), points.mean(), points.min(), points.max()]
        macs = "" if net.macs is None else f"{net.macs / 1e6:.3g} M"
        table.add_row(net.name, macs, *(f"{value:.2f} %" for value in shown))
    return table


def pairs_table(pairs: "Sequence[Pair]", sample_size: int) -> "Table":
    """Return the differences of the pairs, in points."""
    from rich import box
    from rich.table import Table

    from psenet.comparison import shown

    level = f"{100 * pairs[0].comparison.confidence:.4g} %"
    title = f"differences on the same images, in points of accuracy, with {level} intervals"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("net - other net")
    spread = f"samples\nof {sample_size}"
    for column in ("all\nimages", "interval", "only one\nright", spread, "leads,\nties,\ntrails"):
        table.add_column(column, justify="right", no_wrap=True)
    for pair in pairs:
        found, sampled = pair.comparison, pair.sampled
        table.add_row(
            f"{pair.first} - {pair.second}",
            f"{found.difference:+.2f}",
            f"{shown(found.low)} to {shown(found.high)}",
            f"{found.num_only_first} : {found.num_only_second}",
            f"{sampled.mean:+.2f} ± {sampled.std:.2f}",
            f"{sampled.num_ahead}, {sampled.num_level}, {sampled.num_behind}",
        )
    return table


def _notes(pairs: "Sequence[Pair]", *, num_images: int, repeats: int, size: int, split: str) -> list[str]:
    """Return how the figures were made and what limits them."""
    from psenet.contest import ERROR

    notes = [
        "real means that the interval leaves zero out and that an exact McNemar test agrees",
        f"± is the spread over {repeats} samples of {size} images: what a score on so few is worth; all are drawn from "
        f"the same {num_images}, so that they can agree on what is luck of these",
    ]
    if len(pairs) > 1:
        level = f"{100 * pairs[0].comparison.confidence:.4g} %"
        notes.append(
            f"{len(pairs)} pairs: each interval is one of {level}, so that all of them hold at once with "
            f"{100 * (1 - ERROR):.4g} % (Bonferroni)"
        )
    return [*notes, _ON_TEST if split == "test" else _ON_VALIDATION]


def _sampled_accuracies(right: "np.ndarray", samples: "np.ndarray") -> "np.ndarray":
    return 100 * right[samples].mean(axis=1)


def _write(
    out: Path,
    settings: dict[str, Any],
    nets: "Sequence[Net]",
    right: "dict[str, np.ndarray]",
    samples: "np.ndarray",
    pairs: "Sequence[Pair]",
    notes: Sequence[str],
) -> None:
    """Write all figures as JSON."""
    from psenet.comparison import verdict
    from psenet.result import hardware, versions
    from psenet.rundir import write_json

    record = {"format": FORMAT, **settings, "versions": versions(), "hardware": hardware()}
    record["nets"] = [
        {
            "net": net.name,
            "macs": net.macs,
            "accuracy": round(100 * float(right[net.name].mean()), 4),
            "sample_accuracies": [round(value, 4) for value in _sampled_accuracies(right[net.name], samples).tolist()],
        }
        for net in nets
    ]
    record["pairs"] = [
        {
            "first": pair.first,
            "second": pair.second,
            "difference": round(pair.comparison.difference, 4),
            **{
                name: getattr(pair.comparison, name)
                for name in ("num_only_first", "num_only_second", "confidence", "p_value", "is_real", "num_needed")
            },
            "interval": [round(pair.comparison.low, 4), round(pair.comparison.high, 4)],
            "samples": vars(pair.sampled),
            "verdict": verdict(pair.comparison, pair.first, pair.second),
        }
        for pair in pairs
    ]
    write_json(out, {**record, "notes": list(notes)})
