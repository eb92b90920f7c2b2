"""The worked examples run, keep their budget by torch's own counter, and score as a slow hand would count."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from colours import count_params, export_weights_only, one_thread

EXAMPLES = Path(__file__).parent.parent / "examples"
_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports an example as Python finds it when it is run."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


# Each of them, whole --------------------------------------------------------------------------------------------------

FULL: dict[str, tuple[Callable[[ModuleType], nn.Module], tuple[int, ...], float]] = {
    "plain": (lambda module: module.Net(1, 10, width=16), (1, 8, 8), 40.0),
    "timm_model": (lambda module: module.timm.create_model("test_resnet", num_classes=3), (3, 32, 32), 60.0),
    "segmentation_camvid": (lambda module: module.UNet((8, 16, 24)), (3, 24, 32), 40.0),
    "detection_bccd": (lambda module: module.Detector((8, 16, 24)), (3, 48, 64), 40.0),
    "own_loop": (lambda module: module.Denoiser(width=16), (1, 8, 8), 10.0),
}
"""The model of each trial, its input, and a score, far above chance, that its nets must have."""
ARGUMENTS = {"timm_model": ["--model", "test_resnet"]}


def count_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    module.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", FULL)
def test_an_example_halves_the_macs_and_keeps_its_score(
    name: str, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if name != "segmentation_camvid":  # which is exported whole: transposed convolutions and concatenations
        monkeypatch.setattr("psenet.pipeline.export_model", export_weights_only)
    before = {path: path.read_bytes() for path in (EXAMPLES / "results").glob("*")}
    module = example(name)
    make, shape, least = FULL[name]
    result = module.main(["--tiny", "--out", str(tmp_path / "run"), *ARGUMENTS.get(name, [])])
    record, whole = result.record, make(module)
    assert (record["baseline"]["macs"], record["pruned"]["macs"]) == (
        count_macs(whole, shape),
        count_macs(result.model, shape),
    )
    assert (record["baseline"]["params"], record["pruned"]["params"]) == (
        count_params(whole),
        count_params(result.model),
    )
    assert record["pruned"]["macs"] <= 0.5 * record["baseline"]["macs"]
    assert record["uniform"]["macs"] <= 0.5 * record["baseline"]["macs"]
    assert min(record[net]["score"] for net in ("baseline", "pruned", "uniform")) > least
    assert not record.get("export_problems")
    # The figures of a trial are in its own folder, and those of real runs as they were.
    assert json.loads((tmp_path / "run" / f"{name}.json").read_text())["pruned"] == record["pruned"]
    assert {path: path.read_bytes() for path in (EXAMPLES / "results").glob("*")} == before
    assert f"{record['pruned']['score']:.2f} {record['score_unit']}" in capsys.readouterr().out


def test_a_folder_without_the_data_is_refused_with_what_it_must_hold(example: Any, tmp_path: Path):
    for name, missing in (("segmentation_camvid", "train/masks"), ("detection_bccd", "ImageSets/Main")):
        with pytest.raises(SystemExit, match=f"--data must be a folder with {missing} in it; got {tmp_path}.*--tiny"):
            example(name).main(["--data", str(tmp_path)])


def test_the_page_of_the_examples_shows_what_the_result_files_say():
    page, files = (EXAMPLES / "README.md").read_text(), sorted((EXAMPLES / "results").glob("*.json"))
    assert [file.stem for file in files] == sorted(FULL)
    for file in files:
        record = json.loads(file.read_text())
        assert record["command"] in page
        for net in ("baseline", "pruned", "uniform"):
            macs, score = f"{record[net]['macs'] / 1e6:.2f}M", f"{record[net]['score']:.2f} {record['score_unit']}"
            rows = [line for line in page.splitlines() if f"| {net} | {macs} |" in line and f"| {score} |" in line]
            assert len(rows) == 1, f"{file.stem}, {net}: {macs}, {score}"


# Segmentation ---------------------------------------------------------------------------------------------------------


def slow_mean_iou(found_NHW: torch.Tensor, true_NHW: torch.Tensor, num_classes: int) -> float:
    """Return the mean IoU in percent, from sets of places."""
    found, true = found_NHW.flatten().tolist(), true_NHW.flatten().tolist()
    places = [place for place, label in enumerate(true) if label != -100]
    shares = []
    for number in range(num_classes):
        of_found, of_true = ({place for place in places if labels[place] == number} for labels in (found, true))
        if of_found | of_true:
            shares.append(len(of_found & of_true) / len(of_found | of_true))
    return 100 * sum(shares) / len(shares)


def test_mean_iou_is_that_of_sets_of_places_and_leaves_out_void(example: Any):
    module = example("segmentation_camvid")
    torch.manual_seed(0)
    logits = torch.randn(5, module.NUM_CLASSES, 6, 7)
    logits[:, 9] = -100.0  # class 9 is neither there nor found, and must not count as zero or as right
    labels = torch.randint(0, 9, (5, 6, 7))
    labels[torch.rand(labels.shape) < 0.3] = -100
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    expected = slow_mean_iou(logits.argmax(1), labels, module.NUM_CLASSES)
    assert module.mean_iou(nn.Identity(), batches) == pytest.approx(expected)
    assert 0 < expected < 40


def test_mean_iou_by_hand(example: Any):
    module = example("segmentation_camvid")
    true = torch.tensor([[[0, 0, 1, -100]]])
    found = torch.tensor([[[0, 1, 1, 1]]])
    # Class 0: one of two; class 1: one of two, the void place not among them.
    assert module.iou_of(module.count_pairs(found, true)) == pytest.approx(50.0)


def test_scenes_are_scaled_without_mixing_classes_and_mirrored_together(example: Any, tmp_path: Path):
    module = example("segmentation_camvid")
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    mask_HW = np.zeros((8, 16), dtype=np.uint8)
    mask_HW[:, 10:] = 7
    mask_HW[0:2] = 11
    Image.fromarray(mask_HW).save(tmp_path / "masks" / "a.png")
    Image.fromarray(np.stack([mask_HW * 20] * 3, axis=2)).save(tmp_path / "images" / "a.jpg", quality=100)
    scenes = module.read_scenes(tmp_path, (8, 4), mirror=True)
    torch.manual_seed(0)
    samples = [scenes[0] for _ in range(20)]
    assert {tuple(mask[2].tolist()) for _, mask in samples} == {(0,) * 5 + (7,) * 3, (7,) * 3 + (0,) * 5}
    for image_CHW, mask in samples:
        assert set(mask[0].tolist()) == {-100}
        assert torch.equal(image_CHW[0, 2] > -0.5, mask[2] == 7)


# Detection ------------------------------------------------------------------------------------------------------------


def slow_iou(one: list[float], other: list[float]) -> float:
    def area(box: list[float]) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    both = area([max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])])
    return both / (area(one) + area(other) - both)


def slow_average_precision(found: Any, truth: Any, number: int) -> float:
    """Return average precision by going through all boxes of all images, one list, from the best down."""
    boxes = [
        (score, image, box)
        for image, each in enumerate(found)
        for box, label, score in zip(*(each[key].tolist() for key in ("boxes", "classes", "scores")), strict=True)
        if label == number
    ]
    real = {
        (image, place): box
        for image, each in enumerate(truth)
        for place, (box, label) in enumerate(zip(each["boxes"].tolist(), each["classes"].tolist(), strict=True))
        if label == number
    }
    taken: set[tuple[int, int]] = set()
    points: list[tuple[int, float]] = []
    for rank, (_, image, box) in enumerate(sorted(boxes, reverse=True), start=1):
        here = [(slow_iou(box, other), key) for key, other in real.items() if key[0] == image]
        overlap, key = max(here, default=(0.0, (-1, -1)))
        if overlap >= 0.5 and key not in taken:
            taken.add(key)
        points.append((len(taken), len(taken) / rank))
    best = [max([precision for hits, precision in points if hits >= k], default=0.0) for k in range(1, len(real) + 1)]
    return sum(best) / len(real)


def random_case(seed: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Return boxes found and real ones: some near a real box, some twice, some anywhere, some of another class."""
    generator = torch.Generator().manual_seed(seed)
    found, truth = [], []
    for count in (3, 0, 5, 1):
        corner_N2 = 60 * torch.rand(count, 2, generator=generator)
        boxes_N4 = torch.cat([corner_N2, corner_N2 + 10 + 20 * torch.rand(count, 2, generator=generator)], dim=1)
        classes = torch.randint(0, 2, (count,), generator=generator)
        near_N4 = boxes_N4.repeat(2, 1) + 3 * torch.randn(2 * count, 4, generator=generator)
        anywhere = torch.tensor([[5.0, 5, 25, 25], [40, 40, 60, 70]])
        guess_K4 = torch.cat([near_N4, anywhere])
        labels_K = torch.cat([classes.repeat(2), torch.tensor([0, 1])])
        scores_K = torch.rand(len(guess_K4), generator=generator)
        found.append({"boxes": guess_K4, "classes": labels_K, "scores": scores_K})
        truth.append({"boxes": boxes_N4, "classes": classes})
    return found, truth


def test_average_precision_is_that_of_a_slow_count(example: Any):
    module = example("detection_bccd")
    values = []
    for seed in range(20):
        found, truth = random_case(seed)
        for number in (0, 1):
            if any((each["classes"] == number).any() for each in truth):
                values.append(module.average_precision(found, truth, number))
                assert values[-1] == pytest.approx(slow_average_precision(found, truth, number))
    assert len(set(values)) > 20  # cases that tell right from wrong


def test_average_precision_by_hand(example: Any):
    module = example("detection_bccd")
    truth = [{"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "classes": torch.tensor([0, 0])}]
    hit, again, wrong, other = [0.0, 0, 10, 10], [0.0, 0, 10, 9], [50.0, 50, 60, 60], [20.0, 20, 30, 30]

    def precision(*boxes: list[float]) -> float:
        scores, classes = torch.linspace(0.9, 0.1, len(boxes)), torch.zeros(len(boxes), dtype=torch.long)
        found = [{"boxes": torch.tensor(boxes), "classes": classes, "scores": scores}]
        return module.average_precision(found, truth, 0)

    assert precision(hit, other) == pytest.approx(1.0)
    assert precision(hit, wrong, other) == pytest.approx((1 + 2 / 3) / 2)
    assert precision(hit, again, other) == pytest.approx((1 + 2 / 3) / 2)  # a second box on an object is wrong
    assert precision(wrong, hit) == pytest.approx(0.5 / 2)
    assert precision([0.0, 0, 10, 5.1], other) == pytest.approx(1.0)
    assert precision([0.0, 0, 10, 4.9], other) == pytest.approx(0.5 / 2)


def perfect_outputs(module: Any, label: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return what a perfect detector says: sure of the place nearest to each middle, and about it the true reaches."""
    height, width = size[0] // module.STRIDE, size[1] // module.STRIDE
    outputs = {"middles": torch.full((1, 3, height, width), -9.0), "reaches": torch.zeros(1, 4, height, width)}
    for (left, top, right, bottom), number in zip(label["boxes"].tolist(), label["classes"].tolist(), strict=True):
        at = [int((low + high) / 2 / module.STRIDE) for low, high in ((top, bottom), (left, right))]
        outputs["middles"][0, number, at[0], at[1]] = 9.0
        for row in range(max(0, at[0] - 1), at[0] + 2):
            for column in range(max(0, at[1] - 1), at[1] + 2):
                y, x = (module.STRIDE * (place + 0.5) for place in (row, column))
                reach = torch.tensor([x - left, y - top, right - x, bottom - y]) / module.STRIDE
                outputs["reaches"][0, :, row, column] = reach.log()
    return outputs


LABEL = {"boxes": torch.tensor([[3.0, 5, 24, 31], [30, 10, 61, 41]]), "classes": torch.tensor([2, 0])}


def test_the_loss_of_the_truth_is_least_and_its_boxes_are_the_real_ones(example: Any):
    module = example("detection_bccd")
    right = perfect_outputs(module, LABEL, (48, 64))
    (found,) = module.boxes_found(right)
    assert module.mean_average_precision(nn.Identity(), [(right, [LABEL])]) == pytest.approx(100.0)
    order = found["boxes"][:, 0].argsort()
    torch.testing.assert_close(found["boxes"][order], LABEL["boxes"], atol=1e-3, rtol=0)
    assert found["classes"][order].tolist() == [2, 0]
    least = float(module.detection_loss(right, [LABEL]))
    assert least < 0.1
    elsewhere = {key: value.roll(3, dims=3) for key, value in right.items()}
    other_class = {**right, "middles": right["middles"].roll(1, dims=1)}
    larger = {**right, "reaches": right["reaches"] + 0.3}
    for wrong in (elsewhere, other_class, larger):
        assert float(module.detection_loss(wrong, [LABEL])) > least + 0.3


def test_the_loss_of_an_image_does_not_depend_on_the_others(example: Any):
    module = example("detection_bccd")
    torch.manual_seed(0)
    outputs = {"middles": torch.randn(3, 3, 12, 16), "reaches": torch.randn(3, 4, 12, 16)}
    empty = {"boxes": torch.zeros(0, 4), "classes": torch.zeros(0, dtype=torch.long)}
    labels = [LABEL, empty, {key: value[:1] for key, value in LABEL.items()}]
    losses_B = module.detection_loss(outputs, labels)
    assert losses_B.shape == (3,) and bool(losses_B.isfinite().all())
    for number, label in enumerate(labels):
        alone = {key: value[number : number + 1] for key, value in outputs.items()}
        torch.testing.assert_close(module.detection_loss(alone, [label])[0], losses_B[number])


def test_boxes_are_mirrored_with_their_image(example: Any):
    module = example("detection_bccd")
    image_HWC = np.zeros((12, 20, 3), dtype=np.uint8)
    image_HWC[2:5, 3:11] = 255
    label = {"boxes": torch.tensor([[3.0, 2, 11, 5]]), "classes": torch.tensor([1])}
    cells = module.Cells(image_HWC[None], [label], mirror=True)
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        image_CHW, turned = cells[0]
        rows, columns = (image_CHW[0] > 0).nonzero(as_tuple=True)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        assert turned["boxes"][0].tolist() == box
        seen.add(tuple(box))
    assert len(seen) == 4
    assert label["boxes"].tolist() == [[3, 2, 11, 5]]


def test_cells_are_read_as_pascal_voc_writes_them(example: Any, tmp_path: Path):
    module = example("detection_bccd")
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("a\n")
    Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8)).save(tmp_path / "JPEGImages/a.jpg")
    objects = [("WBC", 8, 16, 40, 32), ("RBC", 5, 5, 5, 9), ("Platelets", 0, 0, 4, 4)]
    text = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{text}</annotation>")
    image_CHW, label = module.read_cells(tmp_path, "val", (32, 12))[0]
    assert image_CHW.shape == (3, 12, 32)
    assert label["boxes"].tolist() == [[4, 4, 20, 8], [0, 0, 2, 1]]  # without the box that has no area
    assert label["classes"].tolist() == [1, 2]
