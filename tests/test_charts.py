"""The figure of a prior shows what the prior says."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import psenet
from psenet import Prior, WidthSpace
from psenet.charts import prior_chart
from psenet.history import History


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))
    return psenet.trace(net, torch.zeros(1, 3, 8, 8), keep_ratios=(0.25, 0.5, 0.75, 1.0), divisor=4)


def _prior(space: WidthSpace) -> Prior:
    """A prior of five bins: the first group is wide everywhere, the second narrow."""
    visits_BGC = np.zeros((5, 2, 4))
    visits_BGC[:, 0, 3], visits_BGC[:, 1, 0] = 96.0, 96.0
    return Prior(space, visits_BGC, smoothing=4.0)


def _heat(prior: Prior, history: History | None = None) -> Any:
    chart: Any = prior_chart(prior, history=history)
    return chart.data[0]


def test_a_cell_is_the_share_kept_less_the_mean_of_all_groups(space: WidthSpace):
    heat = _heat(_prior(space))
    assert list(heat.y) == [group.name for group in space.groups] and len(heat.x) == 5
    # 96 visits to one choice and one of smoothing to each of four: 0.97 * 1 + 0.01 * (0.25 + 0.5 + 0.75).
    wide, narrow = 0.97 + 0.015, 0.97 * 0.25 + 0.01 * (0.5 + 0.75 + 1)
    half = 100 * (wide - narrow) / 2
    assert np.allclose(np.array(heat.z), [[half] * 5, [-half] * 5])


def test_resting_on_a_cell_names_the_likeliest_widths(space: WidthSpace):
    heat = _heat(_prior(space))
    assert "likeliest widths: 16 (97%)" in heat.customdata[0][2]
    assert "likeliest widths: 8 (97%)" in heat.customdata[1][2]


def test_a_prior_that_knows_nothing_is_even(space: WidthSpace):
    heat = _heat(Prior.uniform(space))
    assert np.allclose(np.array(heat.z), 0)


def test_against_a_history_only_what_its_losses_taught_is_shown(space: WidthSpace):
    """Losses that say nothing leave nothing; a loss that falls with one group's width lifts that group alone."""
    rng = np.random.default_rng(0)
    flat, taught = History(space), History(space)
    for step in range(1000):
        widths = [space.sample(rng) for _ in range(4)]
        shares_N = space.to_array(widths)[:, 1] / 32
        noise_N = torch.from_numpy(0.01 * rng.normal(size=4))
        flat.append(step, widths, noise_N)
        taught.append(step, widths, noise_N - torch.from_numpy(shares_N))
    even, lifted = (np.array(_heat(Prior.fit(one, space), one).z) for one in (flat, taught))
    assert np.abs(even).max() < 3
    assert lifted[1].max() > 5 and lifted[1].mean() > lifted[0].mean() + 3
