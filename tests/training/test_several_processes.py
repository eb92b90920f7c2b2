"""Trainings by two processes, as torchrun starts them, beside the same ones by one process.

What equals what: see `docs/howto/multi_gpu.md`.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_steps import NUM_SUBNETS, STRATEGIES, TRAININGS, kept_training, norm_net
from torch import nn
from torch.nn import functional as F
from toys import NoisyImages, assert_same, copy_of, make_space

import psenet
from launched import finish, kill, launch, needs_gloo
from psenet import ranks
from psenet.errors import InputError
from psenet.training.checkpoint import load_checkpoint

SCRIPT = Path(__file__).parent / "shared_steps.py"
ENDINGS = SCRIPT.with_name("endings.py")
CLOSE = 1e-5

pytestmark = [pytest.mark.slow, needs_gloo]


def train_in_two(folder: Path, *names: str) -> None:
    code, printed = finish(launch(SCRIPT, folder, *names))
    assert code == 0, printed


def left_in(folder: Path, name: str) -> tuple[Any, Any]:
    """Return what a training left in each of two processes."""
    return tuple(torch.load(folder / f"{name}.{rank}.result", weights_only=True) for rank in (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings by two processes, in one start of them."""
    folder = tmp_path_factory.mktemp("two")
    train_in_two(folder)
    return folder


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=CLOSE, atol=CLOSE, msg=lambda text, name=name: name + text)


# One step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["no norm", "group norm"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_a_step_are_those_of_one_process_with_the_whole_batch(strategy: str, norm: str, folder: Path):
    name = f"{strategy} step with {norm}"
    ours, others = left_in(folder, name)
    assert_same(ours, others)
    assert sum(float(gradient.abs().sum()) for gradient in ours.values()) > 0.1
    assert_close(ours, TRAININGS[name]())


@pytest.mark.parametrize("norm", ["no norm", "group norm"])
def test_so_are_those_of_a_plain_model(norm: str, folder: Path):
    ours, _ = left_in(folder, f"plain step with {norm}")
    assert_close(ours["gradients"], TRAININGS[f"plain step with {norm}"]()["gradients"])


def _halves() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    dataset = NoisyImages(16, noise=0.0)
    yield from zip(dataset.images.split(8), dataset.labels.split(8), strict=True)


def test_with_batch_norm_gradients_and_statistics_are_the_mean_over_the_halves_of_the_batch(folder: Path):
    found: list[dict[str, torch.Tensor]] = []
    buffers: list[dict[str, torch.Tensor]] = []
    for x, labels in _halves():
        model = norm_net("batch norm").train()
        F.cross_entropy(model(x), labels).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})  # pyright: ignore
        buffers.append(copy_of(dict(model.named_buffers())))
    ours, others = left_in(folder, "plain step with batch norm")
    assert_same(ours, others)
    assert_close(ours["gradients"], {name: (one + found[1][name]) / 2 for name, one in found[0].items()})
    middle = {name: (one + buffers[1][name]) / 2 for name, one in buffers[0].items() if one.is_floating_point()}
    assert_close({name: ours["buffers"][name] for name in middle}, middle)
    assert ours["buffers"]["1.num_batches_tracked"] == 1
    whole = TRAININGS["plain step with batch norm"]()
    # Not those of the whole batch: variances within halves leave out how the halves differ.
    assert (ours["buffers"]["1.running_mean"] - whole["buffers"]["1.running_mean"]).abs().max() < CLOSE
    assert (ours["buffers"]["4.running_var"] - whole["buffers"]["4.running_var"]).abs().max() > 10 * CLOSE


def test_with_batch_norm_each_subnet_has_the_statistics_of_its_samples_in_each_process(folder: Path):
    model = norm_net("batch norm")
    space = make_space(model)
    widths = psenet.make_strategy("parallel", space, num_subnets=NUM_SUBNETS, seed=0).next_widths()
    found: list[dict[str, torch.Tensor]] = []
    for x, labels in _halves():
        supernet = psenet.Supernet(model, space).train()
        for number, setting in enumerate(widths):  # one by one, as the parallel pass must not
            own = slice(number, None, NUM_SUBNETS)
            loss = F.cross_entropy(supernet.subnet(setting)(x[own]), labels[own])
            (loss / NUM_SUBNETS).backward()
        found.append({name: parameter.grad for name, parameter in supernet.model.named_parameters()})  # pyright: ignore
    ours, _ = left_in(folder, "parallel step with batch norm")
    assert_close(ours, {name: (one + found[1][name]) / 2 for name, one in found[0].items()})


# Whole trainings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*STRATEGIES, "steered"])
def test_a_whole_training_ends_with_the_weights_and_history_of_one_process(strategy: str, folder: Path):
    ours, others = left_in(folder, f"{strategy} training")
    expected = TRAININGS[f"{strategy} training"]()
    assert_same(ours["weights"], others["weights"])
    assert_same(ours["history"], others["history"])
    assert_close(ours["weights"], expected["weights"])
    assert torch.equal(ours["history"]["steps"], expected["history"]["steps"])
    assert torch.equal(ours["history"]["widths"], expected["history"]["widths"])
    assert_close({"losses": ours["history"]["losses"]}, {"losses": expected["history"]["losses"]})
    # Only the main process is told of epochs; twelve steps, not half of them.
    assert others["told"] == [] and [told[:2] for told in ours["told"]] == [(0, 3), (1, 6), (2, 9), (3, 12)]
    assert [told[2] for told in ours["told"]] == pytest.approx([told[2] for told in expected["told"]], abs=CLOSE)


def test_a_whole_plain_training_does_too(folder: Path):
    ours, others = left_in(folder, "plain training")
    assert_same(ours, others)
    assert_close(ours, TRAININGS["plain training"]())


def test_with_batch_norm_too_all_processes_have_the_same_weights_and_history(folder: Path):
    ours, others = left_in(folder, "parallel training with batch norm")
    assert_same(ours["weights"], others["weights"])
    assert_same(ours["history"], others["history"])


def test_parameters_that_no_step_or_not_every_step_reaches_are_left_alone_as_by_one_process(folder: Path):
    ours, _ = left_in(folder, "unreached parameters")
    expected = TRAININGS["unreached parameters"]()
    assert_close(ours, expected)
    torch.manual_seed(0)
    norm_net("group norm")
    assert torch.equal(ours["spare.weight"], nn.Linear(3, 3).weight)


@pytest.mark.parametrize("name", ["random numbers", "random numbers of loading processes"])
def test_augmentation_and_dropout_differ_between_the_processes(name: str, folder: Path):
    ours, others = left_in(folder, name)
    assert ours["images"].shape == others["images"].shape == (8, 3, 6, 6)
    for image in ours["images"]:
        assert not (others["images"] == image).flatten(1).all(1).any()
    assert not torch.equal(ours["dropped"], others["dropped"])


def test_without_a_generator_too_each_image_goes_to_one_process_and_a_training_depends_on_its_seed_alone(folder: Path):
    ours, others = left_in(folder, "without generator")
    for seen in (ours, others):
        assert torch.equal(seen["first"], seen["again"])
    images = torch.cat([ours["first"], others["first"]])
    assert len(images) == len(images.unique(dim=0)) == 32


# Errors ---------------------------------------------------------------------------------------------------------------


def test_what_breaks_in_one_process_stops_all_with_the_reason(folder: Path):
    ours, others = left_in(folder, "diverged")
    assert ours == others
    assert "nan at step 0 (the batch itself has values that are not finite)" in ours


def test_a_batch_that_the_processes_cannot_share_is_refused(folder: Path):
    for words in left_in(folder, "refused batch"):
        assert words.startswith("the batch size must be a multiple of the number of processes, which share every batch")
        assert words.endswith("; got 5 and 2 processes")


def test_what_the_main_process_makes_or_fails_at_reaches_the_others(folder: Path):
    ours, others = left_in(folder, "told by main")
    assert ours == ["made by 0 of 1", "InputError: no such thing"]
    assert others == ["made by 0 of 1", "ElsewhereError: the main process has failed: InputError: no such thing"]


def test_a_process_that_fails_alone_does_not_leave_the_other_waiting(tmp_path: Path):
    start = time.monotonic()
    code, printed = finish(launch(SCRIPT, tmp_path, "failing"), timeout=120)
    assert code != 0
    assert "OSError: the disk of process 1 is gone" in printed
    assert time.monotonic() - start < 100
    assert load_checkpoint(tmp_path / "failing.pt")["position"]["epoch"] == 1


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by two processes from beginning to end, and one that was killed at its eighth step and resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    process = launch(SCRIPT, folder, "parts@7")
    stuck, end = [folder / f"parts.{rank}.stuck" for rank in (0, 1)], time.monotonic() + 120
    try:
        while not all(path.exists() for path in stuck):
            assert time.monotonic() < end and process.poll() is None, "the training does not come to its eighth step"
            time.sleep(0.05)
    finally:
        kill(process)
    (folder / "parts.pt").replace(folder / "killed.pt")
    (folder / "parts.pt").write_bytes((folder / "killed.pt").read_bytes())
    train_in_two(folder, "whole", "parts")
    return folder


def test_a_training_that_was_killed_ends_like_one_that_was_not_to_the_last_bit(resumed: Path):
    at = load_checkpoint(resumed / "killed.pt")["position"]
    assert (at["epoch"], at["batch"]) == (2, 0)
    for whole, parts in zip(left_in(resumed, "whole"), left_in(resumed, "parts"), strict=True):
        assert (whole.pop("num_steps"), parts.pop("num_steps")) == (9, 3)
        assert_same(parts, whole)
    whole, parts = (load_checkpoint(resumed / f"{name}.pt") for name in ("whole", "parts"))
    assert_same(parts, whole)
    mine, theirs = whole["ranks"]
    assert not torch.equal(mine["random"]["torch"], theirs["random"]["torch"])


def test_another_number_of_processes_is_refused(resumed: Path):
    before = (resumed / "killed.pt").read_bytes()
    with pytest.raises(
        InputError, match=r"killed\.pt is of a training by 2 processes, this one has 1: continue with the"
    ):
        kept_training(resumed / "killed.pt")
    assert (resumed / "killed.pt").read_bytes() == before


# Ending ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux tells the names of threads")
@pytest.mark.parametrize("how", ["leave", "destroy", "nothing"])
def test_no_thread_of_gloo_outlives_the_program(how: str, tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, ENDINGS, how, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


# One process ----------------------------------------------------------------------------------------------------------


def test_one_process_alone_is_the_main_one_and_averages_nothing():
    assert (ranks.num_ranks(), ranks.rank(), ranks.is_main()) == (1, 0, True)
    tensor = torch.ones(3)
    assert ranks.mean(tensor) is tensor
    assert ranks.gather("word") == ["word"]
    with pytest.raises(InputError, match="as it is"):
        ranks.from_main(_refuse)


def _refuse() -> None:
    raise InputError("as it is")
