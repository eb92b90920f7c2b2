"""`psenet compare`, on nets that always say one class, so that counting labels tells what must come out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import Ended, psenet
from safetensors.torch import load_file, save_file

from made_runs import always, make_run
from psenet.artifact import load
from psenet.comparison import compare_answers
from psenet.data import load_data
from psenet.models import digits_resnet


def _labels(source: str = "digits", split: str = "validation", seed: int = 0) -> np.ndarray:
    images: Any = getattr(load_data(source, seed=seed), split)
    return np.array([images[place][1] for place in range(len(images))])


def _tables(printed: str) -> dict[tuple[str, ...], list[str]]:
    """Return all rows of all tables: a net's by its name, a pair's, whose first cell holds two names, by both."""
    found: dict[tuple[str, ...], list[str]] = {}
    for line in printed.splitlines():
        if line.startswith(("│", "┃")):
            cells = [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]
            found[cells[0],] = cells
        elif len(cells := re.split(r" {2,}", line.strip())) == 6 and "±" in line:
            first, second = cells[0].split(" - ")
            found[first, second] = [first, second, *cells[1:]]
    return found


def _refused(ended: Ended, *words: str) -> None:
    message = " ".join(ended.err.replace("│", " ").split())
    assert ended.code == 2, ended.err
    for said in words:
        assert said in message


@pytest.fixture
def unequal(image_tree: Callable[..., Path]) -> Path:
    """A folder of images, of whose validation and test images three quarters are of the first class."""
    counts = {"train/cat": 12, "train/dog": 12, "val/cat": 60, "val/dog": 20, "test/cat": 45, "test/dog": 15}
    return image_tree(counts)


# One run --------------------------------------------------------------------------------------------------------------


def test_the_nets_of_one_run_are_compared_by_their_answers(tmp_path: Path):
    run = make_run(tmp_path / "[red]run", baseline=3, pruned=5, rival=7)
    ended = psenet("compare", run, "--data", "digits", "--repeats", "20", "--sample", "100")
    assert (ended.code, ended.err) == (0, "")
    labels, shown = _labels(), _tables(ended.out)
    counts = {name: int((labels == says).sum()) for name, says in (("baseline", 3), ("pruned", 5), ("uniform", 7))}
    macs = {"baseline": "4 M", "pruned": "1.23 M", "uniform": "1.5 M"}
    for name, count in counts.items():
        assert shown[(name,)][1:3] == [macs[name], f"{count / 2.5:.2f} %"]
    for first, second in (("pruned", "baseline"), ("pruned", "uniform"), ("uniform", "baseline")):
        difference, interval, only, sampled, leads = shown[first, second][2:]
        assert difference == f"{(counts[first] - counts[second]) / 2.5:+.2f}"
        assert only == f"{counts[first]} : {counts[second]}"
        assert re.fullmatch(r"-?\d+\.\d\d to -?\d+\.\d\d", interval) and "±" in sampled
        assert sum(map(int, leads.split(", "))) == 20
    assert "250 validation images of digits" in ended.out and "20 samples of 100" in ended.out
    assert ended.out.count("these 250 images cannot tell them apart") == 3
    assert "3 pairs: each interval is one of 98.33 %, so that all of them hold at once with 95 %" in ended.out
    assert "these validation images chose among the nets of each run" in ended.out


def test_the_figures_of_a_pair_stand_in_one_line_of_80_columns(tmp_path: Path):
    run = make_run(tmp_path / "run", rival=2, kept="uniform")
    ended = psenet("compare", run, "--data", "digits", columns=80)
    assert {key for key in _tables(ended.out) if len(key) == 2} == {
        ("pruned", "baseline"),
        ("pruned", "searched"),
        ("searched", "baseline"),
    }
    assert max(map(len, ended.out.splitlines())) <= 80


def test_a_searched_net_that_was_not_kept_is_compared_under_its_name(tmp_path: Path):
    run = make_run(tmp_path / "run", rival=2, kept="uniform")
    ended = psenet("compare", run, "--data", "digits")
    assert ("pruned", "searched") in _tables(ended.out) and ("searched", "baseline") in _tables(ended.out)


def test_a_run_that_found_the_uniform_widths_has_two_nets(tmp_path: Path):
    ended = psenet("compare", make_run(tmp_path / "run"), "--data", "digits")
    assert (ended.code, ended.err) == (0, "")
    assert "95 % interval" in ended.out and "Bonferroni" not in ended.out
    assert ("uniform",) not in _tables(ended.out) and ("pruned", "baseline") in _tables(ended.out)


def test_a_real_difference_is_called_real(tmp_path: Path, unequal: Path):
    options = {"data": str(unequal), "num_classes": 2, "in_channels": 3, "size": 16}
    run = make_run(tmp_path / "run", baseline=1, pruned=0, **options)
    ended = psenet("compare", run, "--data", unequal, "--sample", "20")
    assert (ended.code, ended.err) == (0, "")
    pattern = r"pruned is better than baseline by 50\.00 points \(95 %: (\d+\.\d\d) to (\d+\.\d\d)\): real"
    (line,) = [line for line in ended.out.splitlines() if "better than" in line]
    found = re.fullmatch(pattern, line)
    assert found is not None and 25 < float(found[1]) < 40 and 60 < float(found[2]) < 70


def test_all_figures_are_written_where_asked(tmp_path: Path):
    run, out = make_run(tmp_path / "run", baseline=3, pruned=5), tmp_path / "figures" / "compared.json"
    arguments = ("compare", run, "--data", "digits", "--repeats", "7", "--sample", "90", "--seed", "4", "--out", out)
    ended = psenet(*arguments)
    assert ended.out.splitlines()[-1] == f"figures: {out}"
    record = json.loads(out.read_text())
    assert (record["format"], record["split"], record["num_images"]) == (1, "validation", 250)
    assert (record["sample"], record["repeats"], record["seed"]) == (90, 7, 4)
    labels = _labels()
    accuracies = {net["net"]: net["accuracy"] for net in record["nets"]}
    assert accuracies == {"baseline": (labels == 3).mean() * 100, "pruned": (labels == 5).mean() * 100}
    (pair,) = record["pairs"]
    assert (pair["num_only_first"], pair["num_only_second"]) == ((labels == 5).sum(), (labels == 3).sum())
    samples = [net["sample_accuracies"] for net in record["nets"]]
    assert np.mean(np.subtract(samples[1], samples[0])) == pytest.approx(pair["samples"]["mean"], abs=1e-3)
    expected = compare_answers(labels == 5, labels == 3, seed=4)
    assert pair["interval"] == [round(expected.low, 4), round(expected.high, 4)]
    assert pair["verdict"] in ended.out.replace("\n", " ")
    assert psenet(*arguments).out == ended.out


def test_test_images_are_taken_only_when_asked_for_and_with_a_warning(tmp_path: Path):
    run = make_run(tmp_path / "run", baseline=3, pruned=5)
    ended = psenet("compare", run, "--data", "digits", "--split", "test")
    assert (ended.code, ended.err) == (0, "")
    assert _tables(ended.out)["pruned",][2] == f"{100 * (_labels(split='test') == 5).mean():.2f} %"
    assert "600 test images of digits" in ended.out and "whoever chooses a net by them, again and again" in ended.out
    assert "cannot tell them apart" in ended.out


def test_the_data_is_divided_by_the_seed_of_the_run(tmp_path: Path):
    run = make_run(tmp_path / "run", baseline=3, pruned=5, seed=8)
    ended = psenet("compare", run, "--data", "digits")
    assert "divided by seed 8" in ended.out
    counts = (_labels(seed=8) == 5).sum(), (_labels(seed=8) == 3).sum()
    assert _tables(ended.out)["pruned", "baseline"][4] == f"{counts[0]} : {counts[1]}"


# Several runs ---------------------------------------------------------------------------------------------------------


def test_the_pruned_nets_of_several_runs_are_compared_and_share_a_baseline(tmp_path: Path):
    runs = [make_run(tmp_path / name, baseline=0, pruned=says) for name, says in (("a", 1), ("b", 2), ("c", 3))]
    ended = psenet("compare", *runs, "--data", "digits")
    assert (ended.code, ended.err) == (0, "")
    labels, shown = _labels(), _tables(ended.out)
    pairs = {("b", "a"): (2, 1), ("c", "a"): (3, 1), ("c", "b"): (3, 2)}
    for (first, second), (one, other) in pairs.items():
        cells = shown[f"pruned of {first}", f"pruned of {second}"]
        assert cells[4] == f"{(labels == one).sum()} : {(labels == other).sum()}"
    assert all((f"pruned of {name}", "baseline") in shown for name in "abc")
    assert len([key for key in shown if len(key) == 2]) == 6
    assert "6 pairs: each interval is one of 99.17 %" in ended.out


def test_runs_with_other_baselines_have_one_each_and_folders_of_one_name_their_paths(tmp_path: Path):
    runs = [make_run(tmp_path / name / "x", baseline=says, pruned=5) for name, says in (("a", 1), ("b", 2))]
    ended = psenet("compare", *runs, "--data", "digits", "--out", tmp_path / "o.json")
    assert (ended.code, ended.err) == (0, "")
    names = [(pair["first"], pair["second"]) for pair in json.loads((tmp_path / "o.json").read_text())["pairs"]]
    a, b = (str(run) for run in runs)
    assert names == [
        (f"pruned of {b}", f"pruned of {a}"),
        (f"pruned of {a}", f"baseline of {a}"),
        (f"pruned of {b}", f"baseline of {b}"),
    ]


def test_runs_of_other_image_sizes_are_compared_on_the_same_images(tmp_path: Path, unequal: Path):
    options = {"data": str(unequal), "num_classes": 2, "in_channels": 3}
    runs = [make_run(tmp_path / str(size), pruned=says, size=size, **options) for size, says in ((16, 0), (24, 1))]
    ended = psenet("compare", *runs, "--data", unequal)
    assert (ended.code, ended.err) == (0, "")
    assert "24 x 24 pixels" in ended.out
    # 80 validation images, all by their own size: none is lost, and each is solved by one of the two.
    assert _tables(ended.out)["pruned of 24", "pruned of 16"][4] == "20 : 60"


def test_runs_of_other_seeds_are_compared_on_what_all_have_held_out(tmp_path: Path, unequal: Path):
    options = {"data": str(unequal), "num_classes": 2, "in_channels": 3, "size": 16}
    runs = [make_run(tmp_path / f"{seed}", seed=seed, pruned=says, **options) for seed, says in ((0, 0), (1, 1))]
    ended = psenet("compare", *runs, "--data", unequal, "--split", "test")
    assert (ended.code, ended.err) == (0, "")
    assert "of 60 test images, the 60 that all runs have held out are used" in " ".join(ended.out.split())
    assert _tables(ended.out)["pruned of 1", "pruned of 0"][4] == "15 : 45"


# What a reader is told to doubt ---------------------------------------------------------------------------------------


def test_other_data_than_the_run_s_are_doubted(tmp_path: Path):
    run = make_run(tmp_path / "run", data="photos")
    ended = psenet("compare", run, "--data", "digits")
    assert ended.code == 0
    told = " ".join(ended.out.split())
    assert f"{run} was made with 'photos', not 'digits': if these are other data, nobody can tell whether" in told


def test_data_that_has_grown_since_is_doubted(tmp_path: Path):
    run = make_run(tmp_path / "run", batches={"validation": 2, "test": None})
    told = " ".join(psenet("compare", run, "--data", "digits").out.split())
    assert "had 2 batches of validation images, digits now gives 1: if the data has changed since" in told


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_missing_or_unfinished_run_is_named(tmp_path: Path):
    _refused(psenet("compare", tmp_path / "none", "--data", "digits"), "none must be a run directory made by psenet")
    run = make_run(tmp_path / "run")
    (run / "result.json").unlink()
    _refused(psenet("compare", run, "--data", "digits"), f"the run in {run} is not finished")


def test_a_run_given_twice_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run")
    again = run / ".." / "run"
    _refused(psenet("compare", run, again, "--data", "digits"), "cannot be compared with itself; given twice: ")


def test_runs_of_other_numbers_of_classes_are_refused(tmp_path: Path):
    runs = [make_run(tmp_path / str(number), num_classes=number) for number in (10, 7)]
    _refused(
        psenet("compare", *runs, "--data", "digits"),
        "runs can be compared only if their nets tell the same classes apart; numbers of them: "
        f"{runs[0]} 10, {runs[1]} 7",
    )


def test_data_of_another_number_of_classes_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run", num_classes=7)
    message = (
        f"digits has 10 classes, the nets of {run} tell 7 apart: give the data that the run was made with ('digits')"
    )
    _refused(psenet("compare", run, "--data", "digits"), message)


def test_data_of_another_number_of_channels_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run", in_channels=3, data="photos")
    _refused(
        psenet("compare", run, "--data", "digits"),
        f"the images of digits have 1 channels, the nets of {run} take 3: give the data that the run was made with",
    )


def test_images_of_a_size_that_the_nets_refuse_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run")

    def fixed(self: Any, x_BCHW: torch.Tensor) -> torch.Tensor:
        if x_BCHW.shape[-1] != 8:
            raise RuntimeError("eight only")
        return torch.zeros(len(x_BCHW), 10)

    monkeypatch.setattr("psenet.models.SmallResNet.forward", fixed)
    ended = psenet("compare", run, "--data", "digits", "--image-size", "16")
    _refused(ended, f"the nets of {run} refuse images of shape (1, 16, 16): RuntimeError: eight only")


def test_a_recipe_without_a_seed_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text()) | {"settings": {}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    _refused(
        psenet("compare", run, "--data", "digits"), f"the recipe of the run in {run} must have the seed", "has None"
    )


def test_a_run_of_oblong_images_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text()) | {"input_shape": [1, 8, 12]}
    (run / "recipe.json").write_text(json.dumps(recipe))
    _refused(
        psenet("compare", run, "--data", "digits"), "must be of square images; its recipe has the shape [1, 8, 12]"
    )


def test_too_few_images_held_out_by_all_are_refused(tmp_path: Path):
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    _refused(
        psenet("compare", *runs, "--data", "digits"),
        "the runs have different seeds (0, 1), which divide the data differently; only ",
        "validation images are held out by all, at least 50 are needed: compare runs of one seed",
    )


def test_a_net_with_outputs_that_are_not_finite_is_named(tmp_path: Path):
    run = make_run(tmp_path / "run")
    weights = run / "stages" / "baseline.safetensors"
    save_file({**load_file(weights), "fc.bias": torch.full((10,), torch.nan)}, weights)
    _refused(psenet("compare", run, "--data", "digits"), "the baseline net gives outputs that are NaN or infinite")


def test_an_unknown_split_is_named(tmp_path: Path):
    run = make_run(tmp_path / "run")
    ended = psenet("compare", run, "--data", "digits", "--split", "train")
    _refused(ended, "--split must be validation or test; got 'train'")


def test_a_sample_as_large_as_the_split_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run")
    ended = psenet("compare", run, "--data", "digits", "--sample", "250")
    _refused(ended, "a sample must have at least 1 image and fewer than all 250; got 250")


@pytest.mark.parametrize(("option", "value"), [("--repeats", "1"), ("--sample", "0"), ("--seed", "-1")])
def test_a_number_out_of_range_is_named(option: str, value: str, tmp_path: Path):
    _refused(psenet("compare", tmp_path, "--data", "digits", option, value), f"Invalid value for '{option}'")


def test_a_damaged_rival_is_named(tmp_path: Path):
    run = make_run(tmp_path / "run", rival=2)
    (run / "stages" / "uniform.safetensors").write_bytes(b"nothing")
    _refused(psenet("compare", run, "--data", "digits"), "uniform.safetensors is damaged (")


def test_broken_images_are_left_out_where_asked(tmp_path: Path, unequal: Path):
    options = {"data": str(unequal), "num_classes": 2, "in_channels": 3, "size": 16}
    run = make_run(tmp_path / "run", baseline=1, pruned=0, **options)
    (unequal / "val/dog/3.png").write_bytes(b"no image")
    _refused(psenet("compare", run, "--data", unequal), "every image must be readable; 1 are not")
    with pytest.warns(UserWarning, match=r"left out 1 unreadable images: .*3\.png"):
        ended = psenet("compare", run, "--data", unequal, "--skip-unreadable")
    assert _tables(ended.out)["pruned", "baseline"][4] == "60 : 19"


def test_the_made_nets_say_what_they_are_said_to_say(tmp_path: Path):
    run = make_run(tmp_path / "run", pruned=4)
    pruned = load(run, digits_resnet).eval()
    with torch.no_grad():
        assert pruned(torch.randn(5, 1, 8, 8)).argmax(1).tolist() == [4] * 5
        assert always(digits_resnet().eval(), 6)(torch.randn(2, 1, 8, 8)).argmax(1).tolist() == [6, 6]
