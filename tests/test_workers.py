"""Searches that score in several processes, and several searches on one storage."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from torch import nn

import psenet
from psenet.budget import Budget
from psenet.errors import InputError
from psenet.evaluate import SupernetScore
from psenet.evolution import SearchProgress, search, search_each
from psenet.widths import Widths
from scores import Dies, DiesOnce, NotANumber, Noted, Refusal, Refuses
from synthetic import Additive, make_space

HALF = Budget(macs="50%")
TESTS = str(Path(__file__).parent)


def noted_once(score: Noted, *, least_processes: int) -> int:
    """Check that no widths were scored twice; return how many were."""
    lines = score.lines()
    every = [line for noted in lines.values() for line in noted]
    assert len(set(every)) == len(every)
    assert len(lines) >= least_processes
    return len(every)


def test_workers_share_the_work_and_the_threads_and_score_nothing_twice(tmp_path: Path):
    space = make_space(5)
    score = NotANumber(space, tmp_path)
    told: list[SearchProgress] = []
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = search(space, HALF, score, num_evaluations=24, seed=1, workers=2, progress=told.append)
    finally:
        torch.set_num_threads(before)
    assert len(found.evaluated) == 24 and found.num_failed > 0
    assert noted_once(score, least_processes=2) == 24 + found.num_failed == len(told)
    assert str(os.getpid()) not in score.lines()
    assert all(line.endswith(" 2") for noted in score.lines().values() for line in noted)
    assert all(evaluation.score == score.score.of(evaluation.widths) for evaluation in found.evaluated)
    assert told[-1].num_done == 24 and told[-1].best == found.best and told[-1].seconds_left == 0


def test_a_worker_that_is_killed_is_warned_of_and_loses_nothing(tmp_path: Path):
    space = make_space(5)
    score = DiesOnce(space, tmp_path)
    storage = tmp_path / "study.journal"
    with pytest.warns(UserWarning, match="died with exit code -9; the other 1 go on with what it was at"):
        found = search(space, HALF, score, num_evaluations=15, seed=1, workers=2, storage=storage)
    assert noted_once(score, least_processes=2) == 15 == len(found.evaluated)


def test_if_all_workers_die_the_search_says_how_and_can_go_on(tmp_path: Path):
    space = make_space(5)
    storage = tmp_path / "study.journal"
    dies = Dies(space, tmp_path)
    with (
        pytest.warns(UserWarning, match="the other 1 go on"),
        pytest.raises(RuntimeError, match=r"exit code -9, the last of 2: .*under `if __name__"),
    ):
        search(space, HALF, dies, num_evaluations=15, seed=1, workers=2, storage=storage)
    score = Additive(space)
    found = search(space, HALF, score, num_evaluations=15, seed=1, storage=storage)
    assert len(found.evaluated) == len(score.seen) == len(set(score.seen)) == 15


def test_an_error_in_a_worker_stops_all_soon_and_reaches_the_caller_as_it_is(tmp_path: Path):
    space = make_space(5)
    storage = tmp_path / "study.journal"
    start = time.monotonic()
    with pytest.raises(Refusal) as caught:
        search(space, HALF, Refuses(space, tmp_path), num_evaluations=30, seed=1, workers=2, storage=storage)
    assert time.monotonic() - start < 50
    assert caught.value.code == 7 and "raise Refusal(7)" in str(caught.value.__cause__)
    score = Additive(space)
    found = search(space, HALF, score, num_evaluations=30, seed=1, storage=storage)
    assert len(found.evaluated) == 30 and 25 <= len(score.seen) <= 27


def test_a_score_function_that_cannot_be_sent_is_refused_before_any_work(tmp_path: Path):
    space = make_space(4)
    storage = tmp_path / "study.journal"

    def inner(widths: Widths) -> float:
        return 0.0

    for score_fn in (inner, lambda widths: 0.0):
        with pytest.raises(InputError, match=r"score_fn must be picklable; got <function .*not a lambda .*workers=1"):
            search(space, HALF, score_fn, workers=2, storage=storage)
    assert not storage.exists()
    with pytest.raises(InputError, match="workers must be at least 1; got 0"):
        search_each(space, [HALF], inner, workers=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x_BCHW)).relu().mean((2, 3)))


def test_a_supernet_is_scored_the_same_in_workers():
    torch.manual_seed(0)
    model = Net()
    space = psenet.trace(model, torch.zeros(1, 3, 8, 8), divisor=1)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    score = SupernetScore(psenet.Supernet(model, space), batches, batches)
    found = search(space, Budget(macs="70%"), score, num_evaluations=6, workers=2)
    assert [evaluation.score for evaluation in found.evaluated] == [
        score(evaluation.widths) for evaluation in found.evaluated
    ]


# Several searches, and signals ----------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_workers import *
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may be told to ignore it
    space = make_space(5)
    budgets = [Budget(macs="30%"), Budget(macs="50%")]
    score = Noted(space, Path({folder!r}), {seconds})
    search_each(space, budgets, score, num_evaluations={num}, seed=1, storage={storage!r}, workers={workers})
"""


def start_search(folder: Path, storage: str, *, num: int = 40, seconds: float = 0.05, workers: int = 1):
    """Start a search of two budgets in a process group of its own."""
    script = folder / "script.py"
    values = {"tests": TESTS, "folder": str(folder), "storage": storage}
    script.write_text(textwrap.dedent(SCRIPT).format(**values, num=num, seconds=seconds, workers=workers))
    return subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE, text=True)


def join_two(folder: Path, storage: str) -> None:
    """Let two processes search on one storage, and check that they shared the work."""
    searches = [start_search(folder, storage) for _ in range(2)]
    errors = [one.communicate(timeout=120)[1] for one in searches]
    assert [one.returncode for one in searches] == [0, 0], errors
    score = Noted(make_space(5), folder)
    # The last candidates of the two are scored at the same time.
    assert 40 <= noted_once(score, least_processes=2) <= 41


def kill_one_of_two(folder: Path, storage: str) -> None:
    """Kill one of two searches amid a candidate, and check that the other ends, and that a later one makes good."""
    searches = [start_search(folder, storage, seconds=0.1) for _ in range(2)]
    score, ended = Noted(make_space(5), folder), [-1, -1]
    try:
        wait_for(score, 6, processes=2)
        victim = next(one for one in searches if str(one.pid) in score.lines())
        victim.kill()  # a candidate takes most of the time of a search
        ended = [one.wait(120) for one in searches]
    finally:
        for one in searches:
            one.kill()
            one.communicate()
    assert sorted(ended) == [-signal.SIGKILL, 0]
    before = noted_once(score, least_processes=2)
    assert 39 <= before <= 41  # its last candidate may have no score
    space = make_space(5)
    later = Additive(space)
    found = search_each(space, [Budget(macs="30%"), HALF], later, num_evaluations=42, seed=1, storage=storage)
    every = {evaluation.widths for each in found for evaluation in each.evaluated}
    assert len(every) == 42 and len(later.seen) == len(set(later.seen)) <= 4


def test_two_searches_on_one_sqlite_file_share_the_work(tmp_path: Path):
    join_two(tmp_path, f"sqlite:///{tmp_path}/study.db")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_search_that_is_killed_neither_stops_nor_robs_the_other_on_its_sqlite_file(tmp_path: Path):
    kill_one_of_two(tmp_path, f"sqlite:///{tmp_path}/study.db")


def postgres_tools() -> Path:
    """Return the folder of the server's programs, or skip."""
    found = shutil.which("initdb")
    if found is None or shutil.which("postgres") is None:
        pytest.skip("there is no PostgreSQL server here: initdb and postgres are not on the path")
    if importlib.util.find_spec("psycopg2") is None and importlib.util.find_spec("psycopg") is None:
        pytest.skip("neither psycopg2 nor psycopg is installed")
    return Path(found).parent


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a database on a PostgreSQL server of these tests alone."""
    tools = postgres_tools()
    driver = "psycopg2" if importlib.util.find_spec("psycopg2") else "psycopg"
    # The server refuses to run as root, and a socket's path must be short.
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        if user:
            shutil.chown(folder, user)
        initdb = [tools / "initdb", "-D", f"{folder}/data", "-U", "me", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, user=user, cwd=folder, capture_output=True, timeout=60)
        serve = [tools / "postgres", "-D", f"{folder}/data", "-k", folder, "-c", "listen_addresses=", "-F"]
        server = subprocess.Popen(serve, user=user, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 30
            while not Path(f"{folder}/.s.PGSQL.5432").exists():
                assert time.monotonic() < end and server.poll() is None, "the server does not start"
                time.sleep(0.1)
            yield f"postgresql+{driver}://me@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # ends connections that are still open
            server.wait(30)


def test_two_searches_on_one_postgresql_database_share_the_work(tmp_path: Path, postgres: str):
    join_two(tmp_path, postgres)
    drop_study(postgres)


@pytest.mark.slow
def test_a_search_that_is_killed_neither_stops_nor_robs_the_other_on_its_postgresql_database(
    tmp_path: Path, postgres: str
):
    kill_one_of_two(tmp_path, postgres)
    drop_study(postgres)


def drop_study(storage: str) -> None:
    (name,) = optuna.get_all_study_names(storage)
    optuna.delete_study(study_name=name, storage=storage)


def wait_for(score: Noted, num: int, *, processes: int = 1) -> None:
    end = time.monotonic() + 60
    while sum(map(len, score.lines().values())) < num or len(score.lines()) < processes:
        assert time.monotonic() < end, "the search scored nothing"
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_search_that_is_ended_ends_its_workers_and_can_go_on(tmp_path: Path, sign: signal.Signals):
    space = make_space(5)
    storage = str(tmp_path / "study.journal")
    score = Noted(space, tmp_path)
    process = start_search(tmp_path, storage, workers=2, seconds=0.2, num=300)
    wait_for(score, 6)
    # Ctrl-C reaches the whole group; a kill only the one process.
    (os.killpg if sign == signal.SIGINT else os.kill)(process.pid, sign)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == -sign, errors
    if sign == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in score.lines()):
        assert time.monotonic() < end, "a worker lives on"
        time.sleep(0.1)
    num = sum(map(len, score.lines().values()))
    budgets = [HALF, Budget(macs="30%")]
    found = search_each(space, budgets, Additive(space), num_evaluations=num + 10, seed=1, storage=storage)
    assert len(found[0].evaluated) == num + 10
    assert len({evaluation.widths for evaluation in found[0].evaluated}) == num + 10
