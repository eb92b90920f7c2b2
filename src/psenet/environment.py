"""What psenet runs on, for bug reports: versions, processor, memory, GPUs, torch's build, engines, locale.

Nothing here identifies a person or a machine: no environment variables but those that set threads, no user or host
name, and the home directory as `~`.
"""

import getpass
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from psenet.errors import first_line
from psenet.result import hardware, versions

Facts = dict[str, Any]
"""Facts by name: plain JSON values, and more facts."""

OPTIONAL = {
    "tensorboard": "psenet prune --tensorboard",
    "optuna-dashboard": "a view of a search's study, see docs/tracking.md",
    "onnxruntime-gpu": "the engine onnxruntime on a GPU",
}
"""Packages that psenet does without, and what they are for."""
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
_SECONDS = 10.0


def environment() -> Facts:
    """Return all facts, in sections.

    A section that cannot be found out says why in its place: a broken installation is what reports are about.
    """
    sections: dict[str, Callable[[], Facts]] = {
        "psenet": _psenet,
        "packages": _packages,
        "processor": _processor,
        "torch": _torch,
        "gpus": _gpus,
        "engines": _engines,
        "text": _text,
    }
    return {name: _told(section) for name, section in sections.items()}


def as_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return facts as lines of plain text, what belongs together indented below its name."""
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{name}:", *(f"  {line}" for line in as_lines(value) or ["none"])]
        else:
            lines.append(f"{name}: {_plain(value)}")
    return lines


def tidy(path: str | Path, *, home: Path | None = None, user: str | None = None) -> str:
    """Return a path without the home directory and the user's name.

    Args:
        path: The path.
        home: The home directory; None for the user's.
        user: The name; None for the user's.
    """
    home = Path.home() if home is None else home
    user = _user() if user is None else user
    path = Path(path)
    if path.is_relative_to(home) and home != Path(home.anchor):
        path = "~" / path.relative_to(home)
    return str(Path(*("USER" if user and part == user else part for part in path.parts)))


# Sections -------------------------------------------------------------------------------------------------------------


def _psenet() -> Facts:
    folder = Path(__file__).parent
    return {
        "version": versions(["psenet"])["psenet"],
        "commit": _commit(folder),
        "folder": tidy(folder),
        "python": f"{platform.python_version()} ({platform.python_implementation()}), {tidy(sys.executable)}",
        "system": platform.platform(),
    }


def _packages() -> Facts:
    found = versions([*_required(), *OPTIONAL])
    missing = {name: f"for {use}" for name, use in OPTIONAL.items() if found[name] == "not installed"}
    shown = {name: version for name, version in found.items() if name != "python" and name not in missing}
    return {**shown, "optional and missing": missing}


def _processor() -> Facts:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "model": _cpu_model(),
        "machine": platform.machine(),
        "logical cores": os.cpu_count(),
        "cores usable here": usable,
        "limit of the container": _container_cpus(),
        "memory": _memory(),
        **{name: os.environ.get(name, "not set") for name in _THREAD_SETTINGS[:2]},
        **{name: os.environ[name] for name in _THREAD_SETTINGS[2:] if name in os.environ},
    }


def _torch() -> Facts:
    import torch

    backends = torch.backends
    return {
        "version": torch.__version__,
        "CUDA": torch.version.cuda or "built without",
        "ROCm": torch.version.hip or "built without",
        "vector instructions": backends.cpu.get_cpu_capability(),
        "oneDNN": backends.mkldnn.is_available(),
        "MKL": backends.mkl.is_available(),
        "OpenMP": backends.openmp.is_available(),
        "threads": hardware()["threads"],
        "threads between operations": torch.get_num_interop_threads(),
        "default type": str(torch.get_default_dtype()).removeprefix("torch."),
        "accelerate trains on": _accelerate_device(),
    }


def _gpus() -> Facts:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = hardware()["gpus"]
    facts: Facts = {}
    for number, name in enumerate(names):
        about = torch.cuda.get_device_properties(number)
        facts[f"cuda:{number}"] = f"{name}, {_gib(about.total_memory)}, compute capability {about.major}.{about.minor}"
    if names:
        facts["cuDNN"] = torch.backends.cudnn.version()
    if torch.backends.mps.is_available():
        facts["mps"] = "available"
    # Why torch sees none, such as a driver that is too old.
    return facts | {f"warning {number}": _first_line(str(one.message)) for number, one in enumerate(caught, 1)}


def _engines() -> Facts:
    import onnxruntime

    return {
        "eager": "ready",
        "compile": _told(_compiler),
        "onnxruntime": f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}",
    }


def _compiler() -> Facts:
    """Return what torch.compile needs: on a CPU a C++ compiler and Python's headers, on a GPU Triton."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    found = shutil.which(name)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return {
        "C++ compiler": f"{Path(name).name} not found" if found is None else _first_line_of(found, "--version"),
        "Python headers": "found" if headers.is_file() else f"not found in {tidy(headers.parent)}",
        "Triton": versions(["triton"])["triton"],
    }


def _text() -> Facts:
    return {
        "locale": ".".join(filter(None, locale.getlocale())) or "C",
        "preferred encoding": locale.getpreferredencoding(False),
        "file names": sys.getfilesystemencoding(),
        "output": sys.stdout.encoding or "unknown",
        "output is a terminal": sys.stdout.isatty(),
        "columns": shutil.get_terminal_size().columns,
        "UTF-8 mode": bool(sys.flags.utf8_mode),
    }


# Single facts ---------------------------------------------------------------------------------------------------------


def _told(find: Callable[[], Facts]) -> Facts:
    try:
        return find()
    except Exception as error:  # whatever is broken here is what the report shall say
        return {"fails": first_line(error)}


def _required() -> list[str]:
    """Return the packages that psenet requires, without those of its extras."""
    try:
        lines = requires("psenet") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        lines = []
    names = [re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]
    return [name for name in names or versions() if name not in ("python", "psenet", *OPTIONAL)]


def _commit(folder: Path) -> str:
    """Return the commit of a source tree; of an installed package there is none to tell."""
    git = shutil.which("git")
    root = folder.parent.parent
    if git is None or not (root / ".git").exists():
        return "not a source tree"
    return _first_line_of(git, "-C", str(root), "describe", "--always", "--dirty")


def _first_line_of(*command: str) -> str:
    """Return the first line that a program prints, or how it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"fails: {type(error).__name__}"
    if run.returncode:
        return f"fails with exit code {run.returncode}"
    return _first_line(run.stdout) or "says nothing"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found is not None:
            return found[1].strip()
    if sys.platform == "darwin":
        return _first_line_of("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or "unknown"


def _container_cpus(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> str:
    """Return how many processors a container may use, which no count of cores shows."""
    if not limit.is_file():
        return "none known"
    quota, _, period = limit.read_text().strip().partition(" ")
    return "none" if quota == "max" else f"{int(quota) / int(period):g} cores"


def _memory() -> str:
    known: Mapping[str, int] = getattr(os, "sysconf_names", {})
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= known.keys():
        return "unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    total = _gib(page * os.sysconf("SC_PHYS_PAGES"))
    return f"{total}, {_gib(page * os.sysconf('SC_AVPHYS_PAGES'))} free" if "SC_AVPHYS_PAGES" in known else total


def _accelerate_device() -> str:
    from psenet.training.loop import make_accelerator

    try:
        return str(make_accelerator().device)
    except Exception as error:  # as in `_told`
        return f"fails: {first_line(error)}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # an id without a name, as in a container
        return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _plain(value: Any) -> str:
    if value is None:
        return "unknown"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
