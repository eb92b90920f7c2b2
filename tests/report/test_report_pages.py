"""Both forms of the report say what the run found, no more, and nothing that a run holds can break them."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
from hostile import GROUP, MARKUP, NEW_NAMES, hostile_copy
from pages import Page

from psenet.report import ReturnFigures, write_report

FIGURES = ReturnFigures(price_per_hour=2.0, requests_per_day=1e6, engineering_hours=5, engineering_rate=60)


def _record(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def _change(run: Path, **changes: Any) -> None:
    (run / "result.json").write_text(json.dumps({**_record(run), **changes}))


def _decision(run: Path, language: str = "en") -> list[str]:
    lines = write_report(run, language=language)[1].read_text().split("\n\n")[2].splitlines()
    return [re.sub(r"\\", "", line).replace("\u00a0", " ")[3:] for line in lines]


def _nets(run: Path, **pruned: Any) -> None:
    """Give the run figures that a person can check, those of the pruned net as asked."""
    net = {"macs": 1000, "params": 100, "latency_ms": 2.0, "latency_quartiles_ms": [1.9, 2.1], "accuracy": 90.0}
    half = {**net, "macs": 480, "params": 40, "latency_ms": 1.0, "latency_quartiles_ms": [0.9, 1.1], **pruned}
    uniform = {**half, "macs": 500, "params": 50, "accuracy": 80.0}
    _change(run, baseline=net, pruned=half, uniform=uniform, test_samples=1000, limits={"macs": 500})


# The decision ---------------------------------------------------------------------------------------------------------


def test_the_decision_is_three_lines(run: Path):
    _nets(run, accuracy=89.0)
    _change(run, search={"kept": "searched"}, uniform_widths={"0": 1})
    # Wilson: 88.0 to 91.7 for 900 of 1000, 86.9 to 90.8 for 890; 77.4 to 82.4 for 800.
    assert _decision(run) == [
        "MACs 1.00k → 480 (48 %), latency 2.00 ms → 1.00 ms (2.00×), accuracy 90.00 % → 89.00 % (−1.00 points; "
        "the 95 % intervals overlap: these 1,000 samples do not tell the two apart).",
        "Budget kept: MACs 480 of at most 500.",
        "Against uniform pruning within the same budget: MACs −4 %, parameters −20 %, latency +0 % (the quartiles "
        "overlap), accuracy +9.00 points (the 95 % intervals on 1,000 samples do not overlap).",
    ]
    assert len(_decision(run, "ja")) == 3


def test_a_difference_larger_than_its_error_is_said_to_be_one_and_a_slower_net_slower(run: Path):
    _nets(run, accuracy=70.0, latency_ms=2.05, latency_quartiles_ms=[1.0, 3.0])
    first = _decision(run)[0]
    assert "(0.98×; the quartiles overlap)" in first
    assert "(−20.00 points; the 95 % intervals on 1,000 samples do not overlap)" in first


def test_a_missed_budget_is_said(run: Path):
    _nets(run)
    _change(run, limits={"macs": 400, "params": 40})
    assert _decision(run)[1] == "Budget missed: MACs 480, above 400, parameters 40 of at most 40."


@pytest.mark.parametrize(
    ("measured", "keeps", "said"),
    [
        (0.9, True, "Budget kept: latency 0.90 ms of at most 0.95 ms."),
        (0.96, True, "Budget kept: latency 0.96 ms at a limit of 0.95 ms, within the error of measuring."),
        (1.2, False, "Budget missed: latency 1.20 ms, above 0.95 ms."),
    ],
)
def test_a_latency_is_held_against_its_budget_as_the_search_measured_it(
    measured: float, keeps: bool, said: str, run: Path
):
    _nets(run)
    latency = {"measured_ms": measured, "keeps_budget": keeps}
    _change(run, limits={"latency_ms": 0.95}, search={"kept": "searched", "latency": latency})
    assert _decision(run)[1] == said


def test_a_run_that_kept_the_uniform_net_says_why(run: Path):
    _change(run, search={"kept": "uniform"}, searched={"accuracy": 55.5})
    assert _decision(run)[2] == (
        "Kept is the uniform net: on validation data the searched one did not lead by more than a standard error; "
        "the searched one has 55.50 % on test data."
    )


def test_a_search_that_returned_the_uniform_widths_says_so(run: Path):
    _change(run, search={"kept": "searched"}, widths={"0": 8}, uniform_widths={"0": 8})
    assert "pruned and uniform are one net" in _decision(run)[2]


def test_accuracies_on_validation_data_are_said_to_flatter(run: Path):
    _change(run, accuracy_on="validation data")
    assert "on validation data, which chose the net: they flatter it" in _decision(run)[0]


# Both forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "ja"])
def test_html_and_markdown_hold_the_same_tables(language: str, finished_run: Path, tmp_path: Path):
    html, markdown = write_report(finished_run, language=language, figures=FIGURES)
    page = Page(html)
    assert page.with_tag("html")[0]["lang"] == language
    text = re.sub(r"\\([\\`*_{}\[\]<>#|~$&])", r"\1", markdown.read_text())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    shown = [[cell.replace("\u00a0", " ").strip() for cell in row] for row in page.rows]
    # The slider's panel is a table of its own form: one row for each group of its pick, and a head.
    assert len([row for row in shown if row not in lines]) == 3 + 1
    # And all that is in Markdown is on the page, but for rules and the slider's choices with their head.
    choices = len(page.data["front-chart-choices"]["choices"])
    others = [line for line in lines if line not in shown and set("".join(line)) - set("-:")]
    assert len(others) == choices + 1
    assert [path.name for path in (html, markdown)] == {
        "en": ["report.html", "report.md"],
        "ja": ["report.ja.html", "report.ja.md"],
    }[language]


def test_the_comparison_shows_the_record(finished_run: Path):
    page, record = Page(write_report(finished_run)[0]), _record(finished_run)
    nets = [record[name] for name in ("baseline", "pruned", "uniform")]
    assert page.row("accuracy on test data") == [f"{net['accuracy']:.2f} %" for net in nets]
    assert [cell.split(" (")[0] for cell in page.row("FLOPs")] == [f"{2 * net['macs'] / 1000:.0f}k" for net in nets]
    assert page.row("latency, median, batch 1")[0].endswith(" ms")
    layer = next(one for one in record["layers"] if one["name"] == "3")
    share = f"{100 * layer['pruned'] / layer['full']:.0f} %"
    shown = ["Conv2d", str(layer["full"]), str(layer["pruned"]), share, str(layer["uniform"])]
    assert next(row[1:] for row in page.rows if row[:2] == ["3", "Conv2d"]) == shown
    assert page.row("command") == ["psenet prune --data paint"]


def test_the_front_is_what_no_cheaper_candidate_equals(finished_run: Path):
    data = Page(write_report(finished_run)[0]).data
    candidates = json.loads((finished_run / "stages/evaluated.json").read_text())["candidates"]
    full = _record(finished_run)["baseline"]["macs"]
    expected = sorted(
        (100 * one["macs"] / full, one["score"])
        for one in candidates
        if not any(
            (other["macs"] <= one["macs"] and other["score"] > one["score"])
            or (other["macs"] < one["macs"] and other["score"] == one["score"])
            for other in candidates
        )
    )
    choices = data["front-chart-choices"]["choices"]
    assert [(one["share"], one["score"]) for one in choices] == [pytest.approx(one, abs=1e-3) for one in expected]
    front = data["front-chart-spec"]["data"][1]
    assert [front["x"], front["y"]] == [[one[key] for one in choices] for key in ("share", "score")]


def _stop(run: Path, *, all_of_them: bool = False) -> dict[str, Any]:
    """Make the best candidate, or all, one that was stopped early; return the best."""
    path = run / "stages/evaluated.json"
    content = json.loads(path.read_text())
    best = max(content["candidates"], key=lambda one: one["score"])
    for one in content["candidates"]:
        one["share"] = 0.25 if all_of_them or one is best else 1.0
    path.write_text(json.dumps(content))
    return best


def test_an_estimate_is_shown_as_one_and_never_as_the_best_or_on_the_front(run: Path):
    best = _stop(run)
    data = Page(write_report(run)[0]).data
    everything, front, winner = data["front-chart-spec"]["data"][:3]
    place = everything["y"].index(best["score"])
    assert "(an estimate: hopeless after 25\u00a0% of the validation data)" in everything["text"][place]
    assert sum("estimate" in text for text in everything["text"]) == 1
    others = [score for score in everything["y"] if score != best["score"]]
    assert winner["y"] == [max(others)] and best["score"] not in front["y"]
    assert all(one["score"] != best["score"] for one in data["front-chart-choices"]["choices"])


def test_a_run_of_estimates_only_has_no_front(run: Path):
    _stop(run, all_of_them=True)
    assert "No scored candidates are there to show." in Page(write_report(run)[0]).text


def test_every_chart_is_one_that_plotly_knows(finished_run: Path, tmp_path: Path):
    run = hostile_copy(finished_run, tmp_path)
    specs = {name: spec for name, spec in Page(write_report(run)[0]).data.items() if name.endswith("-spec")}
    assert list(specs) == [f"{name}-chart-spec" for name in ("front", "curves", "prior", "ranking")]
    for spec in specs.values():
        plotly.graph_objects.Figure(spec)  # refuses unknown names and impossible values


def test_the_return_is_shown_with_its_formulas(finished_run: Path):
    page = Page(write_report(finished_run, figures=FIGURES)[0])
    hours = page.row("machine-hours a month, baseline: requests a day × days × latency")
    assert hours[0].startswith("1,000,000 × 30.44 × ") and hours[1].endswith(" h")
    assert page.row("engineering: hours × rate") == ["5 × 60", "300.00"]


def test_figures_that_are_missing_are_asked_for_and_none_is_invented(finished_run: Path):
    page = Page(write_report(finished_run, figures=ReturnFigures(price_per_hour=2.0))[0])
    assert page.row("engineering: hours × rate") == ["–", "needs --engineering-hours, --engineering-rate"]
    assert page.row("savings a month: difference in hours × price of an hour") == ["–", "needs --requests-per-day"]
    assert "psenet report RUN --price-per-hour" in Page(write_report(finished_run)[0]).text


# Hostile names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "ja"])
def test_hostile_names_are_shown_and_do_nothing(language: str, finished_run: Path, tmp_path: Path):
    run = hostile_copy(finished_run, tmp_path)
    html, markdown = write_report(run, language=language, figures=ReturnFigures(price_per_hour=1, currency=MARKUP))
    page = Page(html)
    assert not page.with_tag("img") and not page.with_tag("b")[0].keys() - {"style"}
    assert [attributes for attributes in page.with_tag("script") if "id" not in attributes] == [{}, {}]
    for text in (MARKUP, GROUP, run.name, "写真 <犬|猫> {x}", "τ"):
        assert text in page.text.replace("\n", " ")
    assert GROUP in [row[0] for row in page.rows if row]
    # plotly reads tags in what it shows: every one that is not its own line break or emphasis is escaped.
    for name, spec in page.data.items():
        if name.endswith("-spec"):
            assert not re.findall(r"<(?!br>|/?b>|/?extra>)[^=\d ]", json.dumps(spec, ensure_ascii=False)), name
    written = markdown.read_text()
    assert not re.search(r"(?<!\\)<(img|script|b)", written)
    rows = [line for line in written.splitlines() if NEW_NAMES["0"].split("<")[0] in line]
    assert rows and all("\\<img" in row for row in rows)


def test_nothing_can_be_loaded_and_no_script_run_but_the_page_s_own(finished_run: Path):
    html = write_report(finished_run)[0]
    page = Page(html)
    (policy,) = [meta["content"] for meta in page.with_tag("meta") if "http-equiv" in meta]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", html.read_text(), re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(str(attributes.get(name, "#")).startswith(("#", "data:")) for name in ("src", "href"))


def test_a_page_without_charts_carries_no_library(run: Path):
    for name in ("evaluated", "curves", "prior"):
        (run / f"stages/{name}.json").unlink()
    assert write_report(run)[0].stat().st_size < 60_000


def _marked(value: Any) -> Any:
    """Return JSON in which every text but the keys of objects that are read by name is markup."""
    if isinstance(value, dict):
        return {name: _marked(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner) for inner in value]
    return f"<script>alert(1)</script>{value}" if isinstance(value, str) else value


@pytest.mark.parametrize("language", ["en", "ja"])
def test_markup_in_any_text_of_a_run_is_shown_as_text(language: str, run: Path):
    for path in [*run.glob("*.json"), *run.glob("stages/*.json")]:
        path.write_text(json.dumps(_marked(json.loads(path.read_text()))), encoding="utf-8")
    html, markdown = write_report(run, language=language, figures=ReturnFigures(currency="<script>alert(1)</script>"))
    assert "<script>alert(1)" not in html.read_text()
    assert not re.search(r"(?<!\\)<script", markdown.read_text())
    assert "<script>alert(1)</script>my.nets:colours" in Page(html).text


@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_page_names_nothing_on_the_network_to_be_loaded(language: str, finished_run: Path, tmp_path: Path):
    page = write_report(hostile_copy(finished_run, tmp_path), language=language, figures=FIGURES)[0].read_text()
    # The charts' library holds addresses of maps, as texts, that the page's policy forbids; all else holds none.
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"https?://|url\(|@import|<iframe|<object|<embed|<base", own)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert len(policy) == 1 and policy[0].startswith("default-src &#39;none&#39;")
    assert "http" not in policy[0] and "*" not in policy[0]
