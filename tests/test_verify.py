"""The supernet's ranking against subnets trained alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from colours import (
    EXAMPLE,
    export_weights_only,
    make_net,
    one_thread,
    prune_net,
    short_config,
    train_images,
    unseen_images,
    validation_images,
)
from psenet import Budget, InputError
from psenet.stages.run import Run
from psenet.stages.start import Job, start_run
from psenet.stages.verify import _renew, verify_ranking

_CONFIG = short_config(num_front_evaluations=8)
_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psenet.pipeline.export_model", export_weights_only)
        prune_net(out, config=_CONFIG)
    return out


def _open(run: Path, lines: list[str]) -> Run:
    """Open the run as another program would."""
    job = Job(
        model=make_net(),
        example_input=EXAMPLE,
        train_loader=train_images(),
        val_loader=validation_images(),
        test_loader=unseen_images(),
        budget=Budget(macs="50%"),
        config=_CONFIG,
        say=lines.append,
    )
    return start_run(job, run, resume=True)


def test_candidates_from_worst_to_best_are_trained_alone_and_compared(finished: Path):
    lines: list[str] = []
    record = verify_ranking(_open(finished, lines), 5)
    kept = json.loads((finished / "stages/ranking.json").read_text())
    assert kept == record and len(record["subnets"]) == 5
    candidates = json.loads((finished / "stages/evaluated.json").read_text())["candidates"]
    scores = sorted(one["score"] for one in candidates)
    taken = [one["score"] for one in record["subnets"]]
    assert taken == sorted(taken) and (taken[0], taken[-1]) == (scores[0], scores[-1])
    accuracies = [one["accuracy_alone"] for one in record["subnets"]]
    assert all(30 < accuracy <= 100 for accuracy in accuracies)  # three colours: chance is 33
    expected = float(kendalltau(taken, accuracies)[0])  # pyright: ignore[reportArgumentType]
    assert record["tau"] == (pytest.approx(expected, abs=1e-3) if expected == expected else 0)
    assert sum("training subnet" in line for line in lines) == 5 and lines[-1].startswith("Kendall's tau")
    # Nothing is trained twice.
    lines.clear()
    assert verify_ranking(_open(finished, lines), 5) == record
    assert not any("training subnet" in line for line in lines)


def test_too_few_subnets_and_unfinished_runs_are_refused(finished: Path, tmp_path: Path):
    with pytest.raises(InputError, match="a ranking needs at least 4 subnets to be verified; got 3"):
        verify_ranking(_open(finished, []), 3)
    with pytest.raises(InputError, match="has no scored candidates: finish its search first"):
        verify_ranking(_open(tmp_path / "new", []), 4)


def test_weights_that_cannot_be_made_anew_are_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = net[0].get_parameter("weight").clone()
    _renew(net)
    assert not torch.equal(before, net[0].get_parameter("weight"))
    net.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(InputError, match="cannot be trained alone from new weights: scale belong to modules"):
        _renew(net)


def test_estimates_are_not_compared(finished: Path, tmp_path: Path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = run / "stages/evaluated.json"
    content = json.loads(path.read_text())
    for one in content["candidates"][2:]:
        one["share"] = 0.5
    path.write_text(json.dumps(content))
    record = verify_ranking(_open(run, []), 4)
    assert [one["widths"] for one in record["subnets"]] == [
        one["widths"] for one in sorted(content["candidates"][:2], key=lambda one: one["score"])
    ]
