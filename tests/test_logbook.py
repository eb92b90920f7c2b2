import re
import warnings
from pathlib import Path

import pytest

from psenet.logbook import Logbook


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_line_goes_to_people_and_with_time_and_process_to_the_file(tmp_path: Path):
    told: list[str] = []
    Logbook(tmp_path / "run.log", told.append).say("訓練 begins")
    assert told == ["訓練 begins"]
    (line,) = _lines(tmp_path / "run.log")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \d+ 訓練 begins", line)


def test_what_is_watched_is_noted_with_versions_warnings_and_its_end(tmp_path: Path):
    log = Logbook(tmp_path / "run.log", lambda text: None)
    before = warnings.showwarning
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with log.watch("psenet prune"):
            warnings.warn("the checkpoint is damaged", stacklevel=1)
    assert len(shown) == 1 and warnings.showwarning is before
    begin, warning, end = _lines(tmp_path / "run.log")
    assert " begin: psenet prune; " in begin and "torch " in begin and "psenet " in begin
    assert warning.endswith(" UserWarning: the checkpoint is damaged") and end.endswith(" end")


def test_an_error_is_noted_with_its_traceback_and_without_secrets(tmp_path: Path):
    log = Logbook(tmp_path / "run.log", lambda text: None)
    with pytest.raises(ZeroDivisionError), log.watch("postgresql://me:s3cret@host/db"):
        raise ZeroDivisionError("postgresql://me:s3cret@host/db")
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "s3cret" not in text and text.count("me:***@host") >= 2
    lines = _lines(tmp_path / "run.log")
    assert lines[1].endswith(" stopped by ZeroDivisionError") and lines[2] == "    Traceback (most recent call last):"
    assert lines[-1].startswith("    ZeroDivisionError: ")


def test_a_log_that_cannot_be_written_costs_no_work(tmp_path: Path):
    told: list[str] = []
    log = Logbook(tmp_path / "not there" / "run.log", told.append)
    with log.watch("psenet prune"):
        log.say("goes on")
    assert told == ["goes on"]
