"""The report's charts, as plotly.js takes them: plain data and layout.

Plain because the page draws them itself: nothing here needs plotly's Python objects.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from psenet.charts import draw_prior
from psenet.report.facts import Candidate, Ranking
from psenet.report.shown import in_bytes, in_ms, percent, short
from psenet.report.text import Words
from psenet.training.curves import EpochRecord

INK, GREY, FAINT = "#1f2933", "#9aa5b1", "#e4e7eb"
BLUE, RUST = "#1d5b8f", "#b4532a"
"""The two accents."""
PICKED = 4
"""The trace of the front's chart that marks what the slider picks."""
_SHOWN_GROUPS = 12
"""So many widths are named when the pointer rests on a candidate."""
_TONES = ((GREY, "solid"), (BLUE, "solid"), (RUST, "solid"), (RUST, "dot"))


def draw_front(
    candidates: Sequence[Candidate],
    front: Sequence[Candidate],
    *,
    full_macs: float,
    kept: Mapping[str, int],
    words: Words,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the scatter of candidates with the front, the best, the kept and the picked one."""

    def points(some: Sequence[Candidate], **style: Any) -> dict[str, Any]:
        return {
            "type": "scatter",
            "x": [round(100 * one.macs / full_macs, 3) for one in some],
            "y": [one.score for one in some],
            "text": [_hover(one, words) for one in some],
            "hovertemplate": "%{text}<extra></extra>",
            **style,
        }

    best = [max((one for one in candidates if not one.is_estimate), key=lambda one: one.score)]
    chosen = [one for one in candidates if dict(one.widths) == dict(kept)][:1]
    marks = {"mode": "markers"}
    data = [
        points(candidates, name=words("candidates"), marker={"color": GREY, "size": 7, "opacity": 0.65}, **marks),
        points(
            front,
            name=words("front_line"),
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"color": BLUE, "size": 7},
        ),
        points(best, name=words("winner"), marker={"color": BLUE, "size": 13, "symbol": "diamond"}, **marks),
        points(
            chosen, name=words("kept"), marker={"color": INK, "size": 12, "symbol": "x-thin", **_outline()}, **marks
        ),
        points(
            front[-1:],
            name=words("picked"),
            marker={"color": RUST, "size": 20, "symbol": "circle-open", "line": {"width": 3, "color": RUST}},
            hoverinfo="skip",
            hovertemplate=None,
            **marks,
        ),
    ]
    layout = base_layout(height=430)
    layout["xaxis"]["title"] = {"text": words("macs_axis")}
    layout["yaxis"]["title"] = {"text": words("score_axis")}
    return data, layout


def draw_curves(
    curves: Mapping[str, Sequence[EpochRecord]], names: Mapping[str, str], words: Words
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the losses of all trainings over their epochs."""
    data = []
    for number, (training, epochs) in enumerate(curves.items()):
        color, dash = _TONES[number % len(_TONES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(names[training], quote=False),
                "x": [one.epoch + 1 for one in epochs],
                "y": [one.loss if abs(one.loss) < float("inf") else None for one in epochs],
                "text": [
                    words("loss_hover", epoch=one.epoch + 1, loss=f"{one.loss:.4g}", rate=f"{one.learning_rate:.3g}")
                    for one in epochs
                ],
                "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
                "line": {"color": color, "dash": dash, "width": 2},
                "marker": {"color": color, "size": 5},
            }
        )
    layout = base_layout(height=360)
    layout["xaxis"] |= {"title": {"text": words("epoch_axis")}, "tickformat": "d"}
    layout["yaxis"] |= {"title": {"text": words("loss_axis")}, "rangemode": "tozero"}
    if max(len(epochs) for epochs in curves.values()) <= 10:
        layout["xaxis"]["dtick"] = 1
    return data, layout


def draw_prior_map(record: Mapping[str, Any], words: Words) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the heat map of what the prior learned, in the report's manner."""
    keys = {"axis": "prior_axis", "cell": "prior_cell", "at": "prior_at", "title": "prior"}
    keys |= {"than_visits": "prior_difference", "than_groups": "prior_difference"}
    templates = {"cell": words("prior_cell", keeps="{keeps}", widths="{widths}")}
    spec = draw_prior(record, words={name: templates.get(name) or words(key) for name, key in keys.items()})
    (heat,) = spec["data"]
    heat["colorscale"] = [[0.0, RUST], [0.5, "#ffffff"], [1.0, BLUE]]
    bar = {"orientation": "h", "thickness": 10, "len": 0.9, "y": 1.0, "yanchor": "bottom", "outlinewidth": 0}
    title = {**heat["colorbar"]["title"], "side": "top"}
    heat["colorbar"] = {**bar, "title": title}
    num_groups = len(record["groups"])
    layout = base_layout(height=190 + round(max(9.0, min(22.0, 1400 / num_groups)) * num_groups))
    layout["xaxis"] |= spec["layout"]["xaxis"]
    layout["yaxis"] |= {**spec["layout"]["yaxis"], "ticklabelstandoff": 6}
    layout["margin"]["t"] = 80
    return [heat], layout


def draw_ranking(ranking: Ranking, words: Words) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return score in the supernet against accuracy alone."""
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": [one.score for one in ranking.subnets],
        "y": [one.accuracy_alone for one in ranking.subnets],
        "marker": {"color": BLUE, "size": 9, "opacity": 0.8},
        "showlegend": False,
    }
    layout = base_layout(height=360)
    layout["xaxis"]["title"] = {"text": words("score_axis")}
    layout["yaxis"]["title"] = {"text": words("accuracy_alone")}
    return [points], layout


def base_layout(*, height: int) -> dict[str, Any]:
    """Return what all charts have in common."""
    axis = {"gridcolor": FAINT, "linecolor": GREY, "zeroline": False, "automargin": True, "ticks": "outside"}
    axis |= {"tickcolor": FAINT, "fixedrange": True}  # a finger that scrolls the page must not zoom
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 40, "b": 56},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": "system-ui, 'Noto Sans JP', 'Hiragino Sans', sans-serif", "size": 13, "color": INK},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "bgcolor": "#ffffff", "bordercolor": GREY, "font": {"color": INK}},
        "hovermode": "closest",
        "dragmode": False,
    }


def _outline() -> dict[str, Any]:
    return {"line": {"width": 3, "color": INK}}


def _hover(one: Candidate, words: Words) -> str:
    """Return a candidate for the pointer; plotly reads tags in it, so names are escaped."""
    stopped = f" ({words('estimate', share=percent(100 * one.share, 0))})" if one.is_estimate else ""
    lines = [
        f"<b>{words('score')} {percent(one.score)}</b>{stopped}",
        f"{words('macs')} {short(one.macs)}, {words('params')} {short(one.params)}",
    ]
    if one.memory is not None:
        lines.append(f"{words('memory')} {in_bytes(one.memory)}")
    if one.latency_ms is not None:
        lines.append(f"{words('latency_predicted')} {in_ms(one.latency_ms)}")
    widths = [f"{escape(name, quote=False)}: {width}" for name, width in list(one.widths.items())[:_SHOWN_GROUPS]]
    more = len(one.widths) - len(widths)
    return "<br>".join([*lines, *widths, *([f"… +{more}"] if more else [])])
