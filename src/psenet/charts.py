"""What a prior learned, as plain numbers that a run keeps and as a figure for people.

plotly is imported where a figure is made.

Legend: B cost bins, G channel groups.
"""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from psenet.history import History
from psenet.prior import Prior

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SHOWN_CHOICES = 3
"""Choices of a group that are named when the pointer rests on a cell."""

PRIOR_WORDS: Mapping[str, str] = {
    "title": "What the prior learned: which groups keep their channels",
    "axis": "MACs, share of the full model",
    "than_visits": "keeps more (+) or less (-)<br>than in subnets visited, points",
    "than_groups": "keeps more (+) or less (-)<br>than the mean group, points",
    "cell": "keeps {keeps} on average; likeliest widths: {widths}",
    "at": "%{y} at %{x} of the MACs",
}
"""What the figure says, in English."""


def prior_chart(prior: Prior, *, history: History | None = None) -> "Figure":
    """Return a heat map of what a prior has learned: which groups stay wide, and which become narrow, at which cost.

    A cell's colour is the share of its channels that the group keeps there, less what it kept in the subnets of that
    cost that training visited: what losses taught. Without a history it is less the mean share of all groups, which
    also shows what every subnet of that cost has in common. Resting on a cell shows the likeliest widths. Groups stand
    in the order in which data meets them.

    Args:
        prior: What to show.
        history: What it was fitted to.

    Raises:
        InputError: The history is of another space.

    Example:
        >>> import psenet, torch
        >>> from torch import nn
        >>> from psenet.charts import prior_chart
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3))
        >>> space = psenet.trace(net, torch.zeros(1, 3, 8, 8))
        >>> figure = prior_chart(psenet.Prior.uniform(space))
        >>> figure.write_html("prior.html")  # doctest: +SKIP
    """
    from plotly.graph_objects import Figure

    return Figure(draw_prior(prior_record(prior, history=history)))


def prior_record(prior: Prior, *, history: History | None = None) -> dict[str, Any]:
    """Return what a prior learned as plain JSON values; args and errors are those of `prior_chart`.

    Returns:
        `groups`: their names. `macs_shares`: those of the bins. `keeps`: the share of its channels that each group
        keeps, shape (B, G). `usual`: what that is compared with, shape (B, G) or (B, 1), and `versus`: "visits" or
        "groups", what it is. `likeliest`: for each group and bin its likeliest widths, each with its probability.
    """
    space, ratio_BG = prior.space, prior.keep_ratios()
    if history is None:
        usual_BG, versus = ratio_BG.mean(axis=1, keepdims=True), "groups"
    else:
        visits = Prior.of_visits(history, space, num_bins=prior.num_bins, smoothing=prior.smoothing)
        usual_BG, versus = visits.keep_ratios(), "visits"
    return {
        "groups": [group.name for group in space.groups],
        "macs_shares": (prior.bin_macs / space.macs(space.full())).round(6).tolist(),
        "keeps": ratio_BG.round(6).tolist(),
        "usual": usual_BG.round(6).tolist(),
        "versus": versus,
        "likeliest": _likeliest(prior),
    }


def draw_prior(record: Mapping[str, Any], *, words: Mapping[str, str] = PRIOR_WORDS) -> dict[str, Any]:
    """Return the heat map of a `prior_record` as plotly takes it: `data` and `layout`.

    Args:
        record: What to show.
        words: What it says, keyed as `PRIOR_WORDS`.

    Raises:
        KeyError, TypeError, ValueError: It is no such record.
    """
    keeps_BG = np.array(record["keeps"], dtype=np.float64)
    wider_BG = 100 * (keeps_BG - np.array(record["usual"], dtype=np.float64))
    reach = max(float(np.abs(wider_BG).max(initial=0.0)), 1.0)
    heat = {
        "type": "heatmap",
        "z": wider_BG.T.round(4).tolist(),
        "x": [f"{share:.1%}" for share in record["macs_shares"]],
        "y": [escape(name, quote=False) for name in record["groups"]],  # plotly reads tags in what it shows
        "customdata": [
            [
                words["cell"].format(
                    keeps=f"{keeps_BG[place, number]:.0%}",
                    widths=", ".join(f"{width} ({probability:.0%})" for width, probability in cell),
                )
                for place, cell in enumerate(row)
            ]
            for number, row in enumerate(record["likeliest"])
        ],
        "hovertemplate": words["at"] + "<br>%{customdata}<extra></extra>",
        "colorscale": "RdBu",
        "zmid": 0,
        "zmin": -reach,
        "zmax": reach,
        "colorbar": {"title": {"text": words[f"than_{record['versus']}"]}},
    }
    layout = {
        "title": {"text": words["title"]},
        "xaxis": {"title": {"text": words["axis"]}, "type": "category"},
        "yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
        "height": 160 + 24 * len(record["groups"]),
        "template": "plotly_white",
    }
    return {"data": [heat], "layout": layout}


def _likeliest(prior: Prior) -> list[list[list[tuple[int, float]]]]:
    """Return, for each group and bin, its likeliest widths and their probabilities."""
    tables = [prior.marginals(macs) for macs in prior.bin_macs]
    rows = []
    for group in prior.space.groups:
        row = []
        for table in tables:
            order = np.argsort(-table[group.name], kind="stable")[:_SHOWN_CHOICES]
            row.append([(int(group.choices[place]), round(float(table[group.name][place]), 4)) for place in order])
        rows.append(row)
    return rows
