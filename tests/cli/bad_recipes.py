"""Mistakes in recipes."""

from pathlib import Path

from bad_input import MODEL, Case, recipe

_PRUNE = "prune --recipe recipe.yaml --out run"


def _recipe(name: str, text: str, *says: str) -> Case:
    """Return a mistake in a recipe that is good up to line 3."""
    return Case(name=name, command=_PRUNE, files=recipe(text), says=says)


def _file(name: str, content: str | bytes, *says: str) -> Case:
    return Case(name=name, command=_PRUNE, files={"recipe.yaml": content}, says=says)


def _multiplied(times: int) -> str:
    """Return YAML of a page that is of astronomic size with its aliases put in."""
    levels = [f"k{level}: &k{level} [{', '.join([f'*k{level - 1}'] * 9)}]" for level in range(1, times)]
    return "\n".join(["k0: &k0 [x, x, x]", *levels])


RECIPES = (
    Case(name="no such recipe", command=_PRUNE, says=("recipe.yaml cannot be read: No such file or directory",)),
    Case(
        name="a recipe that is a folder",
        command=_PRUNE,
        prepare=lambda: Path("recipe.yaml").mkdir(),
        says=("recipe.yaml cannot be read: Is a directory",),
    ),
    _file("an empty recipe", "", "recipe.yaml: model.name must be given", "recipe.yaml: data.source must be given"),
    _file(
        "a recipe that is a list", "- a\n- b\n", "recipe.yaml:1: must be a mapping of names to values, such as `model:`"
    ),
    _file("a recipe that is a word", "hello", "recipe.yaml:1: must be a mapping of names to values"),
    _file("a recipe in Latin-1", b"# caf\xe9\n", "recipe.yaml must be text in UTF-8: ", "can't decode byte 0xe9"),
    _file("a recipe in UTF-16", "model: x\n".encode("utf-16"), "recipe.yaml must be text in UTF-8: "),
    _file("a recipe that is a pickle", b"\x80\x04\x95\x00", "recipe.yaml must be text in UTF-8: "),
    _file("a recipe with a null byte", "model: a\0b\n", "recipe.yaml: this is no YAML: unacceptable character #x0000"),
    _file("a recipe of a megabyte", "#" * 1_000_001, "recipe.yaml must be a page of YAML; it has 1,000,001 bytes"),
    _file(
        "a recipe multiplied by aliases", _multiplied(12), "must be a page of YAML; with its aliases it has ", " values"
    ),
    _recipe(
        "a recipe indented by tabs", "supernet:\n\tepochs: 3\n", "recipe.yaml:5: this is no YAML: found character '\\t'"
    ),
    _recipe("a bracket left open", "exclude: [stem\n", "recipe.yaml:5: this is no YAML: expected ',' or ']'"),
    _recipe("two recipes in one file", "---\nseed: 1\n", "recipe.yaml:4: this is no YAML: but found another document"),
    _recipe("a key given twice", "seed: 1\nseed: 2\n", "recipe.yaml: line 5: seed is already given in line 4"),
    _recipe(
        "a key given twice in one line",
        "supernet: {epochs: 1, epochs: 2}\n",
        "recipe.yaml: line 4: supernet.epochs is already given in line 4",
    ),
    _recipe("a value that contains itself", "supernet: &s {epochs: *s}\n", "recipe.yaml:4: a value contains itself"),
    _recipe("values nested without end", f"seed: {'[' * 3000}{']' * 3000}\n", "its values are nested too deeply"),
    _recipe(
        "an object of Python", "seed: !!python/name:os.system\n", "recipe.yaml:4: this is no YAML: could not determine"
    ),
    _recipe("a list as a key", "? [a, b]\n: 2\n", "recipe.yaml:4: this is no YAML: found unhashable key"),
    _recipe(
        "a section misspelt", "suprnet: {epochs: 3}\n", "recipe.yaml:4: there is no 'suprnet'; did you mean supernet?"
    ),
    _recipe(
        "a key misspelt",
        "latency: {engine: eager, batch: 3}\n",
        "recipe.yaml:4: there is no 'batch' in 'latency'; did you mean batch_size?",
    ),
    _recipe("a number as a key", "1: 2\n", "recipe.yaml:4: there is no 1; there are model, data, budget"),
    _recipe("what follows from others", "trained: true\n", "recipe.yaml:4: trained follows from the model's weights"),
    _recipe(
        "sixty unknown keys",
        "".join(f"key{n}: 1\n" for n in range(60)),
        "recipe.yaml:4: there is no 'key0'",
        "... (cut",
    ),
    _recipe(
        "a list where one value is wanted",
        "seed: [1]\n",
        "recipe.yaml:4: seed: input should be a valid integer; got [1]",
    ),
    _recipe("a value where a list is wanted", "exclude: stem\n", "exclude: must be a list, such as [stem, 'layer4.*']"),
    _recipe(
        "a word where yes or no is wanted", "focus: maybe\n", "recipe.yaml:4: focus: must be true or false; got 'maybe'"
    ),
    _recipe(
        "a date where a number is wanted", "seed: 2020-01-01\n", "recipe.yaml:4: seed: input should be a valid integer"
    ),
    _recipe(
        "a currency that is negative", "report: {price_per_hour: -1}\n", "price_per_hour must be a number of at least 0"
    ),
    _file(
        "values where sections are wanted",
        "model: [timm:resnet18]\ndata: digits\nbudget: 50%\n",
        "recipe.yaml:1: model: must be a mapping of names to values; got ['timm:resnet18']",
        "recipe.yaml:2: data: must be a mapping",
        "recipe.yaml:3: budget: must be a mapping",
    ),
    _file(
        "sections without values",
        "model:\ndata:\nbudget:\n",
        "recipe.yaml:1: model.name must be given",
        "recipe.yaml:2: ",
    ),
    _file(
        "data without a name",
        f"model: {{name: {MODEL}}}\ndata: {{source: ' '}}\nbudget: {{macs: 50%}}\n",
        "source must name the data: `digits`, a folder or a data set; got ' '",
    ),
    _file(
        "two kinds of weights",
        "model: {name: timm:resnet18, pretrained: true, weights: w.pth}\ndata: {source: digits}\nbudget: {macs: 50%}\n",
        "recipe.yaml:1: model: pretrained weights and a weights file exclude each other; give one of them",
    ),
)
