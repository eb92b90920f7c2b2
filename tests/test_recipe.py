"""Recipes: what they hold, which source wins, and every mistake named with its line."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import psenet
from psenet import Budget, PruneConfig
from psenet.cli.prune import KEYS, prune
from psenet.errors import InputError
from psenet.recipe import TEMPLATES, Override, read_recipe, recipe_defaults
from psenet.recipe_text import commented_text, plain_text
from psenet.runners import Runner
from psenet.training import TrainConfig

LEAST = "model: {name: timm:resnet18}\ndata: {source: digits}\nbudget: {macs: 50%}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def _set(key: str, value: Any, option: str = "--set") -> Override:
    return Override(tuple(key.split(".")), value, option)


# What a recipe says ---------------------------------------------------------------------------------------------------


def test_what_is_not_given_keeps_the_default_of_prune(write: Any):
    recipe = read_recipe(write(LEAST))
    assert recipe.settings == PruneConfig()
    assert recipe.budget == Budget(macs="50%")
    assert (recipe.model.name, recipe.data.source, recipe.data.batch_size) == ("timm:resnet18", "digits", 128)


def test_every_kind_of_value_is_read(write: Any):
    text = """
model: {name: 'nets:make', weights: 学習済み.safetensors}
data: {source: 写真 🙂, image_size: 64}
budget: {macs: 300000000, params: 2M, latency_ms: 4.5}
supernet: {epochs: 3, learning_rate: 1e-3, mixed_precision: no}
latency: {engine: onnxruntime, num_threads: 2}
exclude: [stem, 'layer4.*']
focus: true
seed: 7
"""
    recipe = read_recipe(write(text))
    assert recipe.model.weights == "学習済み.safetensors" and recipe.data.source == "写真 🙂"
    assert recipe.budget == Budget(macs=300_000_000, params="2M", latency_ms=4.5)
    supernet = TrainConfig(epochs=3, learning_rate=1e-3)
    assert recipe.settings == PruneConfig(
        supernet=supernet,
        latency=Runner(engine="onnxruntime", num_threads=2),
        exclude=("stem", "layer4.*"),
        focus=True,
        seed=7,
    )
    assert recipe.prune_config() == replace(recipe.settings, trained=True)


def test_a_training_given_in_part_keeps_its_own_defaults(write: Any):
    recipe = read_recipe(write(LEAST + "supernet: {epochs: 2}\nfinetune: {momentum: 0.5}\n"))
    assert recipe.settings.supernet == TrainConfig(epochs=2, learning_rate=0.05)
    assert recipe.settings.finetune == TrainConfig(epochs=10, learning_rate=0.02, momentum=0.5)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_template(write: Any):
    path = write(LEAST + "supernet: {epochs: 20, momentum: 0.8}\n")
    recipe = read_recipe(path, template="pilot", overrides=[_set("supernet.epochs", 5), _set("budget.macs", "30%")])
    assert recipe.settings.supernet == TrainConfig(epochs=5, momentum=0.8, learning_rate=0.05)
    assert recipe.settings.baseline.epochs == TEMPLATES["pilot"]["baseline"]["epochs"]
    assert recipe.budget.macs == "30%"


def test_a_pilot_is_less_work_than_the_default_and_that_less_than_a_full_run(write: Any):
    pilot, usual, full = (read_recipe(write(LEAST), template=name).settings for name in ("pilot", None, "full"))
    for part in ("baseline", "supernet", "finetune"):
        assert getattr(pilot, part).epochs < getattr(usual, part).epochs < getattr(full, part).epochs
    assert pilot.num_evaluations < usual.num_evaluations < full.num_evaluations


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("write_text", [plain_text, commented_text])
def test_a_written_recipe_is_read_as_the_same(template: str | None, write_text: Any, write: Any):
    text = LEAST + "exclude: [stem, '*.bn']\nlatency: {engine: compile}\nreport: {language: ja, currency: 円}\n"
    recipe = read_recipe(write(text), template=template)
    again = read_recipe(write(write_text(recipe)))
    assert again == recipe


def test_every_value_of_a_commented_recipe_has_its_comment_and_its_default():
    given = {"model.name": "m:n", "data.source": "d", "budget.macs": 9}
    recipe = read_recipe(overrides=[_set(key, value) for key, value in given.items()])
    text = commented_text(recipe)
    for name, default in recipe_defaults().items():
        if not isinstance(default, dict):
            assert f"# {name}: " in text
    # What stands behind # is the default: without the marks it reads the same.
    bare = re.sub(r"^( *)# ([a-z_]+: )", r"\1\2", text, flags=re.MULTILINE)
    values = yaml.safe_load(bare)
    for name, default in recipe_defaults().items():
        if isinstance(default, dict):
            assert list(values[name]) == list(default)
    assert values["supernet"] == recipe_defaults()["supernet"]


def test_every_value_of_a_recipe_can_be_set_from_the_command_line():
    good = {"model.name": "timm:resnet18", "data.source": "digits", "budget.macs": "50%"}
    for name, default in recipe_defaults().items():
        for key, value in (
            {f"{name}.{part}": v for part, v in default.items()} if isinstance(default, dict) else {name: default}
        ).items():
            chosen = {**good, key: good.get(key, value)}
            recipe = read_recipe(overrides=[_set(key, value) for key, value in chosen.items()])
            assert recipe.settings == PruneConfig()


def test_the_options_of_prune_show_the_defaults_of_the_recipe():
    defaults = recipe_defaults()
    shown = {name: parameter.default for name, parameter in inspect.signature(prune).parameters.items()}
    for option, keys in KEYS.items():
        for key in keys:
            section, _, part = key.partition(".")
            default = defaults[section][part] if part else defaults[section]
            if option in ("optimizer", "weight_decay", "mixed_precision", "distill") or default:
                assert shown[option] == default, option
            else:
                assert not shown[option], option


def test_the_package_s_python_api_takes_what_a_recipe_gives(write: Any):
    recipe = read_recipe(write(LEAST))
    parameters = inspect.signature(psenet.prune).parameters
    assert {"budget", "config"} <= set(parameters)
    assert isinstance(recipe.prune_config(), PruneConfig) and isinstance(recipe.budget, Budget)


# Mistakes -------------------------------------------------------------------------------------------------------------


def _problems(path: Path | None, *overrides: Override) -> list[str]:
    with pytest.raises(InputError) as raised:
        read_recipe(path, overrides=overrides)
    head, *lines = str(raised.value).splitlines()
    assert head == "the recipe cannot be used:"
    return [line.strip().replace(f"{path}:", "") for line in lines]


def test_all_mistakes_are_named_at_once_with_their_lines(write: Any):
    path = write(
        "model:\n  nme: timm:resnet18\ndata: {source: digits, batch_size: 1}\nbudget:\n  macs: 50%\n  paramz: 3\n"
        "supernet: {learning_rate: fast}\nmixed_precision: no\nfinetune:\n  epochs: -1\nexclude: head\n"
    )
    problems = _problems(path, _set("divisor", "x", "--divisor"))
    expected = [
        "2: there is no 'nme' in 'model'; did you mean name?",
        "6: there is no 'paramz' in 'budget'; did you mean params?",
        "8: there is no 'mixed_precision'; did you mean baseline.mixed_precision or supernet.mixed_precision or "
        "finetune.mixed_precision?",
        "1: model.name must be given",
        "3: data: batch_size must be at least 2 and at most 2147483647; got 1",
        "7: supernet.learning_rate: input should be a valid number, unable to parse string as a number; got 'fast'",
        "9: finetune: training settings: epochs must be an integer of at least 0; got -1",
        "--divisor: divisor: input should be a valid integer, unable to parse string as an integer; got 'x'",
        "11: exclude: must be a list, such as [stem, 'layer4.*']; got 'head'",
    ]
    assert sorted(problems) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget: {}\n", "3: a budget needs at least one limit"),
        ("budget: {macs: 0%}\n", "3: the budget's macs must be above 0%"),
        ("budget: 5\n", "3: budget: must be a mapping of names to values; got 5"),
        ("budget: {macs: 1}\nsupernet: 5\n", "4: supernet: must be a mapping of names to values; got 5"),
        ("budget: {macs: 1}\ntrained: true\n", "4: trained follows from the model's weights; leave it out"),
        (
            "budget: {macs: 1}\nlatency: {engine: tpu}\n",
            "4: latency: engine must be one of eager, compile, onnxruntime",
        ),
        ("budget: {macs: 1}\nreport: {language: de}\n", "4: report.language: input should be 'en' or 'ja'; got 'de'"),
        (
            "budget: {macs: 1}\nreport: {price_per_hour: -1}\n",
            "4: report: price_per_hour must be a number of at least 0",
        ),
        ("budget: {macs: 1}\nfocus: perhaps\n", "4: focus: must be true or false; got 'perhaps'"),
        ("budget: {macs: 1}\n7: 8\n", "4: there is no 7; there are model, data, budget"),
        ("budget: {macs: 1}\nsupernet: {3: 4}\n", "4: there is no 3 in 'supernet'; there are epochs"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(text: str, message: str, write: Any):
    path = write("model: {name: timm:resnet18}\ndata: {source: digits}\n" + text)
    assert any(problem.startswith(message) for problem in _problems(path)), _problems(path)


def test_weights_twice_are_a_contradiction(write: Any):
    text = LEAST.replace("{name:", "{pretrained: true, weights: w.pth, name:")
    assert _problems(write(text)) == [
        "1: model: pretrained weights and a weights file exclude each other; give one of them"
    ]


def test_an_unknown_template_is_named():
    with pytest.raises(InputError, match="template must be one of pilot, full; got 'quick'"):
        read_recipe(template="quick")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\n", r":2: this is no YAML: "),
        ("- model\n", r":1: must be a mapping of names to values"),
        ("seed: 1\nseed: 2\n", r"line 2: seed is already given in line 1"),
        ("data:\n  source: a\n  source: b\n", r"line 3: data.source is already given in line 2"),
        ("a: !!python/object/apply:os.system [ls]\n", r"could not determine a constructor"),
        ("x: " + "a" * 1_000_001, r"must be a page of YAML; it has 1,000,004 bytes"),
    ],
)
def test_a_file_that_is_no_recipe_is_explained(text: str, message: str, write: Any):
    with pytest.raises(InputError, match=message):
        read_recipe(write(text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.yaml cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(InputError, match="must be text in UTF-8"):
        read_recipe(tmp_path / "latin.yaml")
