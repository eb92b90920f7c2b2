"""Finished runs made without training, of nets whose answers are known."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from psenet.artifact import save_weights
from psenet.models import digits_resnet
from psenet.reading import trace
from psenet.supernet import Supernet

MODEL = "psenet.models:digits_resnet"


def always(net: nn.Module, says: int) -> nn.Module:
    """Make a net that says one class whatever it sees."""
    last = net.get_submodule("fc")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(nn.functional.one_hot(torch.tensor(says), last.out_features))
    return net


def make_run(
    folder: Path,
    *,
    baseline: int = 0,
    pruned: int = 1,
    rival: int | None = None,
    kept: str = "searched",
    data: str = "digits",
    seed: int = 0,
    num_classes: int = 10,
    in_channels: int = 1,
    size: int = 8,
    batches: dict[str, int | None] | None = None,
) -> Path:
    """Write what a finished run leaves, as far as it is read again.

    Args:
        folder: The run directory, made.
        baseline: The class that the baseline always says.
        pruned: The class that the pruned net always says.
        rival: The class of the net that was not kept; None for none.
        kept: Which of the two the pruned net is.
        data: As in the recipe.
        seed: As in the recipe.
        num_classes: Of the nets.
        in_channels: Of the images.
        size: Height and width of the images.
        batches: As in the recipe; by default those of the digits.
    """
    (folder / "stages").mkdir(parents=True)
    torch.manual_seed(0)
    net = digits_resnet(num_classes=num_classes, in_channels=in_channels)
    space = trace(net, torch.zeros(1, in_channels, size, size))
    widths, supernet = space.uniform(0.5), Supernet(net, space)
    save_weights(always(supernet.extract(widths), pruned), folder / "model", widths=widths)
    if rival is not None:
        other = {"searched": "uniform", "uniform": "searched"}[kept]
        left = always(supernet.extract(space.uniform(0.75)), rival)
        save_file(left.state_dict(), folder / "stages" / f"{other}.safetensors")
    save_file(always(net, baseline).state_dict(), folder / "stages" / "baseline.safetensors")
    recipe: dict[str, Any] = {
        "model": MODEL,
        "data": data,
        "input_shape": [in_channels, size, size],
        "batches": batches or {"train": 7, "calibration": 1, "validation": 1, "test": 3},
        "settings": {"seed": seed},
    }
    record = {
        "format": 1,
        "model": MODEL,
        **{name: {"macs": macs} for name, macs in (("baseline", 4_000_000), ("pruned", 1_230_000))},
        **{name: {"macs": 1_500_000} for name in ("uniform", "searched")},
        "search": {"kept": kept},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "result.json").write_text(json.dumps(record))
    return folder
