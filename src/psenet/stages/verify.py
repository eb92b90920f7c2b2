"""Verify the supernet's ranking: does it put subnets in the order that they have when each is trained alone?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from psenet import ranks
from psenet.devices import on_device
from psenet.errors import InputError, first_line
from psenet.rundir import read_json, write_json
from psenet.stages.run import Run
from psenet.supernet import Supernet
from psenet.training.plain import train_model
from psenet.widths import Widths

RANKING = "stages/ranking.json"
_LEAST = 4
"""With fewer subnets a rank correlation says nothing."""


def verify_ranking(run: Run, num_subnets: int) -> Mapping[str, Any]:
    """Train scored candidates alone, from new weights by the baseline's recipe, and compare the two orders.

    Candidates are taken evenly from the worst to the best score. Accuracies are on validation data. What is trained is
    kept, so an interrupted verification goes on.

    Args:
        run: A run whose search is finished.
        num_subnets: At least 4; as many trainings.

    Returns:
        `subnets` (widths, score, accuracy_alone), `tau` (Kendall's, of scores and accuracies), `by_macs_tau` (of MACs
        and accuracies: what one would know without a supernet).

    Raises:
        InputError: Too few subnets, no scored candidates, or a layer whose weights cannot be made anew.
    """
    if num_subnets < _LEAST:
        raise InputError(f"a ranking needs at least {_LEAST} subnets to be verified; got {num_subnets}")
    path = run.folder.file(RANKING)
    chosen = ranks.from_main(lambda: _spread(_candidates(run), num_subnets))
    alone = ranks.from_main(lambda: _trained_before(path))
    done: list[dict[str, Any]] = []
    for number, one in enumerate(chosen, 1):
        widths = Widths(one["widths"])
        if widths not in alone:
            run.say(f"training subnet {number} of {len(chosen)} alone, to verify the ranking")
            alone[widths] = _train_alone(run, widths, number)
        done.append({**one, "accuracy_alone": alone[widths]})
        ranks.in_main(lambda: write_json(path, _record(done)))
    record = _record(done)
    run.say(
        f"Kendall's tau with the {run.task.score_name} of {len(done)} subnets trained alone: of the supernet's scores "
        f"{record['tau']:.2f}, of MACs {record['by_macs_tau']:.2f}"
    )
    return record


def _trained_before(path: Path) -> dict[Widths, float]:
    """Return the accuracies that an interrupted verification has kept.

    Raises:
        InputError: Its file is damaged.
    """
    if not path.exists():
        return {}
    remedy = "delete it to train its subnets again"
    content = read_json(path, remedy=remedy)
    try:
        return {Widths(one["widths"]): float(one["accuracy_alone"]) for one in content["subnets"]}
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged; {remedy}: {first_line(error)}") from error


def _record(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from scipy.stats import kendalltau

    accuracies = [one["accuracy_alone"] for one in done]
    taus = {}
    for name, key in (("tau", "score"), ("by_macs_tau", "macs")):
        statistic = math.nan if len(done) < 2 else float(kendalltau([one[key] for one in done], accuracies)[0])  # pyright: ignore[reportArgumentType]
        taus[name] = round(statistic, 3) if np.isfinite(statistic) else 0.0  # equal values put nothing in order
    return {"subnets": [{key: one[key] for key in ("widths", "score", "accuracy_alone")} for one in done], **taus}


def _candidates(run: Run) -> list[dict[str, Any]]:
    path = run.folder.path / "stages/evaluated.json"
    if not path.exists():
        raise InputError(f"the run in {run.folder.path} has no scored candidates: finish its search first")
    remedy = "delete it, with stages/search.json, and search again"
    content = read_json(path, remedy=remedy)
    candidates = content.get("candidates") if isinstance(content, dict) else None
    if not (isinstance(candidates, list) and candidates and all(_is_candidate(one) for one in candidates)):
        raise InputError(f"{path} must hold the candidates that a search has scored; {remedy}")
    return [one for one in candidates if one.get("share", 1) == 1]  # others have estimates


def _is_candidate(one: object) -> bool:
    return isinstance(one, dict) and one.keys() >= {"widths", "score", "macs"}


def _spread(candidates: Sequence[dict[str, Any]], num: int) -> list[dict[str, Any]]:
    """Return candidates at even distances in the order of their scores."""
    ordered = sorted(candidates, key=lambda one: one["score"])
    places = np.unique(np.linspace(0, len(ordered) - 1, num).round().astype(int))
    return [ordered[place] for place in places]


def _train_alone(run: Run, widths: Widths, number: int) -> float:
    net = Supernet(run.model, run.space).extract(widths)
    run.seed(8 + number)
    _renew(net)
    train_model(
        net,
        run.loaders.train,
        config=run.config.baseline,
        loss_fn=run.task.loss(run.config.baseline),
        description=f"alone {number}",
        show_progress=run.show_progress,
    )
    with on_device(net, run.device):
        return round(run.score(net), 4)


def _renew(net: nn.Module) -> None:
    """Give every layer new weights, as if the net had just been built.

    Raises:
        InputError: Some parameters are no layer's own; they are named.
    """
    renewed: set[int] = set()
    for layer in net.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
            renewed |= {id(parameter) for parameter in layer.parameters(recurse=False)}
    left = [name for name, parameter in net.named_parameters() if id(parameter) not in renewed]
    if left:
        raise InputError(
            f"subnets of this model cannot be trained alone from new weights: {', '.join(left[:5])} belong to modules "
            "without reset_parameters"
        )
