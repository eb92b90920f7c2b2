"""Runners on tiny nets; code generation is left out where it does not matter, because it takes half a minute."""

from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from psenet import runners
from psenet.errors import InputError
from psenet.runners import Runner


def _net(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(channels)
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Dropout(0.5), nn.Flatten())


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runners, "BACKEND", "eager")
    torch._dynamo.reset()


def _plain(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else torch.from_numpy(output[0].numpy())


@pytest.mark.usefixtures("without_code_generation")
@pytest.mark.parametrize("engine", runners.ENGINES)
def test_every_engine_runs_what_the_module_computes_on_repeated_samples(engine: str):
    net, x_BCHW = _net().train(), torch.randn(2, 3, 6, 6)
    with Runner(engine=engine, batch_size=3).prepare(net, x_BCHW) as run:
        output = _plain(run())
    assert all(part.training for part in net.modules())
    expected = net.eval()(x_BCHW[:1].repeat(3, 1, 1, 1)).detach()
    torch.testing.assert_close(output.clone(), expected)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_several_inputs_are_passed_on(engine: str):
    class Difference(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - y

    x, y = torch.full((1, 4), 5.0), torch.full((1, 4), 3.0)
    with Runner(engine=engine, batch_size=2).prepare(Difference(), (x, y)) as run:
        assert _plain(run()).tolist() == [[2.0] * 4] * 2


def test_threads_are_set_while_a_module_is_prepared_and_nested_ones_put_back():
    before = torch.get_num_threads()
    with Runner(num_threads=before + 1).prepare(nn.Identity(), torch.zeros(1)):
        assert torch.get_num_threads() == before + 1
        with Runner(num_threads=before + 2).prepare(nn.Identity(), torch.zeros(1)):
            assert torch.get_num_threads() == before + 2
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_onnx_runtime_gets_the_threads_and_stops_them_between_runs(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    session = onnxruntime.InferenceSession

    def spy(content: bytes, options: Any, **more: Any) -> Any:
        seen.append((options.intra_op_num_threads, options.get_session_config_entry("session.force_spinning_stop")))
        return session(content, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    with Runner(engine="onnxruntime", num_threads=2).prepare(_net(), torch.zeros(1, 3, 6, 6)):
        pass
    assert seen[-1] == (2, "1")


@pytest.mark.usefixtures("without_code_generation")
def test_more_modules_are_compiled_than_torch_keeps_for_one_forward(monkeypatch: pytest.MonkeyPatch):
    compiled: list[object] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(runners, "BACKEND", backend)
    x_BCHW = torch.zeros(1, 3, 6, 6)
    for channels in range(1, 13):
        with Runner(engine="compile").prepare(_net(channels), x_BCHW) as run:
            assert run().shape == (1, 16 * channels)
    assert len(compiled) == 12


@pytest.mark.usefixtures("without_code_generation")
def test_what_cannot_be_compiled_whole_is_refused():
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with (
        pytest.raises(InputError, match=r"torch.compile cannot compile the module \(.*use another engine"),
        Runner(engine="compile").prepare(Branches(), torch.zeros(1, 2)),
    ):
        pass


def test_what_cannot_be_exported_is_refused():
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with (
        pytest.raises(InputError, match="torch.export cannot capture the module"),
        Runner(engine="onnxruntime").prepare(Branches(), torch.zeros(1, 2)),
    ):
        pass


def test_all_fields_out_of_range_are_named_together():
    with pytest.raises(InputError) as caught:
        Runner(engine="tensorrt", device="gpu", num_threads=0, batch_size=0)
    assert str(caught.value) == (
        "engine must be one of eager, compile, onnxruntime; got 'tensorrt'; "
        "device must be 'cpu' or a CUDA device; got 'gpu'; num_threads must be at least 1; got 0; "
        "batch_size must be at least 1; got 0"
    )


def test_a_device_of_another_kind_is_refused():
    with pytest.raises(InputError, match="device must be 'cpu' or a CUDA device; got 'meta'"):
        Runner(device="meta")


def test_an_unavailable_cuda_device_is_named():
    beyond = f"cuda:{torch.cuda.device_count()}"
    with (
        pytest.raises(InputError, match=f"device '{beyond}' is not available: torch sees"),
        Runner(device=beyond).prepare(nn.Identity(), torch.zeros(1)),
    ):
        pass


def test_onnx_runtime_without_cuda_names_the_providers_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with (
        pytest.raises(InputError, match="this installation has CPUExecutionProvider: install onnxruntime-gpu"),
        Runner(engine="onnxruntime", device="cuda").prepare(nn.Identity(), torch.zeros(1)),
    ):
        pass
