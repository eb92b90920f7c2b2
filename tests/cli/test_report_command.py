"""`psenet report` writes the report of a run, with the figures it is given."""

import shutil
from pathlib import Path

import pytest
from commandline import psenet

from colours import export_weights_only, prune_net

NAME = "写真 [red] <b>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / NAME
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psenet.pipeline.export_model", export_weights_only)
        prune_net(out)
    return out


def test_both_languages_are_written_where_they_are_said_to_be(finished: Path):
    for language, ending in (("en", ""), ("ja", ".ja")):
        ended = psenet("report", finished, "--lang", language)
        assert (ended.code, ended.err) == (0, "")
        paths = [finished / f"report{ending}.{kind}" for kind in ("html", "md")]
        assert ended.out.splitlines() == [f"report: {path}" for path in paths]
        assert all(path.is_file() for path in paths)


def test_the_figures_reach_the_return(finished: Path):
    given = {"--price-per-hour": 3, "--requests-per-day": 7000, "--engineering-hours": 11, "--engineering-rate": 13}
    options = [str(part) for pair in given.items() for part in pair]
    assert psenet("report", finished, *options, "--currency", "CHF").code == 0
    text = (finished / "report.md").read_text().replace("\u00a0", " ")
    assert "| 11 × 13 | 143.00 CHF |" in text and "| 7,000 × 30.44 × " in text


def test_mistakes_are_named(finished: Path, tmp_path: Path):
    for arguments, said in (
        ([tmp_path / "nothing"], "must be a run directory made by psenet prune"),
        ([finished, "--lang", "de"], "the report's language must be one of en, ja; got 'de'"),
        ([finished, "--price-per-hour", "nan"], "price_per_hour must be a number of at least 0; got nan"),
    ):
        ended = psenet("report", *arguments)
        assert ended.code == 2 and said in ended.err, arguments


def test_a_folder_that_cannot_be_written_is_a_failure_that_leaves_the_old_report(finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").mkdir()
    ended = psenet("report", run)
    assert ended.code == 1 and "report.html" in ended.err
    assert [path.name for path in run.iterdir() if path.name.endswith(".part")] == []
