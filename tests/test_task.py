"""Tasks of one's own: `psenet.prune` with any loss, score, outputs and labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import psenet
from colours import export_weights_only, one_thread, short_config
from psenet import Budget, InputError, PruneResult, Task
from psenet.evaluate import batch_difference
from psenet.training.losses import cross_entropy

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
SIZE = 8


class _Spots(Dataset):
    """Noise with a bright square; labels are the mask of the square, and where its middle is."""

    def __init__(self, count: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images_NCHW = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
        self.places_N2 = torch.randint(1, SIZE - 1, (count, 2), generator=generator)
        self.masks_NHW = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
        for image_CHW, mask_HW, (y, x) in zip(self.images_NCHW, self.masks_NHW, self.places_N2.tolist(), strict=True):
            mask_HW[y - 1 : y + 2, x - 1 : x + 2] = 1
            image_CHW += mask_HW

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.images_NCHW[index], {"mask": self.masks_NHW[index], "place": self.places_N2[index] / SIZE}


class _Masks(_Spots):
    """With one tensor for labels; the border does not count."""

    def __getitem__(self, index: int) -> Any:
        mask_HW = self.masks_NHW[index].clone()
        mask_HW[0] = -100
        return self.images_NCHW[index], mask_HW


class _TwoAnswers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.mask, self.place = nn.Conv2d(16, 2, 1), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"mask": self.mask(y), "place": self.place(y.mean((2, 3)))}


class _OneAnswer(_TwoAnswers):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x)["mask"]


def _both_losses(outputs: Any, labels: Any) -> torch.Tensor:
    dense_BHW = nn.functional.cross_entropy(outputs["mask"], labels["mask"], reduction="none")
    return dense_BHW.mean((1, 2)) + (outputs["place"] - labels["place"]).square().sum(1)


def _overlap(module: nn.Module, batches: Any) -> float:
    """Return the intersection over union of all squares, in percent."""
    both, any_of_both = 0, 0
    for x, labels in batches:
        assert not module.training and not torch.is_grad_enabled()
        found_BHW, true_BHW = module(x)["mask"].argmax(1) == 1, labels["mask"] == 1
        both += int((found_BHW & true_BHW).sum())
        any_of_both += int((found_BHW | true_BHW).sum())
    return 100 * both / max(any_of_both, 1)


def _loader(kind: type[_Spots], count: int, seed: int) -> DataLoader:
    return DataLoader(kind(count, seed=seed), 16, shuffle=seed == 0, generator=torch.Generator().manual_seed(0))


def _prune(kind: type[_Spots], model: nn.Module, out: Path, task: Task | None, **settings: Any) -> PruneResult:
    return psenet.prune(
        model,
        torch.zeros(1, 3, SIZE, SIZE),
        _loader(kind, 96, 0),
        _loader(kind, 48, 1),
        test_loader=_loader(kind, 64, 2),
        budget=Budget(macs="50%"),
        config=short_config(**settings),
        task=task,
        out=out,
    )


@pytest.fixture(autouse=True)
def _quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psenet.pipeline.export_model", export_weights_only)


@pytest.mark.parametrize("strategy", ["parallel", "bilateral", "single-path"])
def test_outputs_and_labels_may_be_dicts(strategy: str, tmp_path: Path):
    task = Task(loss_fn=_both_losses, score_fn=_overlap, score_name="IoU")
    result = _prune(_Spots, _TwoAnswers(), tmp_path / "run", task, strategy=strategy)
    record = result.record
    assert (record["score_name"], record["score_unit"]) == ("IoU", "%")
    with torch.no_grad():
        expected = _overlap(result.model.eval(), _loader(_Spots, 64, 2))
    assert record["pruned"]["accuracy"] == pytest.approx(expected, abs=1e-3)
    assert record["baseline"]["accuracy"] > 10  # it learned something
    assert record["pruned"]["macs"] <= 0.5 * record["baseline"]["macs"]


def test_dense_labels_need_no_task(tmp_path: Path):
    result = _prune(_Masks, _OneAnswer(), tmp_path / "run", None)
    assert result.record["baseline"]["accuracy"] > 50
    assert (result.record["score_name"], result.record["score_unit"]) == ("accuracy", "%")


def test_candidates_are_compared_by_the_search_score(tmp_path: Path):
    asked: list[str] = []

    def smooth(module: nn.Module, batches: Any) -> float:
        asked.append("search")
        return -float(torch.cat([_both_losses(module(x), labels) for x, labels in batches]).mean())

    task = Task(loss_fn=_both_losses, score_fn=_overlap, search_score_fn=smooth)
    record = _prune(_Spots, _TwoAnswers(), tmp_path / "run", task).record
    assert len(asked) == 6 == record["search"]["num_evaluations"]
    assert record["search"]["best_score"] < 0 <= record["pruned"]["accuracy"]


def test_a_loss_of_ones_own_wants_a_score_of_ones_own():
    with pytest.raises(InputError, match="a task with a loss of its own needs a score_fn of its own"):
        Task(loss_fn=_both_losses)


def test_distillation_of_what_are_no_logits_is_refused(tmp_path: Path):
    task = Task(loss_fn=_both_losses, score_fn=_overlap)
    learned = psenet.TrainConfig(epochs=1, distill_weight=0.5)
    with pytest.raises(InputError, match=r"distillation is for logits of shape \(B, classes\); set distill_weight=0"):
        _prune(_Spots, _TwoAnswers(), tmp_path / "run", task, finetune=learned)


def test_cross_entropy_of_dense_labels_is_the_mean_over_the_places_that_count():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 4, 4), torch.randint(0, 5, (3, 4, 4))
    labels[0, :2] = -100
    labels[2] = -100
    losses = cross_entropy()(logits, labels)
    expected = []
    for sample, target in zip(logits, labels, strict=True):
        rows = [-sample[:, y, x].log_softmax(0)[target[y, x]] for y in range(4) for x in range(4) if target[y, x] >= 0]
        expected.append(sum(rows) / len(rows) if rows else torch.tensor(0.0))
    torch.testing.assert_close(losses, torch.stack(expected))


def test_the_error_of_a_difference_comes_from_the_batches():
    one, other = nn.Flatten(), nn.Flatten()
    scores = {id(one): [1.0, 2.0, 6.0], id(other): [0.0, 2.0, 1.0]}

    def score(module: nn.Module, batches: Any) -> float:
        return sum(scores[id(module)][batch] for batch in batches) / len(batches)

    difference, error = batch_difference(one, other, [0, 1, 2], score)
    assert difference == pytest.approx(2)
    assert error == pytest.approx(torch.tensor([1.0, 0, 5]).std().item() / 3**0.5)
    assert batch_difference(one, other, [2], score) == (5, float("inf"))
