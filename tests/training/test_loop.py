import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
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

import psenet
from psenet.errors import InputError
from psenet.training import TrainConfig, TrainingDivergedError, train_model, train_supernet
from psenet.training.checkpoint import load_checkpoint
from psenet.training.feed import Feed
from psenet.training.loop import make_accelerator

# Steps ----------------------------------------------------------------------------------------------------------------


def _learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """A cosine over all steps, the first of them replaced by a straight line from a hundredth."""
    warmup, peak = int(config.warmup_ratio * num_steps), config.learning_rate
    if step < warmup:
        return peak * (0.01 + 0.99 * step / warmup)
    return peak * (1 + math.cos(math.pi * step / num_steps)) / 2


def _train_by_hand(model: nn.Module, loader: DataLoader, config: TrainConfig, *, max_steps: int = 10**9) -> None:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=config.momentum > 0)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    num_steps, step = config.epochs * len(loader), 0
    model.train()
    feed = Feed(loader, _Epochs(loader))
    for epoch in range(config.epochs):
        for x, labels in feed.epoch(epoch):
            if step == max_steps:
                return
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, num_steps, config)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels, label_smoothing=config.label_smoothing).backward()
            optimizer.step()
            step += 1


class _Epochs:
    """A loader that is told of epochs, as accelerate's is."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def _assert_close(ours: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_one_step_is_nesterov_with_decay_of_the_weights_but_not_of_norms_and_biases():
    model = make_net(dtype=torch.float64)
    before, dataset = copy.deepcopy(model), NoisyImages(8, dtype=torch.float64, noise=0.0)
    config = TrainConfig(epochs=1, learning_rate=0.05, weight_decay=0.1, momentum=0.8, warmup_ratio=0.0)
    train_quietly(model, make_loader(dataset, shuffle=False), config)
    F.cross_entropy(before(dataset.images), dataset.labels).backward()
    undecayed = {"1.weight", "1.bias", "4.weight", "4.bias", "9.bias"}
    for name, parameter in before.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad + (0.0 if name in undecayed else 0.1) * parameter.detach()
        expected = parameter.detach() - 0.05 * (gradient + 0.8 * gradient)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(epochs=3, warmup_ratio=0.0),
        TrainConfig(epochs=3, warmup_ratio=0.5, label_smoothing=0.1, momentum=0.5, weight_decay=0.05),
        TrainConfig(epochs=2, momentum=0.0),
        TrainConfig(epochs=3, optimizer="adamw", learning_rate=0.01, weight_decay=0.2, warmup_ratio=0.3),
    ],
    ids=["sgd", "sgd with warmup and smoothing", "sgd without momentum", "adamw"],
)
@pytest.mark.parametrize("max_steps", [None, 4], ids=["all", "first steps"])
def test_training_equals_a_plain_loop(config: TrainConfig, max_steps: int | None):
    ours, expected = make_net(dtype=torch.float64), make_net(dtype=torch.float64)
    dataset = NoisyImages(20, dtype=torch.float64)  # batches of 8, 8 and 4
    torch.manual_seed(11)
    train_quietly(ours, make_loader(dataset), config, max_steps=max_steps)
    torch.manual_seed(11)
    _train_by_hand(expected, make_loader(dataset), config, max_steps=10**9 if max_steps is None else max_steps)
    _assert_close(ours, expected)


def test_the_momentum_of_sgd_does_not_reach_adamw():
    one, other = make_net(), make_net()
    for model, momentum in ((one, 0.0), (other, 0.7)):
        torch.manual_seed(0)
        train_quietly(model, make_loader(NoisyImages(16)), TrainConfig(epochs=1, optimizer="adamw", momentum=momentum))
    assert_same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("max_steps", [0, 1, 3, 5])
def test_training_stops_after_the_steps_asked_for(max_steps: int, tmp_path: Path):
    loss_fn, checkpoint = CountingLoss(), tmp_path / "c.pt"
    config = TrainConfig(epochs=3)
    train_quietly(
        make_net(), make_loader(NoisyImages(16)), config, loss_fn=loss_fn, max_steps=max_steps, checkpoint=checkpoint
    )
    assert loss_fn.num_calls == max_steps
    assert checkpoint.exists() == (max_steps >= 2)


def test_no_epochs_change_nothing():
    model = make_net()
    before = copy_of(model.state_dict())
    train_quietly(model, make_loader(NoisyImages(8)), TrainConfig(epochs=0))
    assert_same(dict(model.state_dict()), before)


def test_a_model_that_comes_in_eval_mode_is_trained_in_train_mode():
    model, expected = make_net(dtype=torch.float64), make_net(dtype=torch.float64)
    dataset, config = NoisyImages(16, dtype=torch.float64, noise=0.0), TrainConfig(epochs=1)
    train_quietly(model.eval(), make_loader(dataset), config)
    _train_by_hand(expected, make_loader(dataset), config)
    assert model.get_buffer("1.num_batches_tracked") == 2
    _assert_close(model, expected)


def test_a_loader_without_batches_is_refused():
    loader = DataLoader(NoisyImages(4), batch_size=8, drop_last=True)
    with pytest.raises(InputError, match="the training loader has no batches; lower the batch size or give more"):
        train_quietly(make_net(), loader, TrainConfig())


def test_the_settings_are_the_default_ones_if_none_are_given():
    ours, expected = make_net(), make_net()
    loss_fn = CountingLoss()
    torch.manual_seed(0)
    train_model(ours, make_loader(NoisyImages(8)), loss_fn=loss_fn, show_progress=False)
    assert loss_fn.num_calls == TrainConfig().epochs
    torch.manual_seed(0)
    train_quietly(expected, make_loader(NoisyImages(8)), TrainConfig())
    assert_same(ours.state_dict(), expected.state_dict())


# Divergence -----------------------------------------------------------------------------------------------------------


def _scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda losses: losses * factor


def _with_broken_gradient(losses: torch.Tensor) -> torch.Tensor:
    return losses + (losses * 0).sqrt().where(losses < 0, losses * 0)  # 0, but its gradient is 0 * inf


def _diverge(tmp_path: Path, changes: dict[int, Any], *, num_images: int = 24) -> tuple[str, Path]:
    """Train three epochs and return the words of the error, and the checkpoint."""
    path = tmp_path / "training.pt"
    with pytest.raises(TrainingDivergedError) as caught:
        config = TrainConfig(epochs=3)
        train_quietly(
            make_net(), make_loader(NoisyImages(num_images)), config, checkpoint=path, loss_fn=CountingLoss(changes)
        )
    return str(caught.value), path


@pytest.mark.parametrize(("factor", "name"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_stops_the_training_and_the_last_good_epoch_stays(
    tmp_path: Path, factor: float, name: str
):
    words, path = _diverge(tmp_path, {5: _scaled(factor)})
    assert words == (
        f"the loss is {name} at step 5 (weights, images and the outputs of all layers are finite, the loss of them is "
        f"not): lower the learning rate or check the data; the last good state is kept in {path}"
    )
    state = load_checkpoint(path)
    assert state["position"]["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["module"].values())
    model, loss_fn = make_net(), CountingLoss()
    train_quietly(model, make_loader(NoisyImages(24)), TrainConfig(epochs=3), checkpoint=path, loss_fn=loss_fn)
    assert loss_fn.num_calls == 6
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_loss_that_breaks_within_an_epoch_is_found_before_it_breaks_the_weights(tmp_path: Path):
    words, path = _diverge(tmp_path, {4: _scaled(math.nan)})
    assert words.startswith("the loss is nan at step 4 (weights, images and the outputs of all layers are finite")
    assert load_checkpoint(path)["position"]["epoch"] == 1


def test_a_loss_that_breaks_in_a_long_epoch_is_found_before_its_end(tmp_path: Path):
    words, path = _diverge(tmp_path, {1: _scaled(math.nan)}, num_images=8 * 30)
    assert words == (
        "the loss is nan at step 1 (weights, images and the outputs of all layers are finite, the loss of them is not)"
        ": lower the learning rate or check the data; there is no checkpoint yet"
    )
    assert not path.exists()


class _Overflowing(nn.Module):
    """Gives infinity where a float32 has no more room."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 1e30) * 1e30


def test_the_layer_whose_outputs_are_not_finite_is_named():
    model = make_net()
    model[5] = _Overflowing()
    with pytest.raises(
        TrainingDivergedError, match=r"nan at step 0 \(weights and images are finite, the outputs of layer 5 "
    ):
        train_quietly(model, make_loader(NoisyImages(8)), TrainConfig(epochs=1))


def test_images_that_are_not_finite_are_named():
    dataset = NoisyImages(8)
    dataset.images[3] = math.inf
    with pytest.raises(
        TrainingDivergedError, match=r"nan at step 0 \(the batch itself has values that are not finite\)"
    ):
        train_quietly(make_net(), make_loader(dataset), TrainConfig(epochs=1))


def test_weights_that_only_the_last_step_breaks_do_not_become_the_checkpoint(tmp_path: Path):
    words, path = _diverge(tmp_path, {5: _with_broken_gradient})
    number = len(list(make_net().named_parameters()))
    assert words.startswith(f"{number} weights are not finite after step 5, 0.weight first: lower the learning rate")
    state = load_checkpoint(path)
    assert state["position"]["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["module"].values())


def test_running_statistics_that_the_last_step_breaks_do_not_become_the_checkpoint(tmp_path: Path):
    model, path = make_net(), tmp_path / "training.pt"

    def break_statistics(gradient: torch.Tensor) -> None:  # comes when all other gradients are there
        if int(model.get_buffer("1.num_batches_tracked")) == 6:
            model.get_buffer("4.running_var").fill_(math.inf)

    model.get_parameter("0.weight").register_hook(break_statistics)
    with pytest.raises(
        TrainingDivergedError, match=r"^1 running statistics are not finite after step 5, 4\.running_var first: lower"
    ):
        train_quietly(model, make_loader(NoisyImages(24)), TrainConfig(epochs=3), checkpoint=path)
    assert load_checkpoint(path)["position"]["epoch"] == 1


def test_masks_may_be_infinite():
    model = make_net()
    model.register_buffer("mask", torch.full((2,), -math.inf))
    train_quietly(model, make_loader(NoisyImages(8)), TrainConfig(epochs=1))


# Small batches --------------------------------------------------------------------------------------------------------


def _pooled_norm() -> nn.Sequential:
    """Return a net with a norm over one value a channel and sample."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)),
    )


def _tiny_groups() -> nn.Sequential:
    """Return a net with groups of 2 and 3 channels, and one channel that cannot vary."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 1), (1, 2), (2, 3)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))


def _train(model: nn.Sequential, strategy: str | None, num_images: int, batch_size: int) -> None:
    loader, config = make_loader(NoisyImages(num_images), batch_size=batch_size), TrainConfig(epochs=2)
    if strategy is None:
        train_quietly(model, loader, config)
        return
    supernet = psenet.Supernet(model, psenet.trace(model, torch.randn(1, 3, 6, 6), divisor=1))
    history = train_supernet(supernet, loader, num_subnets=4, strategy=strategy, config=config, show_progress=False)
    assert np.isfinite(history.losses).all()


_each_way = pytest.mark.parametrize("strategy", [None, "parallel", "sandwich", "bilateral", "single-path"])


@_each_way
@pytest.mark.parametrize(("num_images", "batch_size"), [(9, 8), (3, 8), (3, 1), (1, 1)])
def test_batches_of_one_sample_and_fewer_samples_than_subnets_are_trained_on(
    strategy: str | None, num_images: int, batch_size: int
):
    model = _tiny_groups()
    _train(model, strategy, num_images, batch_size)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@_each_way
def test_one_sample_with_one_value_a_channel_is_refused_and_it_is_said_how_to_leave_it_out(strategy: str | None):
    with pytest.raises(InputError, match=r"which has no variance .* \(drop_last=True leaves out a short last one\)"):
        _train(_pooled_norm(), strategy, 9, 8)


# Mixed precision ------------------------------------------------------------------------------------------------------


def _assert_plain(module: nn.Module) -> None:
    for path, part in module.named_modules():
        assert not {"forward", "_original_forward"} & vars(part).keys(), path


@pytest.mark.parametrize("kind", ["model", "supernet"])
@pytest.mark.parametrize("ends", ["well", "badly"])
def test_half_precision_leaves_a_plain_module_of_full_precision(kind: str, ends: str):
    loss_fn, config = CountingLoss(), TrainConfig(epochs=2, mixed_precision="bf16")
    if ends == "badly":
        loss_fn.changes = {1: raising(RuntimeError("out of luck"))}
    loader, x = make_loader(NoisyImages(16)), torch.randn(4, 3, 6, 6)
    model, supernet = make_net(), make_supernet()
    module: nn.Module = model if kind == "model" else supernet
    before = copy_of(module.state_dict())
    with pytest.raises(RuntimeError, match="out of luck") if ends == "badly" else nullcontext():
        if kind == "model":
            train_quietly(model, loader, config, loss_fn=loss_fn)
        else:
            train_supernet(supernet, loader, num_subnets=2, config=config, loss_fn=loss_fn, show_progress=False)
    assert loss_fn.dtypes == {torch.float32}
    _assert_plain(module)
    assert all(tensor.dtype == before[name].dtype for name, tensor in module.state_dict().items())
    twin = copy.deepcopy(module)
    _assert_plain(twin)
    arguments: Any = (x,) if kind == "model" else (x, supernet.space.full())
    ours, copied = module.eval()(*arguments), twin.eval()(*arguments)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, copied)


def _scaling(monkeypatch: pytest.MonkeyPatch, first_scale: float) -> torch.amp.GradScaler:
    """Let trainings scale their gradients, as in fp16 on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=first_scale)

    def make_accelerator(_: str) -> Accelerator:
        accelerator = Accelerator(step_scheduler_with_optimizer=False)
        accelerator.scaler = scaler
        return accelerator

    monkeypatch.setattr("psenet.training.loop.make_accelerator", make_accelerator)
    return scaler


def test_gradients_that_overflow_leave_a_step_out_and_are_no_divergence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    scaler = _scaling(monkeypatch, 2.0**127)
    model, loss_fn = make_net(), CountingLoss(dict.fromkeys(range(3), _scaled(1000)))
    before = copy_of(model.state_dict())
    train_quietly(
        model, make_loader(NoisyImages(160)), TrainConfig(epochs=1), loss_fn=loss_fn, checkpoint=tmp_path / "c.pt"
    )
    assert loss_fn.num_calls == 20
    assert scaler.get_scale() == 2.0**124
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_gradients_that_are_never_finite_stop_a_training_that_scales_them(monkeypatch: pytest.MonkeyPatch):
    _scaling(monkeypatch, 2.0**16)
    model = make_net()
    before = copy_of(model.state_dict())
    changes = dict.fromkeys(range(10, 1000), _with_broken_gradient)
    with pytest.raises(
        TrainingDivergedError, match=r"^the gradients of the last 40 steps, up to step 49, are not finite: .*take bf16"
    ):
        train_quietly(model, make_loader(NoisyImages(8 * 60)), TrainConfig(epochs=2), loss_fn=CountingLoss(changes))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def test_the_precision_asked_for_is_the_one_computed_in_whatever_came_before():
    seen: list[torch.dtype] = []
    precisions: tuple[Literal["no", "bf16"], ...] = ("no", "bf16", "no", "bf16")
    for precision in precisions:
        model = make_net()
        model[3].register_forward_hook(
            lambda _part, _inputs, output: seen.append(output.dtype) if output.requires_grad else None
        )
        train_quietly(model, make_loader(NoisyImages(8)), TrainConfig(epochs=1, mixed_precision=precision))
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has this precision")
def test_a_precision_that_the_device_lacks_is_refused_and_the_others_still_work():
    model = make_net()
    with pytest.raises(InputError, match=r"mixed_precision='fp16' is not possible"):
        train_quietly(model, make_loader(NoisyImages(8)), TrainConfig(epochs=1, mixed_precision="fp16"))
    train_quietly(model, make_loader(NoisyImages(8)), TrainConfig(epochs=1, mixed_precision="no"))
    _assert_plain(model)


def test_full_precision_leaves_a_plain_module_too():
    model = make_net()
    train_quietly(model, make_loader(NoisyImages(8)), TrainConfig(epochs=1))
    _assert_plain(model)


# Several processes; the rest is in test_several_processes.py ----------------------------------------------------------


def test_an_accelerate_that_splits_models_is_refused(monkeypatch: pytest.MonkeyPatch):
    splitting = property(lambda accelerator: DistributedType.FSDP)
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", splitting)
    with pytest.raises(
        InputError, match="trains whole models, .*accelerate is set up for FSDP: launch with --multi_gpu"
    ):
        make_accelerator()


def test_an_accelerate_that_does_not_know_of_the_other_processes_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psenet.ranks.num_ranks", lambda: 2)
    with pytest.raises(InputError, match="2 processes were started and accelerate knows of 1: make no Accelerator"):
        make_accelerator()


# What is shown --------------------------------------------------------------------------------------------------------


def test_the_progress_bar_counts_the_steps_of_all_epochs(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    data = TensorDataset(torch.randn(16, 3, 6, 6), torch.arange(16) % 4)
    config = TrainConfig(epochs=2)
    for show, epochs_to_do in itertools.product((True, False), (2, 0)):
        checkpoint = tmp_path / f"{show}.pt"
        train_model(
            make_net(),
            DataLoader(data, batch_size=8),
            config=config,
            checkpoint=checkpoint,
            description="warming up",
            show_progress=show,
        )
        shown = capsys.readouterr()
        assert shown.err == ""
        assert ("warming up" in shown.out and "4/4" in shown.out) if show else shown.out == ""
        assert ("loss" in shown.out) == (show and epochs_to_do == 2)
