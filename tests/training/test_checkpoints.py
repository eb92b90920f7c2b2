import os
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from toys import (
    CountingLoss,
    NoisyImages,
    assert_same,
    copy_of,
    make_loader,
    make_net,
    make_supernet,
    raising,
    train_quietly,
)

from psenet.errors import InputError
from psenet.training import TrainConfig, train_supernet
from psenet.training.checkpoint import load_checkpoint, previous_of
from psenet.training.curves import EpochRecord

# Resuming -------------------------------------------------------------------------------------------------------------


class _Interrupting(NoisyImages):
    """Stops the program at one access."""

    accesses_left = -1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.accesses_left -= 1
        if self.accesses_left == 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


_CONFIGS = {
    "sgd": TrainConfig(epochs=4, warmup_ratio=0.3),
    "adamw": TrainConfig(epochs=4, optimizer="adamw", learning_rate=0.01, label_smoothing=0.1),
}


@pytest.mark.parametrize("stop", ["in the data", "in the loss"])
@pytest.mark.parametrize("optimizer", _CONFIGS)
def test_a_training_that_was_stopped_continues_exactly(optimizer: str, stop: str, tmp_path: Path):
    config, whole, parts = _CONFIGS[optimizer], tmp_path / "whole.pt", tmp_path / "parts.pt"
    torch.manual_seed(3)
    model, loader = make_net(dropout=0.3), make_loader(NoisyImages(20))
    train_quietly(model, loader, config, checkpoint=whole)
    expected = (torch.rand(5), list(loader.sampler), copy_of(model.state_dict()))

    torch.manual_seed(3)
    dataset = _Interrupting(20)
    if stop == "in the data":
        dataset.accesses_left = 2 * 20 + 11
        loss_fn = CountingLoss()
    else:
        loss_fn = CountingLoss({7: raising(KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        train_quietly(
            make_net(dropout=0.3), make_loader(dataset), config, checkpoint=parts, loss_fn=_smooth(loss_fn, config)
        )
    assert load_checkpoint(parts)["position"]["epoch"] == 2

    # A new program, whose random numbers, weights and data order have nothing of the old one's.
    torch.manual_seed(99)
    model, loader, loss_fn = make_net(dropout=0.3, seed=8), make_loader(NoisyImages(20), seed=5), CountingLoss()
    train_quietly(model, loader, config, checkpoint=parts, loss_fn=_smooth(loss_fn, config))
    assert loss_fn.num_calls == 6
    assert_same((torch.rand(5), list(loader.sampler), copy_of(model.state_dict())), expected)
    assert_same(torch.load(parts, weights_only=True), torch.load(whole, weights_only=True))


class _AnyAugmentation(NoisyImages):
    """Draws from the generators of torch, Python and NumPy."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = super().__getitem__(index)
        return image * (1 + random.random()) + np.random.normal(), label


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("every", "stopped", "kept"), [(1, 9, 9), (3, 9, 9), (3, 11, 10), (2, 3, 2), (4, 12, 12)])
def test_within_an_epoch_it_goes_on_exactly_too(every: int, stopped: int, kept: int, num_workers: int, tmp_path: Path):
    """Five steps an epoch, with dropout; `stopped` steps are done, and `kept` of them are in the checkpoint."""
    config = TrainConfig(epochs=3, checkpoint_steps=every)

    def build(dataset: NoisyImages) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(dataset, batch_size=4, shuffle=True, generator=generator, num_workers=num_workers)

    def train(name: str, *, seed: int, stop: int = -1) -> tuple[Any, list[EpochRecord], int]:
        torch.manual_seed(seed)
        model = make_net(dropout=0.3, seed=seed)
        records: list[EpochRecord] = []
        loss_fn = CountingLoss({stop: raising(KeyboardInterrupt())})
        options: dict[str, Any] = {"checkpoint": tmp_path / name, "loss_fn": loss_fn, "record": records.append}
        try:
            train_quietly(model, build(_AnyAugmentation(20)), config, **options)
        except KeyboardInterrupt:
            assert stop >= 0
        after = torch.rand(5), copy_of(model.state_dict())
        return after, [replace(record, seconds=0.0) for record in records], loss_fn.num_calls

    whole, epochs, _ = train("whole.pt", seed=3)
    train("parts.pt", seed=3, stop=stopped)
    at = load_checkpoint(tmp_path / "parts.pt")["position"]
    assert 5 * at["epoch"] + at["batch"] == kept
    parts, later_epochs, num_steps = train("parts.pt", seed=99)
    assert num_steps == 15 - kept
    assert_same(parts, whole)
    assert later_epochs == epochs[at["epoch"] :]
    ends = [_without_seconds(load_checkpoint(tmp_path / name)) for name in ("parts.pt", "whole.pt")]
    assert_same(ends[0], ends[1])


def _without_seconds(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"position": state["position"] | {"seconds": 0.0}}


def test_a_training_may_go_on_with_another_interval_of_checkpoints(tmp_path: Path):
    path, options = tmp_path / "c.pt", {"checkpoint": tmp_path / "c.pt"}
    train_quietly(make_net(), make_loader(NoisyImages(16)), TrainConfig(epochs=2), max_steps=3, **options)
    train_quietly(make_net(), make_loader(NoisyImages(16)), TrainConfig(epochs=2, checkpoint_steps=1), **options)
    assert load_checkpoint(path)["position"]["epoch"] == 2


def _smooth(loss_fn: CountingLoss, config: TrainConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def smooth_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss_fn(outputs, labels)
        return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=config.label_smoothing)

    return smooth_loss


def test_a_finished_training_is_not_trained_again(tmp_path: Path):
    model, config, checkpoint = make_net(), TrainConfig(epochs=2), tmp_path / "c.pt"
    train_quietly(model, make_loader(NoisyImages(16)), config, checkpoint=checkpoint)
    again, loss_fn = make_net(seed=4), CountingLoss()
    train_quietly(again, make_loader(NoisyImages(16)), config, checkpoint=checkpoint, loss_fn=loss_fn)
    assert loss_fn.num_calls == 0
    assert_same(again.state_dict(), model.state_dict())


def test_a_training_stopped_in_its_first_epoch_starts_again(tmp_path: Path):
    config, checkpoint = TrainConfig(epochs=2), tmp_path / "c.pt"
    loss_fn = CountingLoss({1: raising(RuntimeError("out of luck"))})
    with pytest.raises(RuntimeError, match="out of luck"):
        train_quietly(make_net(), make_loader(NoisyImages(16)), config, checkpoint=checkpoint, loss_fn=loss_fn)
    assert list(tmp_path.iterdir()) == []
    train_quietly(make_net(), make_loader(NoisyImages(16)), config, checkpoint=checkpoint)
    assert load_checkpoint(checkpoint)["position"]["epoch"] == 2


def _stop_and_continue(build: Callable[[], DataLoader], checkpoint: Path) -> tuple[Any, Any]:
    """Return the weights of four epochs in one go, and in two of which the first is stopped in the third epoch."""

    def train(*, stop: int = -1) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        model, loss_fn = make_net(), CountingLoss({stop: raising(KeyboardInterrupt())})
        train_quietly(model, build(), TrainConfig(epochs=4), checkpoint=checkpoint, loss_fn=loss_fn)
        return copy_of(model.state_dict())

    whole = train()
    for path in checkpoint.parent.glob("*.pt"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        train(stop=5)
    assert load_checkpoint(checkpoint)["position"]["epoch"] == 2
    return train(), whole


def test_the_generator_of_a_sampler_continues_too(tmp_path: Path):
    def build() -> DataLoader:
        dataset = NoisyImages(16)
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(4))
        return DataLoader(dataset, batch_size=8, sampler=sampler)

    assert_same(*_stop_and_continue(build, tmp_path / "c.pt"))


def test_an_order_from_the_global_generator_continues_too(tmp_path: Path):
    def build() -> DataLoader:
        return DataLoader(NoisyImages(16), batch_size=8, shuffle=True)

    assert_same(*_stop_and_continue(build, tmp_path / "c.pt"))


def test_data_that_depends_on_the_epoch_continues_with_the_right_one(tmp_path: Path):
    class Epochs(NoisyImages):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            image, label = super().__getitem__(index)
            return image * (1 + self.epoch), label

    assert_same(*_stop_and_continue(lambda: make_loader(Epochs(16)), tmp_path / "c.pt"))


# Checkpoints that cannot be used --------------------------------------------------------------------------------------

_SETTINGS = TrainConfig(epochs=1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "training.pt"
    train_quietly(make_net(), make_loader(NoisyImages(24)), _SETTINGS, checkpoint=path)
    return path


def _assert_refused(path: Path, match: str, **options: Any) -> None:
    """Neither the model nor the random numbers may have changed."""
    model = options.pop("model", None) or make_net(seed=3)
    loader = options.pop("loader", None) or make_loader(NoisyImages(24))
    config = options.pop("config", None) or _SETTINGS
    before, random_state = copy_of(model.state_dict()), torch.get_rng_state()
    with pytest.raises(InputError, match=match):
        train_quietly(model, loader, config, checkpoint=path)
    assert_same(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def _pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda whole, kept=kept: whole[: int(kept * len(whole))] for kept in (0.0, 0.01, 0.3, 0.7, 0.99)),
        lambda whole: b"\0" * len(whole),
        lambda whole: b"these are not weights\n",
        lambda whole: _pickled({"module": 1}),
        lambda whole: whole[: len(whole) // 2] + b"\xff" * 16 + whole[len(whole) // 2 + 16 :],
    ],
    ids=["empty", "0.01", "0.3", "0.7", "0.99", "zeros", "text", "pickle", "blot"],
)
def test_a_damaged_checkpoint_is_refused(checkpoint: Path, damage: Callable[[bytes], bytes]):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    _assert_refused(checkpoint, r"training.pt cannot be read as a checkpoint; delete it to start this stage again: \w+")


def test_a_single_flipped_bit_of_the_weights_is_noticed(checkpoint: Path):
    whole = bytearray(checkpoint.read_bytes())
    weights = load_checkpoint(checkpoint)["module"]["9.weight"].numpy().tobytes()
    whole[whole.index(weights) + 5] ^= 1
    checkpoint.write_bytes(whole)
    _assert_refused(checkpoint, "training.pt cannot be read as a checkpoint.*bad checksum")


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [1, 2], 3.5, {}, make_net().state_dict(), {"position": {}, "num_steps": 6}],
    ids=["tensor", "list", "number", "empty dict", "weights", "dict"],
)
def test_a_file_that_torch_can_read_but_is_no_checkpoint_is_refused(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "foreign.pt")
    _assert_refused(tmp_path / "foreign.pt", "foreign.pt cannot be read as a checkpoint.*is not of a psenet training")


def test_a_numpy_archive_and_a_folder_are_refused(tmp_path: Path):
    with (tmp_path / "arrays.npz").open("wb") as file:
        np.savez(file, module=np.zeros(3))
    (tmp_path / "folder.pt").mkdir()
    for name in ("arrays.npz", "folder.pt"):
        _assert_refused(tmp_path / name, f"{name} cannot be read as a checkpoint")


@pytest.mark.parametrize("damage", ["cut off", "one bit", "gone"])
def test_in_place_of_a_damaged_checkpoint_the_one_before_is_used(damage: str, tmp_path: Path):
    config, path = TrainConfig(epochs=2, checkpoint_steps=2), tmp_path / "training.pt"

    def train(stop: int = -1) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model, loss_fn = make_net(dropout=0.3), CountingLoss({stop: raising(KeyboardInterrupt())})
        with suppress(KeyboardInterrupt):
            train_quietly(model, make_loader(NoisyImages(24)), config, checkpoint=path, loss_fn=loss_fn)
        return copy_of(model.state_dict()), loss_fn.num_calls

    whole, _ = train()
    for file in tmp_path.iterdir():
        file.unlink()
    train(stop=5)  # after the checkpoints of steps 2, 3 and 4
    if damage == "gone":
        path.unlink()
        resumed, num_steps = train()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1000] if damage == "cut off" else content)
        words = r"training.pt cannot be read .*; going on from the one before, .*training.previous.pt"
        with pytest.warns(UserWarning, match=words):
            resumed, num_steps = train()
    assert num_steps == 3
    assert_same(resumed, whole)
    assert load_checkpoint(path)["position"]["epoch"] == 2 and load_checkpoint(previous_of(path))["position"]


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path: Path):
    path, config = tmp_path / "training.pt", TrainConfig(epochs=3)
    options: dict[str, Any] = {"checkpoint": path}
    train_quietly(make_net(), make_loader(NoisyImages(8)), config, max_steps=2, **options)
    before = previous_of(path).read_bytes()
    path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="going on from the one before"):
        train_quietly(make_net(), make_loader(NoisyImages(8)), config, max_steps=2, **options)
    assert previous_of(path).read_bytes() == before and load_checkpoint(path)["position"]["epoch"] == 2


def test_if_both_are_damaged_both_are_named(tmp_path: Path):
    path = tmp_path / "training.pt"
    for file in (path, previous_of(path)):
        file.write_bytes(b"damaged")
    words = "training.pt cannot be read .*; and the one before: .*training.previous.pt cannot be read as a checkpoint"
    _assert_refused(path, words)


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self._marker}'",)


@pytest.mark.parametrize("form", ["pickle", "torch", "inside a checkpoint"])
def test_nothing_in_a_checkpoint_is_executed(checkpoint: Path, tmp_path: Path, form: str):
    marker = tmp_path / "executed"
    malicious = _Malicious(marker)
    state = load_checkpoint(checkpoint)
    if form == "pickle":
        checkpoint.write_bytes(_pickled(malicious))
    else:
        torch.save(malicious if form == "torch" else state | {"extras": {"history": malicious}}, checkpoint)
    _assert_refused(checkpoint, "training.pt cannot be read as a checkpoint")
    assert not marker.exists()
    torch.load(checkpoint, weights_only=False) if form != "pickle" else pickle.loads(checkpoint.read_bytes())
    assert marker.exists(), "the payload would not have worked anyway"


def test_a_checkpoint_of_another_length_of_training_is_refused(checkpoint: Path):
    words = "training.pt is of a training of 3 steps, this one has {}: continue with the settings it was started with"
    _assert_refused(checkpoint, words.format(6), config=TrainConfig(epochs=2))
    _assert_refused(checkpoint, words.format(2), loader=make_loader(NoisyImages(16)))


def test_a_checkpoint_of_other_settings_is_refused_and_they_are_named(checkpoint: Path):
    changed = TrainConfig(epochs=1, optimizer="adamw", momentum=0.5)
    words = "training.pt is of optimizer='sgd', here 'adamw'; momentum=0.9, here 0.5: continue with the settings"
    _assert_refused(checkpoint, words, config=changed)


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path):
    wider, deeper = make_net(), make_net()
    wider[9] = nn.Linear(24, 5)
    deeper.append(nn.Linear(4, 4))
    for model in (wider, deeper):
        _assert_refused(checkpoint, "training.pt is of a model with other weights: continue with", model=model)


def test_a_checkpoint_of_another_kind_of_training_or_loader_is_refused(checkpoint: Path):
    kind = "training.pt is of another kind of training or loader: continue with"
    _assert_refused(checkpoint, kind, loader=DataLoader(NoisyImages(24), batch_size=8))
    supernet = make_supernet()
    with pytest.raises(InputError, match="training.pt is of a model with other weights; another kind of training"):
        train_supernet(
            supernet, make_loader(NoisyImages(24)), config=_SETTINGS, checkpoint=checkpoint, show_progress=False
        )
