"""Whatever is missing or damaged in a run costs that piece of the report and nothing else."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import Page
from safetensors.torch import load_file

from psenet.errors import InputError
from psenet.report import write_report
from psenet.report.facts import read_facts

PIECES = ("result.json", "recipe.json", "stages/evaluated.json", "stages/curves.json", "stages/prior.json")


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_whole_run_lacks_nothing(finished_run: Path):
    facts, record = read_facts(finished_run), json.loads((finished_run / "result.json").read_text())
    assert facts.missing == ()
    assert (facts.model, facts.data, facts.num_samples) == ("my.nets:colours", "paint", 90)
    for name, net in facts.nets.items():
        shown = {key: value for key, value in vars(net).items() if value is not None}
        assert shown == {key: tuple(value) if isinstance(value, list) else value for key, value in record[name].items()}
    assert [layer.name for layer in facts.layers] == ["0", "3", "6", "11"]
    assert facts.frozen is not None and [layer.layer for layer in facts.frozen] == ["11"]
    assert len(facts.candidates) == 6 and set(facts.curves) == {"baseline", "supernet", "searched", "uniform"}
    assert facts.ranking is None


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "a list", "binary"])
@pytest.mark.parametrize("piece", PIECES)
def test_a_damaged_piece_is_named_and_the_rest_is_shown(piece: str, damage: str, run: Path):
    path, whole = run / piece, read_facts(run)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": content[:200], "a list": b"[1]", "binary": b"\xff\x00"}[damage])
    facts = read_facts(run)
    assert [missing.file for missing in facts.missing] == [piece]
    assert (facts.missing[0].reason == "") == (damage == "gone")
    assert bool(facts.nets) == (piece != "result.json")
    for name, file in (("candidates", "evaluated"), ("curves", "curves"), ("prior", "prior")):
        shown = getattr(facts, name)
        assert shown == getattr(whole, name) if file not in piece else not shown
    html, markdown = write_report(run)
    assert piece in Page(html).text and piece in markdown.read_text()


def test_a_run_that_has_just_begun_says_so(run: Path):
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("recipe.json", "stages.json"):
            path.unlink()
    html, _ = write_report(run)
    page = Page(html)
    assert "This run is not finished" in page.text and "supernet" in page.text
    assert page.row("model") == ["my.nets:colours"]
    files = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert all(files[piece] == "not there" for piece in PIECES if piece != "recipe.json")


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda record: record.pop("pruned"), "result.json: pruned"),
        (lambda record: record["uniform"].update(macs="many"), "result.json: uniform.macs"),
        (lambda record: record["baseline"].update(accuracy=float("nan")), "result.json: baseline.accuracy"),
        (
            lambda record: record["baseline"].update(latency_quartiles_ms=[1.0]),
            "result.json: baseline.latency_quartiles_ms",
        ),
        (lambda record: record["layers"][1].pop("full"), "result.json: layers"),
        (lambda record: record["frozen"][0].update(macs_share=None), "result.json: frozen"),
        (lambda record: record.update(seconds={"total": "long"}), "result.json: seconds"),
        (lambda record: record.update(pruned=None, frozen=3), "result.json: pruned"),
    ],
)
@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_figure_that_is_none_is_left_out(change: Callable[[Any], object], missing: str, language: str, run: Path):
    _edit(run / "result.json", change)
    assert missing in [piece.file for piece in read_facts(run).missing]
    html, markdown = write_report(run, language=language)
    assert missing in Page(html).text
    assert missing in re.sub(r"\\", "", markdown.read_text())


def test_an_accuracy_that_is_not_a_number_costs_no_other_figure(run: Path):
    _edit(run / "result.json", lambda record: record["baseline"].update(accuracy=float("nan")))
    page = Page(write_report(run)[0])
    assert page.row("accuracy on test data")[0] == "–" and page.row("accuracy on test data")[1].endswith(" %")
    assert "not finished" not in page.text and "MACs" in page.text


def test_odd_settings_in_the_record_do_not_cost_the_report(run: Path):
    odd = {"budget": 3, "limits": {"macs": "x", "y": 1}, "search": [], "settings": None, "versions": [1], "export": 7}
    _edit(run / "result.json", lambda record: record.update(odd, hardware=None, command=None, full_widths=None))
    for language in ("en", "ja"):
        html, _ = write_report(run, language=language)
        assert Page(html).rows


def test_a_run_of_an_earlier_version_still_has_a_report(run: Path):
    """Without what was added since: groups stand in for layers, files for sizes, and intervals are not invented."""
    new = ("limits", "test_samples", "command", "finished_at", "layers", "frozen")

    def older(record: dict[str, Any]) -> None:
        for name in new:
            del record[name]
        for net in ("baseline", "pruned", "uniform", "searched"):
            del record[net]["weights_bytes"]

    _edit(run / "result.json", older)
    for name in ("evaluated", "curves", "prior"):
        (run / f"stages/{name}.json").unlink()
    facts = read_facts(run)
    assert [layer.name for layer in facts.layers] == ["0", "3", "6"]
    tensors = sum(tensor.nbytes for tensor in load_file(run / "stages/baseline.safetensors").values())
    assert facts.nets["baseline"].weights_bytes == pytest.approx(tensors, rel=0.3)
    page = Page(write_report(run)[0])
    assert "have no intervals here" in page.text and "whether it is kept is not judged" in page.text
    assert page.row("95 % interval of it") == ["–", "–", "–"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="must be a run directory made by psenet prune; it holds neither"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="must be a run directory"):
        write_report(tmp_path / "nothing")
