"""Run directories that are damaged, of something else, or not far enough, and their checkpoints and studies."""

import atexit
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from bad_input import FAILURE, MODEL, START, USER_MISTAKE, Case, in_turn
from bad_models import Executed
from commandline import psenet
from safetensors.torch import load_file, save_file

_RUN = Path("run")
_SUPERNET, _HISTORY = _RUN / "stages/supernet.safetensors", _RUN / "stages/history.npz"
_CHECKPOINT, _JOURNAL, _SEARCH = (
    _RUN / "checkpoints/supernet.pt",
    _RUN / "stages/study.journal",
    _RUN / "stages/search.json",
)
_SEARCHED, _FRONT = _RUN / "stages/searched.safetensors", _RUN / "stages/evaluated.json"
_TRAIN = (
    f"train run --template pilot --set model.name={MODEL} --set data.source=digits --set budget.macs=50% "
    "--set data.max_train_images=96 --set data.batch_size=32 --set num_subnets=4 --set baseline.epochs=1 "
    "--set supernet.epochs=1 --set finetune.epochs=1 --set num_evaluations=2 --set num_front_evaluations=0"
)
_FILES = ("checkpoints", "recipe.json", "recipe.yaml", "run.log", "stages", "stages.json")


@cache
def _made(stage: str) -> Path:
    """Return a run that is finished up to a stage; made once, in seconds."""
    folder = Path(mkdtemp(prefix="psenet-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    before = {"train": None, "search": "train", "finetune": "search"}[stage]
    if before is not None:
        shutil.copytree(_made(before), folder / "run")
    command = _TRAIN if stage == "train" else f"{stage} run"
    ended = psenet(*command.replace(" run", f" {folder / 'run'}", 1).split())
    assert ended.code == 0, ended.err
    return folder / "run"


def _case(
    name: str, command: str, stage: str, spoil: tuple[Callable[[], object], ...], *says: str, code: int = USER_MISTAKE
) -> Case:
    prepare = in_turn(lambda: shutil.copytree(_made(stage), _RUN), *spoil)
    return Case(name=name, command=command, prepare=prepare, says=says, code=code, leaves=_FILES)


def _put(path: Path, content: str | bytes) -> Callable[[], object]:
    return lambda: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _cut(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _changed(path: Path, old: str, new: str) -> Callable[[], object]:
    def change() -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def _untrained(*spoil: Callable[[], object]) -> tuple[Callable[[], object], ...]:
    """Return what leaves of the supernet's training the checkpoint alone, and spoils that."""
    return (_SUPERNET.unlink, _HISTORY.unlink, *spoil)


def _halved(path: Path) -> None:
    state = load_file(path)
    save_file(
        {name: tensor[: max(1, len(tensor) // 2)] if tensor.ndim else tensor for name, tensor in state.items()}, path
    )


def _not_finite(path: Path) -> None:
    state = load_file(path)
    save_file(
        {name: tensor * float("nan") if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path
    )


def _emptied(path: Path) -> None:
    torch.save(dict.fromkeys(torch.load(path, weights_only=True)), path)


_NO_CHECKPOINT = "run/checkpoints/supernet.pt cannot be read as a checkpoint; delete it to start this stage again: "
_NO_JOURNAL = "the storage 'run/stages/study.journal' cannot be opened"
_AGAIN = "give another path, or delete it to start its study again"

FOLDERS = (
    Case(
        name="no run",
        command="search run",
        says=("run must be a run directory made by psenet; it holds no recipe.json",),
    ),
    Case(
        name="no run to train and no recipe",
        command="train run",
        says=("there is no run in run; start one: psenet train run --recipe FILE",),
    ),
    Case(
        name="a run that is a file",
        command="finetune run",
        files={"run": "x"},
        says=("run must be a run directory made",),
    ),
    Case(name="no run to report", command="report run", says=("it holds neither recipe.json nor result.json",)),
    Case(
        name="no run to measure", command="bench run", says=("there is no run directory 'run'; a model is timm:NAME",)
    ),
    Case(
        name="a folder with other files",
        command=START,
        files={"run/thesis.tex": "mine"},
        says=("the output folder run holds files that are not of a psenet run; give an empty one",),
        leaves=("thesis.tex",),
    ),
    Case(
        name="a run where another shall start",
        command=START,
        files={"run/recipe.json": "{}"},
        says=("the output folder run already holds a run; continue it with --resume or give another folder",),
        leaves=("recipe.json",),
    ),
    Case(
        name="a run of something else to be continued",
        command=f"{START} --resume",
        files={"run/recipe.json": '{"model": "timm:resnet18", "settings": {"seed": 8}}'},
        says=("was started with other settings: model was 'timm:resnet18', now", "settings.seed was 8, now 0"),
        leaves=("recipe.json",),
    ),
    Case(
        name="a run whose recipe is half-written",
        command=f"{START} --resume",
        files={"run/recipe.json": '{"model": "ti'},
        says=("run/recipe.json cannot be read as JSON: Unterminated string",),
        leaves=("recipe.json",),
    ),
    Case(
        name="a run whose recipe is a list",
        command=f"{START} --resume",
        files={"run/recipe.json": "[]"},
        says=("run/recipe.json is not the recipe of a psenet run; give another folder",),
        leaves=("recipe.json",),
    ),
    Case(
        name="a run that was started from Python",
        command="search run",
        files={"run/recipe.json": "{}"},
        says=("the run in run holds no recipe.yaml: runs that were started from Python go on from Python",),
        leaves=("recipe.json",),
    ),
    Case(
        name="a recipe for a run that has one",
        command="train run --template pilot",
        files={"run/recipe.json": "{}"},
        says=("run already holds a run, with its own recipe: leave --recipe, --template and --set out",),
        leaves=("recipe.json",),
    ),
    Case(
        name="a result that is half-written",
        command="bench run",
        files={"run/recipe.json": "{}", "run/result.json": '{"format": 1, "mod'},
        says=("run/result.json cannot be read as JSON: ", "delete it and make it again: psenet export run"),
        leaves=("recipe.json", "result.json"),
    ),
    Case(
        name="a result that is a list",
        command="compare run --data digits",
        files={"run/recipe.json": "{}", "run/result.json": "[]"},
        says=("run/result.json must hold the figures of a run; got a list",),
        leaves=("recipe.json", "result.json"),
    ),
    Case(
        name="a result of a run without model",
        command="bench run",
        files={"run/recipe.json": "{}", "run/result.json": "{}"},
        says=("the model of the run in run must have a name to be built by", "its recipe has None"),
        leaves=("recipe.json", "result.json"),
    ),
)

RUNS = (
    *FOLDERS,
    _case(
        "a stage before its time",
        "finetune run",
        "train",
        (),
        "has not finished its stage 'search'",
        "psenet search run",
    ),
    _case(
        "figures before their time", "bench run", "train", (), "the run in run is not finished: it has no result.json"
    ),
    _case(
        "another budget in the run itself",
        "search run --macs 30% --out run",
        "train",
        (),
        "budget.macs was '50%', now '30%'",
    ),
    _case(
        "a budget that its supernet cannot reach",
        "prune --from run --macs 1% --out other",
        "train",
        (),
        "cannot be reached",
    ),
    _case(
        "another training of a trained supernet",
        "prune --from run --macs 40% --set supernet.epochs=9 --out other",
        "train",
        (),
        "the supernet in run was trained with other settings: settings.supernet.epochs was 1, now 9",
    ),
    _case(
        "a supernet that is not there",
        "search run --macs 40% --out other",
        "train",
        (_SUPERNET.unlink,),
        "the run in run has no trained supernet yet (stages/supernet.safetensors is missing): finish its",
    ),
    _case(
        "a stranger's run that names a factory",
        "search run",
        "train",
        (_changed(_RUN / "recipe.yaml", MODEL, "strange:net"), _put(Path("strange.py"), "open('executed', 'w')")),
        "the run in run is of 'strange:net', which its recipe alone is not trusted to import; name it",
        "--factory strange:net",
    ),
    _case(
        "a stranger's run, its supernet to be taken",
        "prune --from run --macs 40% --out other",
        "train",
        (_changed(_RUN / "recipe.yaml", MODEL, "strange:net"), _put(Path("strange.py"), "open('executed', 'w')")),
        "the run in run is of 'strange:net', which its recipe alone is not trusted to import; name it",
        "--model strange:net",
    ),
    _case(
        "times that are half-written",
        "search run",
        "train",
        (_cut(_RUN / "stages.json"),),
        "delete it: it holds nothing but the time",
    ),
    _case(
        "times that are a list",
        "search run",
        "train",
        (_put(_RUN / "stages.json", "[1]"),),
        "run/stages.json is damaged; delete it",
    ),
    _case(
        "curves that are half-written",
        "train run",
        "train",
        _untrained(_cut(_RUN / "stages/curves.json")),
        "run/stages/curves.json cannot be read as JSON",
        "delete it, and training goes on without the epochs in it",
    ),
    # Checkpoints.
    _case("a truncated checkpoint", "train run", "train", _untrained(_cut(_CHECKPOINT)), _NO_CHECKPOINT),
    _case("an empty checkpoint", "train run", "train", _untrained(_put(_CHECKPOINT, b"")), _NO_CHECKPOINT),
    _case(
        "a checkpoint with an object",
        "train run",
        "train",
        _untrained(lambda: torch.save({"settings": Executed()}, _CHECKPOINT)),
        f"{_NO_CHECKPOINT}it is damaged, or holds objects, which are never unpickled",
    ),
    _case(
        "a pickle for a checkpoint",
        "train run",
        "train",
        _untrained(_put(_CHECKPOINT, pickle.dumps(Executed()))),
        _NO_CHECKPOINT,
    ),
    _case(
        "a checkpoint of nothing",
        "train run",
        "train",
        _untrained(lambda: torch.save([1], _CHECKPOINT)),
        "not of a psenet training",
    ),
    _case(
        "a checkpoint with empty parts",
        "train run",
        "train",
        _untrained(lambda: _emptied(_CHECKPOINT)),
        "; delete run/checkpoints/supernet.pt to start this stage again",
    ),
    _case(
        "a checkpoint of another training",
        "train run",
        "train",
        _untrained(lambda: shutil.copy(_RUN / "checkpoints/baseline.pt", _CHECKPOINT)),
        "run/checkpoints/supernet.pt is of learning_rate=0.1, here 0.05; a model with other weights",
        "continue with the settings it was started with, or delete run/checkpoints/supernet.pt",
    ),
    # Weights and history.
    _case(
        "a truncated supernet",
        "search run",
        "train",
        (_cut(_SUPERNET),),
        "supernet.safetensors is damaged (its checksum is another than when it was written): delete it and resume",
    ),
    _case(
        "a pickle for a supernet",
        "search run",
        "train",
        (_put(_SUPERNET, pickle.dumps(Executed())),),
        "safetensors is damaged",
    ),
    _case(
        "a supernet of another model",
        "search run",
        "train",
        (lambda: _halved(_SUPERNET),),
        "supernet.safetensors is of another model: delete it and resume to make it again",
        "size mismatch",
    ),
    _case(
        "a supernet that is not finite",
        "search run",
        "train",
        (lambda: _not_finite(_SUPERNET),),
        "RuntimeError: all 2 candidates failed: the score was never finite",
        "`psenet --debug ...` shows where it came from",
        code=FAILURE,
    ),
    _case(
        "a truncated history",
        "search run",
        "train",
        (_cut(_HISTORY),),
        "the history 'run/stages/history.npz' cannot be read",
    ),
    _case(
        "a pickle for a history",
        "search run",
        "train",
        (_put(_HISTORY, pickle.dumps(Executed())),),
        "the history 'run/stages/history.npz' cannot be read",
        "it holds objects, which are never unpickled",
    ),
    _case(
        "a history with an object",
        "search run",
        "train",
        (lambda: np.savez(_HISTORY, kind=np.array([Executed()], dtype=object)),),
        "the history 'run/stages/history.npz' cannot be read",
        "it holds objects, which are never unpickled",
    ),
    _case(
        "a history of another space",
        "search run",
        "train",
        (lambda: np.savez(_HISTORY, kind="history", version=1, space_digest="other"),),
        "belongs to another width space (other, here ",
        "use the file made with this space",
    ),
    # Studies and what a search leaves.
    _case(
        "garbage for a study",
        "search run",
        "search",
        (_SEARCH.unlink, _put(_JOURNAL, "garbage\n")),
        _NO_JOURNAL,
        _AGAIN,
    ),
    _case(
        "bytes for a study",
        "search run",
        "search",
        (_SEARCH.unlink, _put(_JOURNAL, bytes(range(256)))),
        _NO_JOURNAL,
        _AGAIN,
    ),
    _case(
        "records of an unknown kind",
        "search run",
        "search",
        (_SEARCH.unlink, _put(_JOURNAL, '{"op_code": 99}\n')),
        _NO_JOURNAL,
        _AGAIN,
    ),
    _case(
        "records that lack a part",
        "search run",
        "search",
        (_SEARCH.unlink, _put(_JOURNAL, '{"op_code": 0}\n')),
        _NO_JOURNAL,
        _AGAIN,
    ),
    _case(
        "a folder for a study",
        "search run",
        "search",
        (_SEARCH.unlink, _JOURNAL.unlink, _JOURNAL.mkdir),
        _NO_JOURNAL,
        "Is a directory",
    ),
    _case(
        "a study of another space",
        "search run",
        "search",
        (_SEARCH.unlink, _changed(_JOURNAL, '"psenet_space":"', '"psenet_space":"other')),
        "study 'psenet' in run/stages/study.journal belongs to another width space (other",
    ),
    _case(
        "a search that is half-written",
        "finetune run",
        "search",
        (_cut(_SEARCH),),
        "delete it and resume to search again",
    ),
    _case(
        "a search of other groups",
        "finetune run",
        "search",
        (_put(_SEARCH, '{"widths": {"a": 1}, "limits": {}, "record": {}}'),),
        "run/stages/search.json is damaged; delete it and resume to search again",
        "unknown group 'a'",
    ),
    _case(
        "a truncated net",
        "export run",
        "finetune",
        (_cut(_SEARCHED),),
        "searched.safetensors is damaged (its checksum is another than when it was written): delete it and resume",
    ),
    _case(
        "candidates that are a list",
        "report run --verify-ranking 4",
        "search",
        (_put(_FRONT, "[]"),),
        "must hold the candidates that",
    ),
    _case(
        "a ranking that is half-written",
        "report run --verify-ranking 4",
        "search",
        (_put(_RUN / "stages/ranking.json", '{"subnets'),),
        "ranking.json cannot be read as JSON",
        "delete it to train its subnets again",
    ),
    _case(
        "a ranking before any search",
        "report run --verify-ranking 4",
        "train",
        (),
        "no scored candidates: finish its search first",
    ),
)
