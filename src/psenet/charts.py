"""Figures for people, by plotly, which is imported where one is drawn.

Legend: B cost bins, G channel groups.
"""

from typing import TYPE_CHECKING

import numpy as np

from psenet.history import History
from psenet.prior import Prior

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SHOWN_CHOICES = 3
"""Choices of a group that are named when the pointer rests on a cell."""


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
    from plotly.graph_objects import Figure, Heatmap

    space = prior.space
    ratio_BG = prior.keep_ratios()
    if history is None:
        usual_BG, versus = ratio_BG.mean(axis=1, keepdims=True), "than the mean group"
    else:
        visits = Prior.of_visits(history, space, num_bins=prior.num_bins, smoothing=prior.smoothing)
        usual_BG, versus = visits.keep_ratios(), "than in subnets visited"
    wider_BG = 100 * (ratio_BG - usual_BG)
    shares = [f"{share:.1%}" for share in prior.bin_macs / space.macs(space.full())]
    reach = max(float(np.abs(wider_BG).max()), 1.0)
    names = [group.name for group in space.groups]
    figure = Figure(
        Heatmap(
            z=wider_BG.T,
            x=shares,
            y=names,
            customdata=_likeliest(prior),
            hovertemplate="%{y} at %{x} of the MACs<br>%{customdata}<extra></extra>",
            colorscale="RdBu",
            zmid=0,
            zmin=-reach,
            zmax=reach,
            colorbar={"title": {"text": f"keeps more (+) or less (-)<br>{versus}, points"}},
        )
    )
    figure.update_layout(
        title="What the prior learned: which groups keep their channels",
        xaxis={"title": "MACs, share of the full model", "type": "category"},
        yaxis={"autorange": "reversed", "type": "category", "automargin": True},
        height=160 + 24 * len(names),
        template="plotly_white",
    )
    return figure


def _likeliest(prior: Prior) -> list[list[str]]:
    """Return, for each group and bin, its mean and its likeliest widths."""
    ratio_BG = prior.keep_ratios()
    tables = [prior.marginals(macs) for macs in prior.bin_macs]
    texts = []
    for number, group in enumerate(prior.space.groups):
        row = []
        for bin_number, table in enumerate(tables):
            order = np.argsort(-table[group.name], kind="stable")[:_SHOWN_CHOICES]
            widths = ", ".join(f"{group.choices[place]} ({table[group.name][place]:.0%})" for place in order)
            row.append(f"keeps {ratio_BG[bin_number, number]:.0%} on average; likeliest widths: {widths}")
        texts.append(row)
    return texts
