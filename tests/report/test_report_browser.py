"""The page in a real browser: it draws, the slider works, nothing complains, a phone and paper can hold it."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, open_browser
from hostile import GROUP, hostile_copy
from pages import Page

from psenet.report import ReturnFigures, write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to show the page")
_FIGURES = ReturnFigures(price_per_hour=2.0, requests_per_day=1e6, engineering_hours=5, engineering_rate=60)
_HOME, _RIGHT = ("Home", 36), ("ArrowRight", 39)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run with hostile names, in each language."""
    run = hostile_copy(finished_run, tmp_path_factory.mktemp("page"))
    return {language: write_report(run, language=language, figures=_FIGURES)[0] for language in ("en", "ja")}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_draws_itself_without_a_complaint_or_a_request(
    language: str, width: int, pages: dict[str, Path], browser: Browser
):
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(pages[language], width=width)
    # Each chart has the size of its place, and something in it.
    drawn = "[...document.querySelectorAll('.chart')].map(c => [c.id, c.querySelectorAll('svg.main-svg').length])"
    charts = ["front-chart", "curves-chart", "prior-chart", "ranking-chart"]
    assert [name for name, count in browser.run(drawn) if count > 0] == charts
    assert browser.run("document.querySelectorAll('#front-chart .scatterlayer .point').length") > 6
    assert browser.run("document.documentElement.scrollWidth") <= width  # tables scroll, the page does not
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == []


def test_the_slider_picks_the_best_candidate_inside_the_budget(pages: dict[str, Path], browser: Browser):
    record = json.loads((pages["en"].parent / "result.json").read_text(encoding="utf-8"))
    pruned_share = 100 * record["pruned"]["macs"] / record["baseline"]["macs"]
    choices = Page(pages["en"]).data["front-chart-choices"]["choices"]
    browser.open(pages["en"], width=1280)
    slider = "document.querySelector('.slider input')"
    # It is reached by its label and moved by keys.
    assert browser.run(f"{slider}.labels[0].textContent.includes('Budget')")
    # It begins at what the run came to.
    share = next(one["share"] for one in reversed(choices) if one["share"] <= pruned_share)
    assert share < choices[-1]["share"]
    assert 0 <= float(browser.run(f"{slider}.value")) - share <= 0.1
    browser.run(f"{slider}.focus()")
    browser.press(*_HOME)
    seen = set()
    for _ in range(400):
        budget = float(browser.run(f"{slider}.value"))
        expected = max((one for one in choices if one["share"] <= budget + 1e-9), key=lambda one: one["score"])
        shown = browser.run(
            "[[...document.querySelectorAll('.slider dd')].map(e => e.textContent),"
            " [...document.querySelectorAll('.slider .width')].map(e => parseInt(e.textContent)),"
            " document.querySelector('.slider output').textContent,"
            " document.querySelector('.slider input').getAttribute('aria-valuetext')]"
        )
        assert shown == [expected["facts"], expected["widths"], f"{budget:.1f} %", f"{budget:.1f} %"]
        picked = browser.run("(t => [t.x[0], t.y[0]])(document.getElementById('front-chart').data[4])")
        assert picked == [expected["share"], expected["score"]]
        line = browser.run("document.getElementById('front-chart').layout.shapes[0].x0")
        assert line == pytest.approx(budget)
        seen.add(expected["share"])
        if budget >= float(browser.run(f"{slider}.max")):
            break
        browser.press(*_RIGHT)
    assert len(seen) == len(choices) > 1


def test_resting_on_a_candidate_shows_its_net(pages: dict[str, Path], browser: Browser):
    browser.open(pages["en"], width=1280)
    browser.run("document.getElementById('front').scrollIntoView()")
    x, y = browser.run(
        "(r => [r.x + r.width / 2, r.y + r.height / 2])"
        "(document.querySelector('#front-chart .scatterlayer .trace:nth-child(2) .point').getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.run("new Promise(done => setTimeout(done, 300))")
    label = browser.run("document.querySelector('#front-chart .hoverlayer').textContent")
    assert "score" in label and "parameters" in label
    assert GROUP[:30] in label  # as text, whatever is in it
    assert browser.run("typeof window.hacked") == "undefined"


def test_japanese_charts_speak_japanese(pages: dict[str, Path], browser: Browser):
    browser.open(pages["ja"], width=1280)
    assert "スコア" in browser.run("document.querySelector('#front-chart').textContent")
    assert "候補" in browser.run("document.querySelector('#front-chart .legend').textContent")


def test_paper_holds_the_page_unfolded(pages: dict[str, Path], browser: Browser):
    browser.open(pages["en"], width=1280)
    assert browser.run("document.querySelector('details').open") is False
    pdf = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("document.querySelector('details').open") is True
    assert browser.run("document.querySelector('#front-chart .main-svg').width.baseVal.value") == 660
    browser.run("dispatchEvent(new Event('afterprint'))")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("document.querySelector('details').open") is False
    assert browser.run("document.querySelector('#front-chart .main-svg').width.baseVal.value") > 660


def test_a_page_of_a_run_that_has_just_begun_is_shown(run: Path, browser: Browser):
    for path in run.rglob("*"):
        if path.is_file() and path.name != "recipe.json":
            path.unlink()
    (run / "result.json").write_text(json.dumps({"model": "half"})[:9])
    browser.complaints.clear()
    browser.open(write_report(run)[0], width=390)
    assert browser.complaints == []
    assert "not finished" in browser.run("document.querySelector('.decision').textContent")
