"""A run directory: what a run was asked to do, how far it is, and where its files lie.

RUN/recipe.yaml          what the command line was asked to do; `psenet prune --recipe` repeats it
RUN/recipe.json          the settings the run was started with, which going on must not change
RUN/stages.json          seconds spent in each stage; of one at work also since when (Unix time)
RUN/checkpoints/*.pt     the state of each training and, as *.previous.pt, the state before
RUN/stages/*             weights, history and study of the finished stages; for the report also curves.json (every epoch
                         of the trainings), evaluated.json (every scored candidate) and prior.json (what it learned)
RUN/run.log              what happened when, over all attempts, with the tracebacks of errors
RUN/logs/*               for TensorBoard, where wanted
RUN/model/*              the exported model
RUN/result.json          the figures
RUN/report.html, .md     the same for people

Of several processes that train together rank 0 writes all of it. The others ask rank 0 what is there and get weights
from it; the finished result they read themselves.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from psenet import ranks
from psenet.errors import InputError
from psenet.files import alone_in, remove_unfinished, write_atomically
from psenet.weights_file import read_weights, write_weights

if TYPE_CHECKING:
    from torch import nn

STAGES = ("baseline", "supernet", "search", "finetune")
_WORK = ("checkpoints", "stages", "logs")
"""Folders that only stages write to."""


class RunDirectory:
    """The folder of one run.

    Args:
        path: The folder; made if missing.
        recipe: The settings of the run, as plain JSON values.
        resume: Continue the run that is there, if any.

    Raises:
        InputError: The folder holds another run or other files, or cannot be written.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        ranks.in_main(lambda: self._begin(recipe, resume=resume))

    def _begin(self, recipe: Mapping[str, Any], *, resume: bool) -> None:
        check_folder(self.path, recipe, resume=resume)
        if not (self.path / "recipe.json").exists():
            try:
                write_json(self.path / "recipe.json", recipe)
            except OSError as error:
                raise InputError(f"the output folder {self.path} cannot be written: {error}") from error

    def has(self, *names: str) -> bool:
        """Return whether all of these files are there, for all ranks alike."""
        return ranks.from_main(lambda: all((self.path / name).is_file() for name in names))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep other processes from working on this run meanwhile, and clear away what killed ones left half-written.

        Raises:
            InputError: Another process is at work on it.
        """
        with ExitStack() as stack:
            ranks.in_main(lambda: stack.enter_context(alone_in(self.path)))
            ranks.in_main(self._clear_up)
            yield

    def _clear_up(self) -> None:
        """Delete what attempts that were killed have left half-written, and add what they have spent."""
        remove_unfinished(self.path)
        for name, record in self._stages().items():
            if "since" in record:
                files = (path for folder in _WORK for path in (self.path / folder).rglob("*"))
                last = max((path.stat().st_mtime for path in files), default=0.0)
                self._add_seconds(name, max(0.0, last - record["since"]))

    def file(self, name: str) -> Path:
        """Return the path of a file in the folder, whose parent folder then exists."""
        target = self.path / name
        if ranks.is_main():
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def checkpoint(self, training: str) -> Path:
        """Return the checkpoint file of a training."""
        return self.file(f"checkpoints/{training}.pt")

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent in each stage so far, over all attempts; of killed ones until their last file."""
        return {stage: record["seconds"] for stage, record in self._stages().items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage, also when it is interrupted."""
        ranks.in_main(lambda: self._add_seconds(name, 0.0, since=time.time()))
        start = time.perf_counter()
        try:
            yield
        finally:
            if ranks.is_main():
                self._add_seconds(name, time.perf_counter() - start)

    def _add_seconds(self, name: str, seconds: float, *, since: float | None = None) -> None:
        """Add to what a stage has taken; `since` is when an attempt began that is now at work."""
        stages = self._stages()
        before = stages.get(name, {"seconds": 0.0})
        stages[name] = {"seconds": round(before["seconds"] + seconds, 2)}
        if since is not None:
            stages[name]["since"] = since
        write_json(self.file("stages.json"), stages)

    def take_seconds(self, source: Path, names: Sequence[str]) -> None:
        """Take over what another run has spent in some stages, where this one has spent nothing."""
        spent, stages = _read_stages(source / "stages.json"), self._stages()
        new = (name for name in names if name in spent and name not in stages)
        missing = {name: {"seconds": spent[name]["seconds"]} for name in new}
        if missing:
            write_json(self.file("stages.json"), {**stages, **missing})

    def _stages(self) -> dict[str, dict[str, float]]:
        return _read_stages(self.path / "stages.json")

    def save_weights(self, name: str, module: "nn.Module") -> None:
        """Write a module's state as a stage's result."""
        ranks.in_main(lambda: write_weights(self.file(f"stages/{name}.safetensors"), module.state_dict()))

    def load_weights(self, name: str, module: "nn.Module") -> None:
        """Read a state that `save_weights` wrote into a module.

        Raises:
            InputError: The file is missing, damaged or of another module.
        """
        path = self.file(f"stages/{name}.safetensors")
        advice = "delete it and resume to make it again"
        state, _ = ranks.from_main(lambda: read_weights(path, advice=advice))
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{path} is of another model: {advice}; {error}") from error


def _read_stages(path: Path) -> dict[str, dict[str, float]]:
    """Return what the stages of a run have taken; nothing if there is no file.

    Raises:
        InputError: The file is damaged.
    """
    remedy = "delete it: it holds nothing but the time that each stage took"
    stages = read_json(path, remedy=remedy) if path.exists() else {}
    if not isinstance(stages, dict) or not all(_is_time(record) for record in stages.values()):
        raise InputError(f"{path} is damaged; {remedy}")
    return stages


def _is_time(record: object) -> bool:
    return isinstance(record, dict) and all(
        isinstance(seconds, int | float) for seconds in (record.get("seconds"), record.get("since", 0.0))
    )


def check_folder(path: Path, recipe: Mapping[str, Any], *, resume: bool) -> None:
    """Make sure that a run can start in a folder or go on there; nothing is written.

    Raises:
        InputError: It holds another run or other files, or is a file.
    """
    try:
        is_empty = not path.exists() or not path.is_dir() or not any(path.iterdir())
    except OSError as error:
        raise InputError(
            f"the output folder {path} cannot be written: {error.strerror or error}; give another path"
        ) from error
    if path.exists() and not path.is_dir():
        raise InputError(f"the output folder {path} is a file; give another path")
    if not (path / "recipe.json").exists():
        if not is_empty:
            raise InputError(f"the output folder {path} holds files that are not of a psenet run; give an empty one")
        return
    if not resume:
        raise InputError(
            f"the output folder {path} already holds a run; continue it with --resume or give another folder"
        )
    old = read_json(path / "recipe.json")
    if not isinstance(old, dict):
        raise InputError(f"{path / 'recipe.json'} is not the recipe of a psenet run; give another folder")
    changes = changed_settings(old, recipe)
    if changes:
        raise InputError(f"the run in {path} was started with other settings: {changes}; give another folder")


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], *, beside: Sequence[str] = ()) -> str:
    """Return for a person what differs between two recipes, beside the settings that begin with one of `beside`."""
    before, now = _by_path(old), _by_path(json.loads(json.dumps(new)))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and not key.startswith(tuple(beside))]
    return "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)


def _by_path(settings: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Return nested settings in one level, by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _by_path(value, f"{parent}{key}.") if isinstance(value, Mapping) else {f"{parent}{key}": value}
    return flat


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented, keys in the given order."""

    def write(stream: BinaryIO) -> None:
        stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    write_atomically(path, write)


def read_json(path: Path, *, remedy: str = "") -> Any:
    """Read JSON.

    Args:
        path: The file.
        remedy: What to do where it is damaged, for the message.

    Raises:
        InputError: The file cannot be read as JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        advice = f"; {remedy}" if remedy else ""
        raise InputError(f"{path} cannot be read as JSON: {error}{advice}") from error
