"""How well, and how soon, each training strategy ranks subnets: against the same subnets trained alone.

    python benchmarks/ranking.py --data FOLDER                    every strategy; under 20 minutes on two cores
    python benchmarks/ranking.py --data FOLDER --from-scratch     the same, from new weights
    python benchmarks/ranking.py --data FOLDER --truth            train the subnets alone again, about an hour
    python benchmarks/ranking.py --data FOLDER --channel-bench F  the published ground truth of a wider net, on a GPU

A narrow ResNet with seven groups of four widths on 10,000 CIFAR-10 images (an image folder). The truth is the accuracy
on the test images of 24 subnets, each trained alone with three seeds: half drawn from the whole space, half with 90 to
100 % of one budget. It is kept in benchmarks/truth.json.

Supernets start from the whole network trained alone, its channels in order of importance, as in `psenet.prune`. Every
point of a strategy is a training of its own with a whole learning rate schedule, so that what it has reached after a
time is what a user would get who had that time. Its supernet then scores the 24 subnets on validation images, with
recalibrated statistics and without fine-tuning; scores are compared with the truth by Kendall's tau and Spearman's rho.
MACs alone rank the whole space well, so the figure within the band is the honest one. Subnets of the bilateral strategy
are scored on both sides, and the mean counts.
"""

import argparse
import functools
import gzip
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr
from torch import nn

import psenet
from evidence import write_result
from psenet.data import DataSplits, load_data, make_loader
from psenet.evaluate import SupernetScore, accuracy
from psenet.importance import order_channels
from psenet.rundir import read_json, write_json
from psenet.space import WidthSpace
from psenet.training import TrainConfig, train_model, train_supernet
from psenet.widths import Widths

TRUTH = Path(__file__).parent / "truth.json"
WIDTHS = (16, 32, 32, 32, 48, 48, 48)
NUM_IMAGES, NUM_VALIDATION, BATCH_SIZE = 10_000, 2_000, 128
NUM_TRUE_SEEDS, NUM_SUBNETS = 3, 24
BUDGET, BAND = 0.4, (0.9, 1.0)
"""MACs of the band's upper end as a share of the full net's, and the band as shares of that."""
LENGTHS = {"parallel": (0.5, 1.0, 2.0), "single-path": (0.5, 1.0, 2.0), "sandwich": (0.5, 1.0), "bilateral": (0.5, 1.0)}
"""Trainings of each strategy, as multiples of the epochs."""
TRUE_EPOCHS = 10
LEARNING_RATE = 0.05
"""Of supernets, as in `psenet.prune`; in a trial with another seed better than 0.1 for every strategy, and than 0.025
for the serial ones."""
CONFIG = TrainConfig(learning_rate=0.1, weight_decay=5e-4, warmup_ratio=0.1)


class Net(nn.Module):
    """The network of Channel-Bench-Macro (Su et al. 2022) at any widths, for 32 px images."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        w0, w1, w2, w3, w4, w5, w6 = widths
        self.stem = nn.Sequential(nn.Conv2d(3, w0, 3, 2, 1, bias=False), nn.BatchNorm2d(w0), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(
            *(_Block(w0, w1, w0), _Block(w0, w2, w0), _Block(w0, w3, w4, stride=2)),
            *(_Block(w4, w5, w4), _Block(w4, w6, w4)),
        )
        self.head = nn.Linear(w4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of images (B, 3, 32, 32)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.is_residual = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + x if self.is_residual else y)


@dataclass(frozen=True)
class Truth:
    """Subnets, and their accuracies when each is trained alone."""

    widths: list[Widths]
    accuracies: np.ndarray
    """Mean over the seeds, in percent."""
    in_band: np.ndarray
    """True where the MACs are within the band of the budget."""
    by_seed: np.ndarray | None = None
    """The accuracies of each seed, shape (subnets, seeds)."""

    def agreement_of_seeds(self) -> dict[str, float] | None:
        """Return how well one seed agrees with the mean of the others: the noise of training itself."""
        if self.by_seed is None or self.by_seed.shape[1] < 2:
            return None
        found = []
        for seed in range(self.by_seed.shape[1]):
            others = np.delete(self.by_seed, seed, axis=1).mean(axis=1)
            found.append(agreement(self.by_seed[:, seed], replace(self, accuracies=others)))
        return {key: round(float(np.mean([one[key] for one in found])), 3) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as an image folder")
    parser.add_argument("--truth", action="store_true", help="train the subnets alone and stop")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time; 1 on a GPU")
    parser.add_argument("--channel-bench", type=Path, help="ground truth of all 16,384 subnets (json.gz); needs a GPU")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the unit of a strategy's training")
    parser.add_argument("--from-scratch", action="store_true", help="start from new weights, as the papers do")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    arguments = parser.parse_args()
    if arguments.channel_bench is not None and not torch.cuda.is_available():
        parser.exit(message="skipped: the net of Channel-Bench-Macro has 0.8G MACs, and there is no GPU here\n")
    if arguments.truth:
        train_alone(arguments.data, arguments.workers, arguments.threads)
        return
    race = Race(
        arguments.data, arguments.channel_bench, arguments.epochs, arguments.from_scratch, threads=arguments.threads
    )
    name = "ranking_channel_bench" if arguments.channel_bench else "ranking"
    name += "_from_scratch" * arguments.from_scratch
    # Trainings of all kinds beside each other, the longest first: whatever shares the machine slows all of them.
    kinds = [(strategy, length) for strategy in arguments.strategies for length in LENGTHS[strategy]]
    kinds.sort(key=lambda kind: -kind[1] * (kind[0] in ("sandwich", "bilateral")))
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        starts = list(pool.map(race.start, range(arguments.seeds)))
        runs = [pool.submit(race.run, *kind, seed, weights) for seed, weights in enumerate(starts) for kind in kinds]
        points = []
        for run in runs:
            points.append(run.result())
            print(json.dumps(points[-1]), flush=True)
    order = list(LENGTHS)
    points.sort(key=lambda point: (order.index(point["strategy"]), point["epochs"], point["seed"]))
    rows = summary(points)
    figures = {
        "epochs": arguments.epochs,
        "workers": arguments.workers,
        "from_scratch": arguments.from_scratch,
        "by_macs_alone": agreement(race.space.macs(race.truth.widths), race.truth),
        "by_another_seed": race.truth.agreement_of_seeds(),
        "time_to_reach": time_to_reach(rows),
        "summary": rows,
        "points": points,
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "points"}, indent=2))
    print(f"figures: {write_result(name, figures)}")


def make_space(widths: Sequence[int]) -> WidthSpace:
    """Return the space of quarters of every width."""
    return psenet.trace(Net(widths), torch.zeros(1, 3, 32, 32), divisor=4, keep_ratios=(0.25, 0.5, 0.75, 1.0))


# The truth ------------------------------------------------------------------------------------------------------------


def draw_subnets(space: WidthSpace) -> list[Widths]:
    """Return the subnets to train alone: half from the whole space, half from the band."""
    rng = np.random.default_rng(0)
    drawn: dict[Widths, None] = {}
    while len(drawn) < NUM_SUBNETS // 2:
        drawn[space.sample(rng)] = None
    while len(drawn) < NUM_SUBNETS:
        widths = space.sample(rng)
        if _is_in_band(space, [widths])[0]:
            drawn[widths] = None
    return list(drawn)


def _is_in_band(space: WidthSpace, widths: Sequence[Widths]) -> np.ndarray:
    shares = space.macs(widths) / (BUDGET * space.macs(space.full()))
    return (shares >= BAND[0]) & (shares <= BAND[1])


def train_alone(folder: str, workers: int, threads: int) -> None:
    """Train what is missing in the file of the truth, and write it after every net."""
    space = make_space(WIDTHS)
    kept = read_json(TRUTH) if TRUTH.exists() else {"widths": WIDTHS, "epochs": TRUE_EPOCHS, "subnets": []}
    records: dict[str, list[float]] = {json.dumps(r["subnet"]): r["accuracies"] for r in kept["subnets"]}
    subnets = [[widths[group.name] for group in space.groups] for widths in draw_subnets(space)]
    # Seed by seed, so that an interrupted truth has as many seeds of every net as there was time for.
    missing = [
        (subnet, seed)
        for seed in range(NUM_TRUE_SEEDS)
        for subnet in subnets
        if len(records.setdefault(json.dumps(subnet), [])) <= seed
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_train_one, subnet, seed, folder, threads) for subnet, seed in missing]
        for (subnet, seed), job in zip(missing, jobs, strict=True):
            reached = job.result()
            records[json.dumps(subnet)].append(reached)
            kept["subnets"] = [{"subnet": json.loads(key), "accuracies": value} for key, value in records.items()]
            write_json(TRUTH, kept)
            print(f"seed {seed} {subnet}: {reached:.2f} %", flush=True)


def _train_one(subnet: list[int], seed: int, folder: str, threads: int) -> float:
    """Train one subnet from new weights and return its accuracy on the test images."""
    torch.set_num_threads(threads)
    data = _load(folder)
    torch.manual_seed(seed)
    space = make_space(WIDTHS)
    net = psenet.Supernet(Net(WIDTHS), space).extract(space.from_array(np.array([subnet]))[0])
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    loader = make_loader(data.train, batch_size=BATCH_SIZE, shuffle=True, seed=seed)
    train_model(net, loader, config=replace(CONFIG, epochs=TRUE_EPOCHS), show_progress=False)
    return round(accuracy(net, make_loader(data.test, batch_size=500, shuffle=False)), 2)


@functools.cache
def _load(folder: str, num_images: int | None = NUM_IMAGES) -> DataSplits:
    return load_data(folder, max_train_images=num_images)


def read_truth(space: WidthSpace) -> Truth:
    """Return what is in the file."""
    subnets = read_json(TRUTH)["subnets"]
    widths = space.from_array(np.array([record["subnet"] for record in subnets]))
    by_seed = np.array([record["accuracies"] for record in subnets])
    return Truth(widths, by_seed.mean(axis=1), _is_in_band(space, widths), by_seed)


def read_bench(path: Path) -> dict[str, Any]:
    with gzip.open(path) as stream:
        return json.load(stream)


def bench_truth(space: WidthSpace, path: Path, num_subnets: int = 2000) -> Truth:
    """Return a sample of the published ground truth; its digits are quarters of the widths of the seven groups."""
    archs = list(read_bench(path)["archs"].items())
    chosen = [archs[i] for i in np.random.default_rng(0).choice(len(archs), num_subnets, replace=False)]
    sizes = [group.size for group in space.groups]
    rows = [[int(digit) * size // 4 for digit, size in zip(arch, sizes, strict=True)] for arch, _ in chosen]
    widths = space.from_array(np.array(rows))
    wrong = [arch for (arch, record), w in zip(chosen, widths, strict=True) if record["params"] != space.params(w)]
    assert not wrong, f"the net is not that of the file: parameters of {wrong[:3]} differ"
    return Truth(widths, np.array([np.mean(record["acc"]) for _, record in chosen]), _is_in_band(space, widths))


# The strategies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """What all strategies have in common; goes to worker processes."""

    folder: str
    channel_bench: Path | None
    epochs: int
    from_scratch: bool
    threads: int

    @functools.cached_property
    def widths(self) -> Sequence[int]:
        """The channels of the whole net."""
        return WIDTHS if self.channel_bench is None else read_bench(self.channel_bench)["widths"]

    @functools.cached_property
    def space(self) -> WidthSpace:
        """Its width space."""
        return make_space(self.widths)

    @functools.cached_property
    def truth(self) -> Truth:
        """What scores are compared with."""
        return read_truth(self.space) if self.channel_bench is None else bench_truth(self.space, self.channel_bench)

    @property
    def data(self) -> DataSplits:
        """The images, read once in each process."""
        return _load(self.folder, None if self.channel_bench else NUM_IMAGES)

    def start(self, seed: int) -> dict[str, torch.Tensor]:
        """Return the weights that every strategy starts from: trained alone, channels in order, or new."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        model = Net(self.widths)
        if self.from_scratch:
            return model.state_dict()
        train_model(model, self.loader(seed), config=replace(CONFIG, epochs=TRUE_EPOCHS), show_progress=False)
        return order_channels(model, self.space).state_dict()

    def run(self, strategy: str, length: float, seed: int, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Train a supernet for a time, and compare its scores with the truth."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        model = Net(self.widths)
        model.load_state_dict(weights)
        supernet = psenet.Supernet(model, self.space)
        config = replace(CONFIG, epochs=max(1, round(length * self.epochs)), learning_rate=LEARNING_RATE)
        start = time.perf_counter()
        train_supernet(supernet, self.loader(seed), strategy=strategy, config=config, seed=seed, show_progress=False)
        seconds = time.perf_counter() - start
        sides = (False, True) if strategy == "bilateral" else (False,)
        scores = np.mean([_scores(supernet, self.truth.widths, self.data, from_right=side) for side in sides], axis=0)
        point = {"strategy": strategy, "epochs": config.epochs, "seed": seed, "seconds": round(seconds, 1)}
        return point | {"mean_accuracy": round(float(scores.mean()), 2), **agreement(scores, self.truth)}

    def loader(self, seed: int) -> torch.utils.data.DataLoader:
        """Return the training batches in the order of a seed."""
        return make_loader(self.data.train, batch_size=BATCH_SIZE, shuffle=True, seed=seed)


@dataclass(frozen=True)
class _Side:
    """The subnets of one side, as scoring wants them."""

    supernet: psenet.Supernet
    from_right: bool

    def subnet(self, widths: Widths, /) -> nn.Module:
        return self.supernet.subnet(widths, from_right=self.from_right)

    def parameters(self) -> Any:
        return self.supernet.parameters()


def _scores(supernet: psenet.Supernet, widths: Sequence[Widths], data: DataSplits, *, from_right: bool) -> np.ndarray:
    validation = torch.utils.data.Subset(data.validation, range(NUM_VALIDATION))
    score: Callable[[Widths], float] = SupernetScore(
        _Side(supernet, from_right),
        make_loader(data.calibration, batch_size=100, shuffle=False),
        make_loader(validation, batch_size=500, shuffle=False),
        device=next(supernet.parameters()).device,
    )
    return np.array([score(setting) for setting in widths])


def agreement(scores: np.ndarray, truth: Truth) -> dict[str, float]:
    """Return how well scores rank the subnets."""
    band = truth.in_band
    pairs = {"": (scores, truth.accuracies), "_in_band": (scores[band], truth.accuracies[band])}
    return {
        f"{name}{where}": round(float(measure(*pair)[0]), 3)  # pyright: ignore[reportArgumentType, reportIndexIssue]
        for name, measure in (("tau", kendalltau), ("rho", spearmanr))
        for where, pair in pairs.items()
    }


def summary(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over the seeds, a row for each strategy and number of epochs."""
    keys = ("seconds", "mean_accuracy", "tau", "tau_in_band", "rho", "rho_in_band")
    rows = []
    for strategy, epochs in dict.fromkeys((point["strategy"], point["epochs"]) for point in points):
        some = [point for point in points if (point["strategy"], point["epochs"]) == (strategy, epochs)]
        spread = {
            key: {
                "mean": round(float(np.mean([point[key] for point in some])), 3),
                "std": round(float(np.std([point[key] for point in some], ddof=min(1, len(some) - 1))), 3),
            }
            for key in keys
        }
        rows.append({"strategy": strategy, "epochs": epochs, **spread})
    return rows


def time_to_reach(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | str]]:
    """Return after what share of a rival's whole time `parallel` has what the rival has at its end.

    Between the points of `parallel`, means over the seeds are joined by straight lines.
    """
    ours = sorted((row for row in rows if row["strategy"] == "parallel"), key=lambda row: row["epochs"])
    found: dict[str, dict[str, float | str]] = {}
    for rival in dict.fromkeys(row["strategy"] for row in rows if row["strategy"] != "parallel"):
        end = max((row for row in rows if row["strategy"] == rival), key=lambda row: row["epochs"])
        found[rival] = {
            key: _share_of_time(ours, key, end[key]["mean"], end["seconds"]["mean"]) for key in ("mean_accuracy", "tau")
        }
    return found


def _share_of_time(ours: Sequence[dict[str, Any]], key: str, target: float, seconds: float) -> float | str:
    before = None
    for row in ours:
        now, reached = row["seconds"]["mean"], row[key]["mean"]
        if reached >= target:
            if before is None:
                return f"at most {now / seconds:.2f}"
            then, had = before
            return round((then + (now - then) * (target - had) / (reached - had)) / seconds, 3)
        before = now, reached
    return "not reached"


if __name__ == "__main__":
    main()
