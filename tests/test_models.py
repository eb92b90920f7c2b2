import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from psenet.errors import InputError
from psenet.models import build_model, digits_resnet, resnet20


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A current directory of the user's; the modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_resnet20_has_the_published_weights_and_the_1x1_shortcuts():
    model = resnet20()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # Stem, 18 in blocks, 2 shortcuts. 0.27 M parameters in the paper's table 6, without shortcut convolutions.
    assert len(convolutions) == 21
    three_by_three = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64 + 32 + 64)
    expected = three_by_three + norms + 16 * 32 + 32 * 64 + 64 * 10 + 10
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_resnet20_halves_the_resolution_twice():
    model = resnet20(num_classes=7).eval()
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_convolutions_start_with_he_variance():
    torch.manual_seed(0)
    weight = resnet20().get_parameter("stages.2.1.conv1.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


def test_digits_resnet_takes_grey_digits_and_has_widths_that_are_multiples_of_8():
    model = digits_resnet().eval()
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    widths = {module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert widths == {32, 64}


@pytest.mark.parametrize("spec", ["timm:resnet10t", "torchvision:squeezenet1_1", "psenet.models:resnet20"])
def test_every_source_builds_a_model_with_the_wanted_outputs(spec):
    model = build_model(spec, num_classes=5).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_timm_and_own_models_take_other_input_channels():
    for spec in ("timm:resnet10t", "psenet.models:digits_resnet"):
        assert build_model(spec, num_classes=5, in_channels=1).eval()(torch.randn(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("spec", ["resnet20", ":resnet20", "timm:", ""])
def test_a_specification_without_its_two_parts_is_refused(spec):
    with pytest.raises(InputError, match="a model is timm:NAME, torchvision:NAME or my.module:factory"):
        build_model(spec, num_classes=5)


@pytest.mark.parametrize(
    ("spec", "close"), [("timm:mobilnetv2_100", "mobilenetv2_100"), ("torchvision:resnet81", "resnet18")]
)
def test_an_unknown_model_is_answered_with_close_names(spec, close):
    with pytest.raises(InputError, match=f"has no classification model .*did you mean .*{close}"):
        build_model(spec, num_classes=5)


def test_torchvision_detectors_are_no_classification_models():
    with pytest.raises(InputError, match="torchvision has no classification model 'fasterrcnn_resnet50_fpn'"):
        build_model("torchvision:fasterrcnn_resnet50_fpn", num_classes=5)


def test_torchvision_refuses_grey_images():
    with pytest.raises(InputError, match="torchvision models take images of 3 channels; the data has 1"):
        build_model("torchvision:resnet18", num_classes=5, in_channels=1)


def test_published_torchvision_weights_need_their_own_number_of_classes():
    with pytest.raises(InputError, match="for 1000 classes and the data has 5"):
        build_model("torchvision:resnet18", num_classes=5, pretrained=True)


def test_pretrained_needs_published_weights():
    with pytest.raises(InputError, match="timm publishes no weights for 'resnet10t.nothing'"):
        build_model("timm:resnet10t.nothing", num_classes=5, pretrained=True)
    with pytest.raises(InputError, match="published weights exist for timm and torchvision models only"):
        build_model("psenet.models:resnet20", num_classes=5, pretrained=True)


def test_a_failed_download_says_how_to_go_on(monkeypatch):
    import timm

    def without_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.raises(InputError, match=r"no route to host.*--weights FILE"):
        build_model("timm:resnet18", num_classes=5, pretrained=True)


def test_a_timm_model_that_cannot_be_built_says_why():
    with pytest.raises(InputError, match=r"timm:resnet18.wrong could not be built: Invalid pretrained tag"):
        build_model("timm:resnet18.wrong", num_classes=5)


@pytest.mark.parametrize(("num_classes", "in_channels"), [(0, 3), (5, 0)])
def test_a_model_without_classes_or_input_channels_is_refused(num_classes, in_channels):
    with pytest.raises(
        InputError, match=f"at least one class and one input channel; got {num_classes} and {in_channels}"
    ):
        build_model("timm:resnet18", num_classes=num_classes, in_channels=in_channels)


def test_a_factory_in_the_current_directory_gets_the_arguments_it_accepts(user_folder):
    text = """
from torch import nn
def both(num_classes, in_channels): return nn.Linear(in_channels, num_classes)
def one(*, num_classes): return nn.Linear(3, num_classes)
def none(): return nn.Linear(3, 4)
def any(**settings): return nn.Linear(settings["in_channels"], settings["num_classes"])
"""
    write_module(user_folder, "user_nets", text)
    path_before = list(sys.path)
    shapes = {
        name: tuple(build_model(f"user_nets:{name}", num_classes=6, in_channels=2).weight.shape)  # pyright: ignore
        for name in ("both", "one", "none", "any")
    }
    assert shapes == {"both": (6, 2), "one": (6, 3), "none": (4, 3), "any": (6, 2)}
    assert sys.path == path_before


def test_broken_factories_are_told_apart(user_folder):
    text = """
from torch import nn
def fails(): raise KeyError("depth")
def number(): return 3
ready = nn.Linear(3, 3)
"""
    write_module(user_folder, "broken_nets", text)
    write_module(user_folder, "needs_more", "import a_package_nobody_has\n")
    write_module(user_folder, "bad_syntax", "def (:\n")
    messages = {
        "broken_nets:fails": r"broken_nets:fails\(\) raised KeyError: 'depth'",
        "broken_nets:number": "must return a torch.nn.Module; it returned int",
        "broken_nets:ready": "must be a function or class that makes the model; it is a Linear",
        "broken_nets:fail": "has no 'fail'; did you mean fails",
        "needs_more:net": "needs the package 'a_package_nobody_has', which is not installed",
        "bad_syntax:net": "importing bad_syntax raised SyntaxError",
        "no_such_module:net": "no module 'no_such_module' in the current directory or the environment",
    }
    for spec, message in messages.items():
        with pytest.raises(InputError, match=message):
            build_model(spec, num_classes=5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_read_from_a_file(tmp_path, suffix):
    trained = digits_resnet()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save({"state_dict": trained.state_dict()}, path)
    model = build_model("psenet.models:digits_resnet", num_classes=10, in_channels=1, weights=path)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_that_do_not_fit_are_reported_all_together(tmp_path):
    state = digits_resnet().state_dict()
    del state["conv1.weight"]
    state["extra.weight"] = torch.zeros(2)
    state["fc.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "weights.safetensors")
    message = (
        r"do not fit the model. missing: conv1.weight. not in the model: extra.weight. "
        r"other shape: fc.bias is \(7,\), the model has \(10,\)"
    )
    with pytest.raises(InputError, match=message):
        build_model(
            "psenet.models:digits_resnet", num_classes=10, in_channels=1, weights=tmp_path / "weights.safetensors"
        )


class Payload:
    """An object that a file of weights has no business to hold."""


def test_bad_weights_files_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not tensors")
    (tmp_path / "text.pth").write_text("not tensors")
    torch.save({"conv1.weight": Payload()}, tmp_path / "pickled.pth")
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "numbers.pth")
    (tmp_path / "weights.bin").write_bytes(b"")
    messages = {
        "missing.pth": "there is no weights file .*missing.pth",
        "weights.bin": "a weights file is .safetensors, .pth or .pt",
        "text.safetensors": "cannot be read as tensors only",
        "text.pth": "cannot be read as tensors only",
        "pickled.pth": "cannot be read as tensors only",
        "numbers.pth": "must hold a state dict: tensors by name",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            build_model("psenet.models:resnet20", num_classes=10, weights=tmp_path / name)


def test_pretrained_and_a_weights_file_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match="exclude each other"):
        build_model("timm:resnet18", num_classes=5, pretrained=True, weights=tmp_path / "weights.pth")
