"""The report on what psenet runs on: what it says is so, what is broken is said, and nobody is named."""

import getpass
import json
import os
import platform
import re
import socket
import sys
import warnings
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from psenet import environment as module
from psenet.environment import as_lines, environment, tidy


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return environment()


def test_no_section_fails_here(facts: dict[str, Any]):
    assert list(facts) == ["psenet", "packages", "processor", "torch", "gpus", "engines", "text"]
    assert not [name for name, section in facts.items() if "fails" in section]
    assert json.loads(json.dumps(facts)) == facts


def test_versions_are_those_of_python_psenet_and_all_that_it_requires(facts: dict[str, Any]):
    assert facts["psenet"]["version"] == version("psenet")
    assert facts["psenet"]["python"].startswith(f"{platform.python_version()} (CPython), ")
    lines = [line for line in requires("psenet") or [] if "extra ==" not in line]
    names = {re.match(r"[\w.-]+", line)[0] for line in lines}  # pyright: ignore[reportOptionalSubscript]
    assert {"torch", "timm", "scikit-learn"} <= names <= facts["packages"].keys()
    assert facts["packages"]["scikit-learn"] == version("scikit-learn")
    assert "python" not in facts["packages"] and "ruff" not in facts["packages"]


def test_packages_that_are_optional_and_missing_are_listed_with_their_use(monkeypatch: pytest.MonkeyPatch):
    def found(package: str) -> str:
        if package in ("tensorboard", "timm"):
            raise PackageNotFoundError(package)
        return "9.9"

    monkeypatch.setattr("psenet.result.version", found)
    packages = environment()["packages"]
    assert packages["optional and missing"] == {"tensorboard": "for psenet prune --tensorboard"}
    assert packages["timm"] == "not installed" and packages["optuna-dashboard"] == "9.9"


def test_a_source_tree_that_is_not_installed_still_tells_the_main_versions(monkeypatch: pytest.MonkeyPatch):
    def unknown(package: str) -> list[str]:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(module, "requires", unknown)
    assert environment()["packages"]["torch"] == version("torch")


def test_the_processor_is_that_of_this_machine(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    processor = facts["processor"]
    assert (processor["machine"], processor["logical cores"]) == (platform.machine(), os.cpu_count())
    amount = re.match(r"(\d+\.\d) GiB", processor["memory"])
    assert amount is not None
    assert float(amount[1]) == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, abs=0.1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    processor = environment()["processor"]
    assert (processor["OMP_NUM_THREADS"], processor["KMP_AFFINITY"]) == ("3", "compact")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment()["processor"]["OMP_NUM_THREADS"] == "not set"


def test_a_processor_is_named_from_the_kernel_s_list(tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Another\n")
    assert module._cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"


@pytest.mark.parametrize(("content", "said"), [("150000 100000\n", "1.5 cores"), ("max 100000\n", "none")])
def test_the_limit_of_a_container_is_said(content: str, said: str, tmp_path: Path):
    (tmp_path / "cpu.max").write_text(content)
    assert module._container_cpus(tmp_path / "cpu.max") == said
    assert module._container_cpus(tmp_path / "nothing") == "none known"


def test_torch_and_the_engines_are_told_as_they_are(facts: dict[str, Any]):
    told = facts["torch"]
    assert (told["version"], told["threads"]) == (torch.__version__, torch.get_num_threads())
    assert told["vector instructions"] in ("DEFAULT", "AVX2", "AVX512", "NEON", "SVE", "SVE256", "ZVECTOR", "VSX")
    assert told["accelerate trains on"].split(":")[0] in ("cpu", "cuda", "mps")
    engines = facts["engines"]["onnxruntime"]
    assert engines == ", ".join([onnxruntime.__version__, *onnxruntime.get_available_providers()])
    assert facts["text"]["preferred encoding"]


def test_a_gpu_is_told_with_its_memory(monkeypatch: pytest.MonkeyPatch):
    class About:
        total_memory, major, minor = 80 * 2**30, 9, 0

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "Some GPU")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: About())
    assert environment()["gpus"]["cuda:0"] == "Some GPU, 80.0 GiB, compute capability 9.0"


def test_why_torch_sees_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch):
    def none() -> int:
        warnings.warn("The NVIDIA driver on your system is too old\nmore", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("torch.cuda.device_count", none)
    assert environment()["gpus"] == {"warning 1": "The NVIDIA driver on your system is too old"}


def test_a_compiler_is_found_or_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = tmp_path / "my-cxx"
    compiler.write_text("#!/bin/sh\necho my compiler 1.2\necho more\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert environment()["engines"]["compile"]["C++ compiler"] == "my compiler 1.2"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    assert environment()["engines"]["compile"]["C++ compiler"] == "fails with exit code 3"
    compiler.unlink()
    assert environment()["engines"]["compile"]["C++ compiler"] == "my-cxx not found"


def test_a_broken_part_is_told_in_its_place_and_the_rest_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    facts = environment()
    assert facts["engines"]["fails"].startswith("ModuleNotFoundError: import of onnxruntime halted")
    assert facts["torch"]["version"] == torch.__version__


# Nobody is named ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/home/ada/src/psenet", "~/src/psenet"),
        ("/home/ada", "~"),
        ("/data/ada/venv/bin/python", "/data/USER/venv/bin/python"),
        ("/data/adamant/venv", "/data/adamant/venv"),
        ("/usr/bin/python", "/usr/bin/python"),
    ],
)
def test_paths_name_neither_home_nor_user(path: str, said: str):
    assert tidy(path, home=Path("/home/ada"), user="ada") == said


def test_a_home_at_the_root_hides_nothing():
    assert tidy("/usr/bin/python", home=Path("/"), user="") == "/usr/bin/python"


def test_the_report_holds_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HOME", str(Path(sys.executable).parent.parent))
    monkeypatch.setenv("LOGNAME", "lovelace")
    monkeypatch.setattr(socket, "gethostname", lambda: "ada-machine")
    monkeypatch.setattr(platform, "node", lambda: "ada-machine")
    assert getpass.getuser() == "lovelace"
    report = json.dumps(environment())
    for secret in ("hf_verysecret", "lovelace", "ada-machine", f"{Path.home()}/"):
        assert secret not in report
    assert "~/bin/python" in report


# Lines ----------------------------------------------------------------------------------------------------------------


def test_facts_become_indented_lines():
    facts = {"a": {"b": 1, "c": True, "d": None, "e": {"f": "x", "g": 1.5}}, "h": {}, "i": False}
    assert as_lines(facts) == [
        "a:",
        *("  b: 1", "  c: yes", "  d: unknown", "  e:", "    f: x", "    g: 1.5"),
        *("h:", "  none", "i: no"),
    ]
