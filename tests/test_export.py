import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from psenet.errors import InputError
from psenet.export import ExportChoice, ExportReport, export_model
from psenet.widths import Widths

WIDTHS = Widths({"conv": 6})
FILES = ["model.onnx", "model.pt2", "weights.safetensors", "widths.json"]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.Hardswish(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    net(torch.randn(8, 3, 8, 8))  # statistics that are not the initial ones
    return net


def _eager(net: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(*inputs)


def _onnx(path: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return [np.asarray(output) for output in session.run(None, feed)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, ExportReport]:
    net, folder = _net().train(), tmp_path_factory.mktemp("export") / "model"
    net[3].eval()
    report = export_model(net, torch.randn(1, 3, 8, 8), folder, widths=WIDTHS, details={"num_classes": 4})
    return net, folder, report


Exported = tuple[nn.Module, Path, ExportReport]


# A module that exports ------------------------------------------------------------------------------------------------


def test_every_file_is_written_and_reported(exported: Exported):
    _, folder, report = exported
    assert report.problems == () and report.batch_is_dynamic
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.paths) == FILES
    assert report.paths == {name: folder / name for name in FILES}
    assert report.bytes == {name: len((folder / name).read_bytes()) for name in FILES}


@pytest.mark.parametrize("torch_export", [True, False])
@pytest.mark.parametrize("onnx", [True, False])
def test_only_the_programs_that_are_wanted_are_made(torch_export: bool, onnx: bool, tmp_path: Path):
    net, example = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.zeros(1, 3, 4, 4)
    for name in ("model.pt2", "model.onnx"):
        (tmp_path / name).write_bytes(b"of an earlier export")
    choice = ExportChoice(torch_export=torch_export, onnx=onnx)
    report = export_model(net, example, tmp_path, widths=Widths({"0": 4}), choice=choice)
    wanted = ["model.pt2"] * torch_export + ["model.onnx"] * onnx
    assert sorted(report.paths) == sorted(["weights.safetensors", "widths.json", *wanted])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(report.paths) and report.problems == ()


def test_training_flags_come_back(exported: Exported):
    net, _, _ = exported
    assert [part.training for part in net.modules()] == [True] * 4 + [False] + [True] * 3


def test_the_weights_and_the_input_shape_are_saved(exported: Exported):
    net, folder, _ = exported
    saved = load_file(folder / "weights.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in net.state_dict().items())
    document = json.loads((folder / "widths.json").read_text())
    assert (document["widths"], document["input_shape"], document["num_classes"]) == ({"conv": 6}, [3, 8, 8], 4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_both_programs_compute_what_the_module_does_at_any_batch_size(batch_size: int, exported: Exported):
    net, folder, _ = exported
    x = torch.randn(batch_size, 3, 8, 8)
    expected = _eager(copy.deepcopy(net), x)
    torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(x), expected)
    np.testing.assert_allclose(_onnx(folder / "model.onnx", x)[0], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_the_onnx_model_is_valid_and_of_a_recent_opset(exported: Exported):
    _, folder, report = exported
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets[""] == report.onnx_opset
    assert report.onnx_opset is not None and report.onnx_opset >= 20
    assert report.onnx_max_relative_difference is not None and 0 <= report.onnx_max_relative_difference < 1e-5


def test_the_programs_run_without_psenet(exported: Exported):
    _, folder, _ = exported
    script = (
        "import sys, torch, onnxruntime\n"
        "x = torch.zeros(2, 3, 8, 8)\n"
        "assert torch.export.load(sys.argv[1] + '/model.pt2').module()(x).shape == (2, 4)\n"
        "session = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx')\n"
        "assert session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].shape == (2, 4)\n"
        "assert not any(name.split('.')[0] == 'psenet' for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_several_inputs_and_nested_outputs_are_exported(tmp_path: Path):
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
            return {"sum": x + y, "parts": (x.mean(dim=1), None)}

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    report = export_model(Two(), (x, y), tmp_path, widths=WIDTHS)
    assert report.problems == () and report.batch_is_dynamic
    total, mean = _onnx(tmp_path / "model.onnx", x[:2], y[:2])
    np.testing.assert_allclose(total, (x + y)[:2].numpy(), rtol=1e-6)
    np.testing.assert_allclose(mean, x[:2].numpy().mean(axis=1), rtol=1e-5)
    assert json.loads((tmp_path / "widths.json").read_text())["input_shape"] is None


def test_inputs_without_a_common_batch_size_fix_it(tmp_path: Path):
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    x, scale = torch.randn(3, 4), torch.tensor(2.0)
    report = export_model(Scaled(), (x, scale), tmp_path, widths=WIDTHS)
    assert sorted(report.paths) == FILES and not report.batch_is_dynamic
    assert report.problems[0].endswith("as in the example: the inputs have no batch dimension in common")
    np.testing.assert_allclose(_onnx(tmp_path / "model.onnx", x, scale)[0], x.numpy() * 2)


# Modules that do not --------------------------------------------------------------------------------------------------


class _FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 12) * 2


class _NoOnnx(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class _DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class _OtherWhenExported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if torch.compiler.is_exporting() else 3.0)


class _NotFinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


def _export(net: nn.Module, folder: Path) -> tuple[ExportReport, str]:
    report = export_model(net, torch.linspace(0, 1, 24).reshape(2, 12), folder, widths=WIDTHS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.paths) == sorted(report.bytes)
    return report, "\n".join(report.problems)


def test_a_batch_size_that_the_module_fixes_is_said(tmp_path: Path):
    report, problems = _export(_FixedBatch(), tmp_path)
    assert sorted(report.paths) == FILES and not report.batch_is_dynamic
    assert problems.startswith("the batch size is fixed at 2, as in the example: UserError")
    x = torch.randn(2, 12)
    np.testing.assert_allclose(_onnx(tmp_path / "model.onnx", x)[0], x.numpy() * 2)


def test_an_operator_that_onnx_lacks_costs_only_the_onnx_file(tmp_path: Path):
    report, problems = _export(_NoOnnx(), tmp_path)
    assert sorted(report.paths) == ["model.pt2", "weights.safetensors", "widths.json"]
    assert problems.startswith("model.onnx: DispatchError: No ONNX function found for") and "bessel_j0" in problems
    assert report.onnx_max_relative_difference is None and report.onnx_opset is None and report.batch_is_dynamic


def test_a_module_that_cannot_be_captured_keeps_its_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    report, problems = _export(_DataDependent(), tmp_path)
    assert sorted(report.paths) == ["weights.safetensors", "widths.json"]
    assert "model.pt2 and model.onnx: torch.export cannot capture the module" in problems
    assert "data-dependent" in problems
    assert capfd.readouterr() == ("", "")  # torch would print the graph


def test_a_program_that_computes_something_else_is_not_kept(tmp_path: Path):
    report, problems = _export(_OtherWhenExported(), tmp_path)
    assert sorted(report.paths) == ["weights.safetensors", "widths.json"]
    assert report.onnx_max_relative_difference == pytest.approx(1 / 3)
    for name in ("model.pt2", "model.onnx"):
        assert f"{name}: its outputs differ from the module's by 0.33 of the largest; at most 0.001" in problems


def test_outputs_that_are_not_finite_are_no_proof(tmp_path: Path):
    report, problems = _export(_NotFinite(), tmp_path)
    assert sorted(report.paths) == ["weights.safetensors", "widths.json"]
    assert "differ from the module's by nan" in problems and "outputs that are not finite" in problems


def test_programs_of_an_earlier_export_do_not_stay(exported: Exported, tmp_path: Path):
    for name in FILES:
        (tmp_path / name).write_bytes((exported[1] / name).read_bytes())
    (tmp_path / "notes.txt").write_text("mine")
    export_model(_DataDependent(), torch.ones(2, 12), tmp_path, widths=WIDTHS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "weights.safetensors", "widths.json"]


def test_flags_come_back_when_the_example_does_not_fit(tmp_path: Path):
    net = _net().train()
    report = export_model(net, torch.randn(2, 5, 8, 8), tmp_path, widths=WIDTHS)
    assert sorted(report.paths) == ["weights.safetensors", "widths.json"]
    assert "expected input" in "".join(report.problems)
    assert all(part.training for part in net.modules())


def test_exporting_into_a_file_is_refused(tmp_path: Path):
    target = tmp_path / "taken"
    target.write_text("mine")
    with pytest.raises(InputError, match="taken must be a folder"):
        export_model(_net(), torch.randn(1, 3, 8, 8), target, widths=WIDTHS)


def test_bad_details_cost_no_earlier_program(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    with pytest.raises(InputError, match="unknown details"):
        export_model(nn.Linear(3, 2), torch.randn(2, 3), tmp_path, widths=WIDTHS, details={"classes": 2})
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier"


def test_exporting_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    export_model(nn.Linear(3, 2), torch.randn(2, 3), tmp_path, widths=WIDTHS)
    assert capfd.readouterr() == ("", "")
