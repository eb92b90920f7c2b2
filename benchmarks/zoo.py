"""Which models psenet takes: trace, widths, equality and export over torchvision's and timm's CNNs.

    python benchmarks/zoo.py                         all of them, about two hours on one core
    python benchmarks/zoo.py --only timm:resnet18 torchvision:vgg11

The list follows a rule. From torchvision: every classification and segmentation model below 150M parameters, and of
the detectors what runs before boxes are decoded (backbone and dense heads). From timm: one model of every family, which
is a module of timm and a name up to its first digit; the one with the fewest parameters, below 60M. Only models where
convolutions wider than one pixel stand in four layers or more. Those in which attention (products of two activations)
does over 0.5 % of the MACs are *hybrids*, listed by themselves; where it does over a tenth, they are no convolutional
networks and left out.

Every finished model is kept in benchmarks/results/zoo.jsonl, so an interrupted run continues; at the end the table is
written to docs/zoo.md. With Torch-Pruning installed (`pip install torch-pruning`), it is asked the same. Everything
runs on one thread, and seconds are those of the processor.
"""

import argparse
import collections
import functools
import json
import re
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import psenet
from evidence import RESULTS, write_result
from psenet.cli.inspect import say_cause
from psenet.export import export_model
from psenet.inputs import tensors_in
from psenet.space import WidthSpace

SIZES = (96, 128, 160, 224, 256, 288, 299, 384)
LARGEST, LARGEST_OF_TORCHVISION = 60e6, 150e6
PATIENCE, PATIENCE_FOR_A_MILLION, MEMORY = 60, 5, 14 * 2**30
"""What Torch-Pruning may take for a model: seconds, more of them for every million parameters, and bytes of address
space. Some would run for ever or fill the machine."""
FORK = get_context("fork")
TABLE = Path(__file__).parent.parent / "docs" / "zoo.md"
NUM_CLASSES = 10
_PRODUCTS = ("bmm", "baddbmm", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models instead of the list")
    parser.add_argument("--workers", type=int, default=1, help="models studied at a time")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.only:
        for name in arguments.only:
            print(json.dumps(study(name), indent=2))
        return
    log = RESULTS / "zoo.jsonl"
    done = {record["model"]: record for record in _read(log)}
    names = [*torchvision_models(), *timm_models()]
    missing = sorted((name for name in names if name not in done), key=_num_parameters)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for record in pool.map(study, missing):
            done[record["model"]] = record
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(line(record), flush=True)
    records = [done[name] for name in names if done[name]["is_cnn"]]
    kinds = {"cnn": [record for record in records if not record["is_hybrid"]]}
    kinds["hybrid"] = [record for record in records if record["is_hybrid"]]
    summaries = {kind: summary(some) for kind, some in kinds.items()}
    print(f"figures: {write_result('zoo', {'summary': summaries, 'models': records})}")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(page(records))


# The list -------------------------------------------------------------------------------------------------------------


def torchvision_models() -> list[str]:
    """Return every image model of torchvision with convolutions."""
    from torchvision import models

    modules = (models, models.segmentation, models.detection)
    names = [f"torchvision:{name}" for module in modules for name in models.list_models(module=module)]
    return [name for name in names if 0 < _num_parameters(name) < LARGEST_OF_TORCHVISION]


def timm_models() -> list[str]:
    """Return the smallest model of every family of timm."""
    import timm
    from timm.models._registry import _model_to_module

    families: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for name in timm.list_models():
        families[_model_to_module[name], re.sub(r"\d.*", "", name).strip("_")].append(name)
    smallest = []
    for names in families.values():
        sizes = {name: size for name in names if (size := _num_parameters(f"timm:{name}"))}
        if sizes and min(sizes.values()) < LARGEST:
            smallest.append(f"timm:{min(sizes, key=lambda name: sizes[name])}")
    return smallest


@functools.cache
def _num_parameters(name: str) -> int:
    """Return a model's parameters, 0 where it is no CNN or cannot be built without its weights."""
    with suppress(Exception), torch.device("meta"):  # any model may refuse the meta device in its own way
        model = build(name)
        wide = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1]
        return sum(parameter.numel() for parameter in model.parameters()) if len(wide) >= 4 else 0
    return 0


def build(name: str) -> nn.Module:
    """Build a model of the list, without weights."""
    source, _, rest = name.partition(":")
    if source == "timm":
        import timm

        return timm.create_model(rest, num_classes=NUM_CLASSES).eval()
    from torchvision import models

    for module in (models.segmentation, models.detection):
        if rest in models.list_models(module=module):
            model = models.get_model(rest, weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
            return (model if module is models.segmentation else _Dense(model)).eval()
    return models.get_model(rest, weights=None, num_classes=NUM_CLASSES).eval()


class _Dense(nn.Module):
    """What of a detector runs before boxes are decoded, which depends on the data: its backbone and dense heads."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: torch.Tensor) -> object:
        return self.head(list(self.backbone(x).values()))


# One model ------------------------------------------------------------------------------------------------------------


def study(name: str) -> dict[str, Any]:
    """Return everything that is asked of one model."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    record: dict[str, Any] = {"model": name, "is_cnn": True}
    torch.manual_seed(0)
    try:
        model = build(name)
        x, flops = _input_for(model)
    except Exception as error:  # models raise anything; those that cannot run here are not in the list
        return record | {"is_cnn": False, "error": _say(error)}
    record |= {"image_size": x.shape[-1], "macs": sum(flops.values()) // 2}
    products = sum(count for op, count in flops.items() if any(word in op for word in _PRODUCTS))
    record["is_hybrid"] = products > 0.005 * sum(flops.values())
    if products > 0.1 * sum(flops.values()):
        return record | {"is_cnn": False, "error": "attention does over a tenth of the MACs"}
    start = time.process_time()
    try:
        space = psenet.trace(model, x)
    except Exception as error:  # what the benchmark counts
        other = _torch_pruning(name, x)
        return record | {"error": _say(error), "seconds": round(time.process_time() - start, 2), "torch_pruning": other}
    record |= {"seconds": round(time.process_time() - start, 2), "groups": len(space.groups)}
    record |= {
        "elastic_share": round(space.elastic_share(), 4),
        "smallest_share": _share(space),
        "frozen": _reasons(space),
    }
    for key, check in (("difference", _difference), ("onnx", _onnx)):
        try:
            record[key] = check(model, space, x)
        except Exception as error:  # what the benchmark counts
            record[key] = _say(error)
    return record | {"torch_pruning": _torch_pruning(name, x)}


def _input_for(model: nn.Module) -> tuple[torch.Tensor, dict[str, int]]:
    """Return the smallest input that the model takes, and its FLOPs by op."""
    for size in SIZES:
        x = torch.randn(1, 3, size, size)
        try:
            # The counter knows attention only as the products that it is made of.
            with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(x)
            return x, {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
        except (RuntimeError, ValueError, AssertionError, IndexError):
            if size == SIZES[-1]:
                raise
    raise AssertionError("unreachable")


def _share(space: WidthSpace) -> float:
    return round(space.macs(space.smallest()) / space.macs(space.full()), 4)


def _reasons(space: WidthSpace) -> dict[str, float]:
    shares: dict[str, float] = collections.defaultdict(float)
    for frozen in space.frozen:
        shares[say_cause(frozen.reason)] += frozen.macs_share
    return {reason: round(share, 4) for reason, share in sorted(shares.items(), key=lambda item: -item[1])[:5]}


def _difference(model: nn.Module, space: WidthSpace, x: torch.Tensor) -> float:
    """Return the largest relative difference of the parallel pass from three extracted nets, eval mode, float64."""
    rng = np.random.default_rng(0)
    supernet = psenet.Supernet(model, space).double().eval()
    widths = [space.sample(rng) for _ in range(3)]
    batch = torch.randn(6, *x.shape[1:], dtype=torch.float64)
    worst = 0.0
    with torch.no_grad():
        together = tensors_in(supernet(batch, widths))
        for number, setting in enumerate(widths):
            for net in (supernet.extract(setting), supernet.subnet(setting)):
                for ours, alone in zip(together, tensors_in(net(batch[number::3])), strict=True):
                    scale = alone.abs().max().clamp_min(1e-300)  # fresh nets can have outputs near zero
                    worst = max(worst, float((ours[number::3] - alone).abs().max() / scale))
    return worst


def _onnx(model: nn.Module, space: WidthSpace, x: torch.Tensor) -> bool:
    widths = space.uniform(0.5)
    with tempfile.TemporaryDirectory() as folder:
        report = export_model(psenet.Supernet(model, space).extract(widths), x, folder, widths=widths)
    return "model.onnx" in report.paths


def _torch_pruning(name: str, x: torch.Tensor) -> dict[str, Any] | str:
    """Ask Torch-Pruning in a process of its own, which can be stopped."""
    if find_spec("torch_pruning") is None:
        return "not installed"
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_prune_by_torch_pruning, args=(name, x, sender))
    process.start()
    patience = max(PATIENCE, PATIENCE_FOR_A_MILLION * _num_parameters(name) // 1_000_000)
    try:
        if not receiver.poll(patience):
            return f"not done in {patience} s"
        return receiver.recv()
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()


def _prune_by_torch_pruning(name: str, x: torch.Tensor, answer: Connection) -> None:
    """Say whether its model still runs with a quarter of the channels, and its share of the MACs."""
    import torch_pruning  # pyright: ignore[reportMissingImports]

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        model = build(name)
        heads = [
            layer
            for layer in model.modules()
            if NUM_CLASSES in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
        ]
        before, _ = torch_pruning.utils.count_ops_and_params(model, x)
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, x, importance=importance, pruning_ratio=0.75, ignored_layers=heads, round_to=8
        )
        pruner.step()
        model(x)
        after, _ = torch_pruning.utils.count_ops_and_params(model, x)
        answer.send({"smallest_share": round(after / before, 4)})
    except Exception as error:  # what the benchmark counts
        answer.send(_say(error))


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


# What a person reads --------------------------------------------------------------------------------------------------


def line(record: dict[str, Any]) -> str:
    """Return one model's row of the table."""
    other = record.get("torch_pruning", "")
    cells = [
        record["model"],
        record.get("seconds", ""),
        record.get("groups", ""),
        _percent(record.get("elastic_share")),
        _percent(record.get("smallest_share")),
        f"{record['difference']:.0e}" if isinstance(record.get("difference"), float) else record.get("difference", ""),
        {True: "yes", False: "no"}.get(record.get("onnx"), record.get("onnx", "")),  # pyright: ignore[reportArgumentType, reportCallIssue]
        _percent(other["smallest_share"]) if isinstance(other, dict) else other[:60],
        record.get("error") or next(iter(record.get("frozen", {})), ""),
    ]
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def page(records: list[dict[str, Any]]) -> str:
    """Return the page of the documentation."""
    cnns, hybrids = ([record for record in records if record["is_hybrid"] == is_hybrid] for is_hybrid in (False, True))
    head = (
        "# Which models psenet takes\n\nMade by `python benchmarks/zoo.py`; the list follows a rule, see there. "
        "*Seconds* are those of tracing and proving on one thread; *elastic* is the share of the MACs of which at "
        "least one side can vary, *smallest* the reachable share of the MACs, *difference* that of the parallel pass "
        "from extracted nets (relative, float64), *Torch-Pruning* its share of the MACs when asked for a quarter of "
        "the channels, or its error.\n\n"
    )
    return head + _section("Convolutional nets", cnns) + _section("Hybrids with a little attention", hybrids)


def _section(title: str, records: list[dict[str, Any]]) -> str:
    counts = "\n".join(f"- {key}: {value}" for key, value in summary(records).items())
    columns = "| model | seconds | groups | elastic | smallest | difference | ONNX | Torch-Pruning | why not more |\n"
    rows = "\n".join(line(record) for record in records)
    missed = "\n".join(f"- `{record['model']}`: {miss}" for record in records if (miss := _miss(record)))
    missed = f"What misses something, and why:\n\n{missed}\n\n" if missed else ""
    return f"## {title}\n\n{counts}\n\n{missed}{columns}{'| --- ' * 9}|\n{rows}\n\n"


def _miss(record: dict[str, Any]) -> str:
    """Say in what a model misses the aims: traced, 90 % of the MACs elastic, equal, exported."""
    if "groups" not in record:
        return f"not traced ({record['error']})"
    found = []
    if record["elastic_share"] < 0.9:
        causes = ", ".join(f"{reason} {share:.0%}" for reason, share in record["frozen"].items() if share >= 0.01)
        found.append(f"{record['elastic_share']:.0%} elastic (frozen: {causes})")
    if not (isinstance(record["difference"], float) and record["difference"] <= 1e-9):
        found.append(f"not equal ({record['difference']})")
    if record["onnx"] is not True:
        found.append(f"not exported to ONNX ({record['onnx']})")
    return "; ".join(found)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over some models."""
    traced = [record for record in records if "groups" in record]
    theirs = {record["model"] for record in records if isinstance(record["torch_pruning"], dict)}
    ours = {record["model"] for record in traced}
    return {
        "models": len(records),
        "traced": len(traced),
        "median seconds": round(float(np.median([record["seconds"] for record in traced] or [0])), 2),
        "with at least 90 % of the MACs elastic": sum(record["elastic_share"] >= 0.9 for record in traced),
        "equal to 1e-9": sum(isinstance(r["difference"], float) and r["difference"] <= 1e-9 for r in traced),
        "exported to ONNX": sum(record["onnx"] is True for record in traced),
        "pruned by Torch-Pruning": len(theirs),
        "pruned by Torch-Pruning and not by psenet": ", ".join(sorted(theirs - ours)) or "none",
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for text in path.read_text().splitlines():
            yield json.loads(text)


if __name__ == "__main__":
    main()
