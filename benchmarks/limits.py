"""Time and memory of what is large: a large net, a deep one, a long search, a study of many trials.

    python benchmarks/limits.py                     all, some fifteen minutes on one core
    python benchmarks/limits.py --cases trace deep

Every case runs in a process of its own, whose largest memory (resident set) is told, and that of the libraries alone.
Candidates are scored by a sum over their widths, which takes no time: what is left is the search's own.
"""

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import torch
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import create_trial
from torch import nn

import psenet
from evidence import RESULTS, commit, write_result
from psenet.images import FilePool
from psenet.predictor import Predictor
from psenet.sampler import width_distributions
from psenet.storage import open_study
from psenet.training import make_strategy

_SUBNETS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--alone", choices=CASES, help="run this case here and print its figures")
    arguments = parser.parse_args()
    if arguments.alone:
        torch.manual_seed(0)
        before = peak_mib()
        figures = CASES[arguments.alone]()
        print(json.dumps({**figures, "libraries_mib": before, "peak_mib": peak_mib()}))
        return
    cases = earlier() | {name: {"commit": commit(), **run_alone(name)} for name in arguments.cases}
    print(f"figures: {write_result('limits', {'threads': torch.get_num_threads(), 'cases': cases}, seed=0)}")


def earlier() -> dict[str, Any]:
    """Return the figures of earlier runs, for cases that are not run again."""
    path = RESULTS / "limits.json"
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    return {name: {"commit": before["commit"], **figures} for name, figures in before["cases"].items()}


def run_alone(name: str) -> dict[str, Any]:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--alone", name]
    figures = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    print(name, json.dumps(figures), flush=True)
    return figures


def peak_mib() -> int:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def seconds_of(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    do()
    return round(time.perf_counter() - begin, 3)


# Nets -----------------------------------------------------------------------------------------------------------------


def deep_net(num_layers: int, channels: int = 16) -> nn.Module:
    """Return so many convolutions with batch norms in a row, a group of channels each."""
    layers: list[nn.Module] = []
    inputs = 3
    for number in range(num_layers):
        layers += [nn.Conv2d(inputs, channels, 3, 2 if number == 0 else 1, 1, bias=False)]
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(weights=None)


def trace_resnet50() -> dict[str, Any]:
    model, x = resnet50(), torch.randn(1, 3, 224, 224)
    found: list[psenet.WidthSpace] = []
    seconds = seconds_of(lambda: found.append(psenet.trace(model, x)))
    return {"groups": len(found[0].groups), "seconds": seconds}


def plain_step() -> dict[str, Any]:
    model, x = resnet50(), torch.randn(16, 3, 224, 224)
    return steps(lambda: model(x.to(memory_format=torch.channels_last)).sum().backward())


def parallel_step() -> dict[str, Any]:
    """Train eight subnets at full width, the most that a step can take."""
    model, x = resnet50(), torch.randn(16, 3, 224, 224)
    space = psenet.trace(model, torch.randn(1, 3, 64, 64))
    supernet = psenet.Supernet(model, space)
    rng = np.random.default_rng(0)
    widths = [space.full(), *(space.sample(rng) for _ in range(_SUBNETS - 1))]
    return steps(lambda: supernet(x, widths).sum().backward())


def steps(step: Callable[[], object]) -> dict[str, Any]:
    step()
    return {"seconds": float(np.median([seconds_of(step) for _ in range(3)]))}


def deep() -> dict[str, Any]:
    """Trace, train and search nets of 50 and of 200 groups."""
    return {f"{num} groups": deep_case(num) for num in (50, 200)}


def deep_case(num_groups: int) -> dict[str, Any]:
    model, x = deep_net(num_groups), torch.randn(16, 3, 32, 32)
    begin = time.perf_counter()
    space = psenet.trace(model, x[:1], divisor=4)
    traced = time.perf_counter()
    supernet, strategy = psenet.Supernet(model, space), make_strategy("parallel", space, num_subnets=4, seed=0)
    return {
        "groups": len(space.groups),
        "trace_seconds": round(traced - begin, 2),
        "plain_step_seconds": steps(lambda: model(x).sum().backward())["seconds"],
        "parallel_step_seconds": steps(lambda: supernet(x, strategy.next_widths()).sum().backward())["seconds"],
        "candidate_ms": round(seconds_of(lambda: search(space, 200)) * 1000 / 200, 2),
    }


# Images ---------------------------------------------------------------------------------------------------------------


def huge_jpeg() -> dict[str, Any]:
    """Read a JPEG of 30,000 x 30,000 pixels; it is made in another process, whose memory is not counted."""
    side = 30_000
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/huge.jpg"
        make = f"from PIL import Image; Image.new('RGB', ({side}, {side}), (200, 90, 30)).save({path!r})"
        subprocess.run([sys.executable, "-c", make], check=True)
        read: list[torch.Tensor] = []
        seconds = seconds_of(lambda: read.append(FilePool([path], np.zeros(1, dtype=np.int64)).read(0)))
        return {"side": side, "side_read": read[0].shape[1], "seconds": seconds}


# Studies --------------------------------------------------------------------------------------------------------------


def search(space: psenet.WidthSpace, num_evaluations: int, storage: str | None = None) -> list[float]:
    """Search with a predictor; return when each candidate was done, after the beginning, in seconds."""
    moments, begin = [], time.perf_counter()
    psenet.search(
        space,
        psenet.Budget(macs="50%"),
        score,
        num_evaluations=num_evaluations,
        predictor=Predictor.untrained(space),
        storage=storage,
        progress=lambda _: moments.append(time.perf_counter() - begin),
    )
    return moments


def score(widths: psenet.Widths) -> float:
    return float(sum(width ** (0.3 + number % 5 / 10) for number, width in enumerate(widths.values())))


def small_space() -> psenet.WidthSpace:
    """Return a space of twenty groups of eight widths."""
    return psenet.trace(deep_net(20, 64), torch.randn(1, 3, 16, 16), min_ratio=0.1)


def long_search() -> dict[str, Any]:
    moments = search(small_space(), 10_000)
    per_candidate = np.diff(moments) * 1000
    return {
        "candidates": len(moments),
        "seconds": round(moments[-1], 1),
        "ms_of_candidate_1000": round(float(np.median(per_candidate[900:1100])), 2),
        "ms_of_candidate_10000": round(float(np.median(per_candidate[-200:])), 2),
    }


def in_memory() -> dict[str, Any]:
    storage = InMemoryStorage()
    space, num = fill(storage, 100_000)
    with patch("psenet.storage.open_storage", lambda _: storage):
        return go_on(space, num, None)


def in_a_journal() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, backend = Path(folder) / "study.journal", _Logs()
        space, num = fill(JournalStorage(backend), 100_000)
        JournalFileBackend(str(path)).append_logs(backend.logs)
        del backend
        return {**go_on(space, num, str(path)), "file_mb": round(path.stat().st_size / 1e6)}


def in_sqlite() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.db"
        space, num = fill(optuna.storages.RDBStorage(f"sqlite:///{path}"), 5_000)
        return {**go_on(space, num, f"sqlite:///{path}"), "file_mb": round(path.stat().st_size / 1e6)}


class _Logs(BaseJournalBackend):
    """A journal in memory, written to a file at the end: a file of its own is locked and flushed for every record."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs += logs

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        yield from self.logs[log_number_from:]


def fill(storage: BaseStorage, num: int) -> tuple[psenet.WidthSpace, int]:
    """Put a study of so many evaluations into a storage."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = small_space()
    distributions = width_distributions(space)
    with patch("psenet.storage.open_storage", lambda _: storage):
        study = open_study(None, "psenet", optuna.samplers.RandomSampler(), space)
    now = datetime.datetime(2026, 1, 1)
    budget = psenet.Budget(macs="50%")
    for number, widths in enumerate(psenet.Prior.uniform(space).sample(budget, num, np.random.default_rng(0))):
        trial = create_trial(params=dict(widths), distributions=distributions, value=score(widths))
        trial.datetime_start = trial.datetime_complete = now + datetime.timedelta(seconds=number)
        study.add_trial(trial)
    return space, num


def go_on(space: psenet.WidthSpace, num: int, storage: str | None) -> dict[str, Any]:
    """Open a study of so many evaluations, and score some candidates more."""
    moments = search(space, num + 40, storage)
    return {
        "trials": num,
        "open_seconds": round(moments[0], 2),
        "candidate_ms": round(float(np.median(np.diff(moments))) * 1000, 2),
        "slowest_candidate_ms": round(float(np.diff(moments).max()) * 1000, 2),
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "trace": trace_resnet50,
    "plain_step": plain_step,
    "parallel_step": parallel_step,
    "deep": deep,
    "huge_jpeg": huge_jpeg,
    "long_search": long_search,
    "study_in_memory": in_memory,
    "study_in_a_journal": in_a_journal,
    "study_in_sqlite": in_sqlite,
}

if __name__ == "__main__":
    main()
