import doctest
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

import psenet

_MODULES = ["psenet", *(module.name for module in pkgutil.walk_packages(psenet.__path__, "psenet."))]


@pytest.mark.parametrize("name", _MODULES)
def test_the_examples_of_a_module_give_what_they_say(name: str):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_the_way_through_the_package_has_examples():
    finder = doctest.DocTestFinder()
    examples = {name: finder.find(importlib.import_module(name)) for name in ("psenet.reading", "psenet.supernet")}
    assert all(any(found.examples for found in tests) for tests in examples.values())


def test_every_public_name_exists_and_is_listed_once():
    assert len(set(psenet.__all__)) == len(psenet.__all__) and list(psenet.__all__) == sorted(psenet.__all__)
    assert all(hasattr(psenet, name) for name in psenet.__all__)


def test_importing_the_package_loads_nothing_that_a_user_may_not_need():
    unwanted = (
        "accelerate jinja2 matplotlib onnx onnxruntime onnxscript optuna pandas PIL plotly pydantic rich scipy sklearn "
        "sqlalchemy tensorboard timm torch.utils.flop_counter torchvision typer yaml"
    ).split()
    assert _loaded("import torch, psenet", unwanted) - _loaded("import torch", unwanted) == set()


def _loaded(code: str, modules: Sequence[str]) -> set[str]:
    """Return which modules a new process has loaded after running a piece of code."""
    code = f"import sys\n{code}\nprint(*(name for name in {list(modules)} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return set(found.stdout.split())
