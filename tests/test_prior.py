import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psenet.budget import Budget, Limits
from psenet.cost import LinearForm, PeakCost, ProductCost
from psenet.errors import InputError
from psenet.history import History
from psenet.prior import Prior
from psenet.space import ChannelGroup, SpaceCosts, WidthSpace
from psenet.widths import Widths


def make_space(choices: list[tuple[int, ...]]) -> WidthSpace:
    """A chain of layers: MACs and params are products of neighbouring widths, memory their sum."""
    groups = [ChannelGroup(f"g{n}", allowed[-1], allowed, (f"g{n}",)) for n, allowed in enumerate(choices)]
    forms = [LinearForm(3), *(LinearForm(0, ((n, 1),)) for n in range(len(groups)))]
    pairs = list(itertools.pairwise(forms))
    num = len(groups)
    sums = [LinearForm(0, a.coefficients + b.coefficients) for a, b in pairs[1:]]
    costs = SpaceCosts(
        macs=ProductCost([(2 ** (4 - n % 4), a, b) for n, (a, b) in enumerate(pairs)], num),
        params=ProductCost([(1, a, b) for a, b in pairs], num),
        memory=PeakCost(sums or [forms[-1]], num),
    )
    return WidthSpace(groups, costs)


@pytest.fixture
def small() -> WidthSpace:
    return make_space([(2, 4, 6, 8), (1, 2), (3, 5, 6), (2, 4, 6, 8)])


def every_setting(space: WidthSpace) -> np.ndarray:
    return np.array(list(itertools.product(*(group.choices for group in space.groups))))


def make_history(space: WidthSpace, rows_NG: np.ndarray, losses_N: np.ndarray, per_step: int = 8) -> History:
    history = History(space)
    for step, first in enumerate(range(0, len(rows_NG), per_step)):
        part = slice(first, first + per_step)
        history.append(step, space.from_array(rows_NG[part]), torch.from_numpy(losses_N[part]))
    return history


def draw_uniform(space: WidthSpace, num: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.choice(group.choices, size=num) for group in space.groups], axis=1)


def test_a_width_never_visited_gets_the_smoothing_mass_no_more_and_no_less():
    # One bin, equal losses: every visit counts one and the probabilities can be counted by hand.
    space = make_space([(2, 4, 6, 8)])
    rows_NG = np.array([[2], [2], [8], [2], [6], [2]])
    prior = Prior.fit(make_history(space, rows_NG, np.ones(6), 6), space, num_bins=1, smoothing=2.0)
    probability = prior.marginals(space.macs(space.full()))["g0"]
    assert probability == pytest.approx([(4 + 0.5) / 8, 0.5 / 8, (1 + 0.5) / 8, (1 + 0.5) / 8], abs=1e-12)


def test_a_width_never_visited_is_never_above_one_visited_however_bad_the_visit():
    space = make_space([(2, 4, 6, 8), (2, 4)])
    rng = np.random.default_rng(0)
    rows_NG = draw_uniform(space, 400, rng)
    rows_NG = rows_NG[rows_NG[:, 0] != 4]
    losses_N = rng.normal(size=len(rows_NG)) + 5.0 * (rows_NG[:, 0] == 6)
    prior = Prior.fit(make_history(space, rows_NG, losses_N), space)
    for macs in prior.bin_macs:
        probability = prior.marginals(macs)["g0"]
        assert probability[1] <= probability.min() + 1e-12


def test_every_bin_holds_distributions_even_without_visits(small: WidthSpace):
    prior = Prior.fit(make_history(small, np.array([[8, 2, 6, 8]]), np.ones(1)), small, num_bins=20)
    assert prior.num_bins == 20
    for macs in prior.bin_macs:
        for group in small.groups:
            probability = prior.marginals(macs)[group.name]
            assert probability.sum() == pytest.approx(1) and (probability > 0).all()
    # The only visit is the full model: far below it nothing was seen.
    assert prior.marginals(prior.bin_macs[0])["g0"] == pytest.approx([0.25] * 4)


def test_good_choices_are_likelier_in_spite_of_trend_cost_and_noise():
    space = make_space([(4, 8, 12, 16)] * 6)
    rng = np.random.default_rng(1)
    rows_NG = draw_uniform(space, 4000, rng)
    step_N = np.arange(4000) // 8
    losses_N = 3 * np.exp(-step_N / 30) + 0.5 - 0.3 * np.log(space.macs(rows_NG)) + rng.normal(size=4000) * 0.2
    # In group 2 a width of 12 is worse than its cost says, in group 4 one of 8 is better.
    losses_N += 0.3 * (rows_NG[:, 2] == 12) - 0.3 * (rows_NG[:, 4] == 8)
    prior = Prior.fit(make_history(space, rows_NG, losses_N), space)
    middle = prior.marginals(float(np.median(space.macs(rows_NG))))
    assert middle["g2"].argmin() == 2 and middle["g2"][2] < 0.6 * np.delete(middle["g2"], 2).mean()
    assert middle["g4"].argmax() == 1 and middle["g4"][1] > 1.5 * np.delete(middle["g4"], 1).mean()
    # Group 0 has no effect but its cost, and that is taken out.
    assert np.abs(middle["g0"] - 0.25).max() < 0.12


def test_recent_visits_count_more():
    space = make_space([(2, 4), (2, 4)])
    rng = np.random.default_rng(2)
    rows_NG = draw_uniform(space, 2000, rng)
    rows_NG[:1000, 0], rows_NG[1000:, 0] = 2, 4
    history = make_history(space, rows_NG, np.ones(2000))
    short = Prior.fit(history, space, num_bins=1, half_life=0.1).marginals(1.0)["g0"]
    long = Prior.fit(history, space, num_bins=1, half_life=100.0).marginals(1.0)["g0"]
    # Half of the visits are a half-life of 0.1 after the other half: 2**-5 to 1.
    assert short[1] / short[0] == pytest.approx(2**5, rel=0.25)
    assert long[1] / long[0] == pytest.approx(1, rel=0.05)


def test_losses_that_are_not_finite_are_left_out(small: WidthSpace):
    rows_NG = every_setting(small)
    losses_N = np.linspace(1, 2, len(rows_NG))
    keep_N = np.arange(len(rows_NG)) % 3 > 0
    spoilt_N = np.where(keep_N, losses_N, np.where(np.arange(len(rows_NG)) % 2, np.nan, np.inf))
    with_bad = History(small)
    without = History(small)
    for step, (row_G, loss, keep) in enumerate(zip(rows_NG, spoilt_N, keep_N, strict=True)):
        with_bad.append(step, small.from_array(row_G[None]), torch.tensor([loss]))
        if keep:
            without.append(step, small.from_array(row_G[None]), torch.tensor([loss]))
    found, expected = Prior.fit(with_bad, small), Prior.fit(without, small)
    for macs in found.bin_macs:
        assert found.marginals(macs)["g0"] == pytest.approx(expected.marginals(macs)["g0"])


@pytest.mark.parametrize("num", [0, 1, 2, 5, 9, 17])
def test_few_visits_still_make_a_prior(small: WidthSpace, num: int):
    rng = np.random.default_rng(num)
    prior = Prior.fit(make_history(small, draw_uniform(small, num, rng), rng.random(num), 2), small)
    assert len(prior.sample(Budget(macs="50%"), 5, rng)) == 5


@pytest.mark.parametrize(
    "limits", [{"macs": "30%"}, {"params": "40%"}, {"memory": "60%"}, {"macs": "60%", "params": "30%", "memory": "70%"}]
)
def test_samples_are_different_and_inside_the_budget(limits: dict[str, str]):
    space = make_space([tuple(range(8, 65, 8))] * 12)
    resolved = Budget(**limits).resolve(space)
    found = Prior.uniform(space).sample(Budget(**limits), 500, np.random.default_rng(0))
    assert len(found) == 500 and len(set(found)) == 500
    for widths in found:
        space.check(widths)
        assert all(getattr(space, resource.name)(widths) <= limit for resource, limit in resolved.each())


def test_samples_come_close_to_the_budget():
    space = make_space([tuple(range(8, 65, 8))] * 12)
    for share in (0.1, 0.3, 0.6):
        limit = int(share * space.macs(space.full()))
        found = Prior.uniform(space).sample(Limits(macs=limit), 300, np.random.default_rng(0))
        assert np.median(space.macs(found)) > 0.65 * limit


def test_all_settings_inside_a_tiny_budget_are_found(small: WidthSpace):
    rows_NG = every_setting(small)
    macs_N = small.macs(rows_NG)
    limit = int(np.sort(macs_N)[9])
    inside = {tuple(row) for row in rows_NG[macs_N <= limit].tolist()}
    found = Prior.uniform(small).sample(Limits(macs=limit), len(inside), np.random.default_rng(0))
    assert {tuple(row) for row in small.to_array(found).tolist()} == inside
    more = Prior.uniform(small).sample(Limits(macs=limit), len(inside) + 7, np.random.default_rng(0))
    assert len(more) == len(inside) + 7 and set(more) == set(found)


def test_the_smallest_setting_can_be_the_only_one(small: WidthSpace):
    limit = small.macs(small.smallest())
    assert Prior.uniform(small).sample(Limits(macs=limit), 3, np.random.default_rng(0)) == [small.smallest()] * 3


def test_an_unreachable_budget_names_the_smallest_reachable(small: WidthSpace):
    least = small.macs(small.smallest())
    with pytest.raises(InputError, match=f"cannot be reached: the smallest reachable is {least}"):
        Prior.uniform(small).sample(Budget(macs="1%"), 3, np.random.default_rng(0))
    with pytest.raises(InputError, match="must not be negative; got -1"):
        Prior.uniform(small).sample(Budget(macs="50%"), -1, np.random.default_rng(0))


def test_sampling_is_repeatable(small: WidthSpace):
    first = Prior.uniform(small).sample(Budget(macs="50%"), 20, np.random.default_rng(5))
    assert first == Prior.uniform(small).sample(Budget(macs="50%"), 20, np.random.default_rng(5))
    assert first != Prior.uniform(small).sample(Budget(macs="50%"), 20, np.random.default_rng(6))


def test_ten_thousand_samples_take_about_a_second():
    space = make_space([tuple(range(16, 65, 8))] * 35)
    prior, budget = Prior.uniform(space), Budget(macs="25%")
    start = time.perf_counter()
    found = prior.sample(budget, 10_000, np.random.default_rng(0))
    # Well under a second on an idle core; the bound leaves room for a busy one.
    assert time.perf_counter() - start < 5
    assert len(set(found)) == 10_000


def test_repairing_lowers_only_and_ends_inside(small: WidthSpace):
    proposal = Prior.uniform(small).proposal(Limits(macs=int(0.3 * small.macs(small.full()))))
    rng = np.random.default_rng(0)
    levels_NG = proposal.levels.levels(every_setting(small))
    repaired_NG = proposal.repair(levels_NG, rng)
    fits_N = small.macs(every_setting(small)) <= proposal.limits.macs
    assert (repaired_NG <= levels_NG).all()
    assert (small.macs(proposal.levels.widths(repaired_NG)) <= proposal.limits.macs).all()
    assert (repaired_NG[fits_N] == levels_NG[fits_N]).all() and not fits_N.all()


def test_growing_leaves_no_single_step_free(small: WidthSpace):
    limit = int(0.4 * small.macs(small.full()))
    proposal = Prior.uniform(small).proposal(Limits(macs=limit))
    rng = np.random.default_rng(0)
    for start_G in proposal.levels.levels(every_setting(small)[:20]):
        grown_G = proposal.grow(start_G, rng)
        assert (grown_G >= start_G).all()
        assert small.macs(proposal.levels.widths(grown_G[None]))[0] <= limit
        for group in range(4):
            wider_G = grown_G.copy()
            wider_G[group] += 1
            if wider_G[group] < proposal.levels.num_G[group]:
                assert small.macs(proposal.levels.widths(wider_G[None]))[0] > limit


def test_listing_finds_every_fitting_setting_once(small: WidthSpace):
    rows_NG = every_setting(small)
    inside_N = (small.macs(rows_NG) <= 0.5 * small.macs(small.full())) & (small.memory(rows_NG) <= 10)
    limits = Limits(macs=int(0.5 * small.macs(small.full())), memory=10)
    proposal = Prior.uniform(small).proposal(limits)
    listed_NG, complete = proposal.list_fitting(10_000)
    assert complete and len(listed_NG) == inside_N.sum()
    assert {tuple(row) for row in proposal.levels.widths(listed_NG).tolist()} == {
        tuple(row) for row in rows_NG[inside_N].tolist()
    }
    some_NG, complete = proposal.list_fitting(5)
    assert len(some_NG) == 5 and not complete


def test_candidates_teach_the_prior():
    space = make_space([(4, 8, 12, 16)] * 4)
    rng = np.random.default_rng(3)
    rows_NG = draw_uniform(space, 200, rng)
    scores = (rows_NG[:, 1] == 8) + 0.1 * rng.normal(size=200)
    before = Prior.uniform(space)
    after = before.updated(rows_NG, scores.tolist())
    macs = float(np.median(space.macs(rows_NG)))
    assert after.marginals(macs)["g1"].argmax() == 1 and after.marginals(macs)["g1"][1] > 0.4
    assert before.marginals(macs)["g1"] == pytest.approx([0.25] * 4)
    from_widths = before.updated(space.from_array(rows_NG), scores.tolist())
    assert from_widths.marginals(macs)["g1"] == pytest.approx(after.marginals(macs)["g1"])


def test_scores_that_are_not_finite_teach_nothing(small: WidthSpace):
    prior = Prior.uniform(small)
    rows_NG = every_setting(small)[:6]
    found = prior.updated(rows_NG, [1.0, 2.0, float("nan"), 3.0, float("-inf"), 0.0])
    expected = prior.updated(rows_NG[[0, 1, 3, 5]], [1.0, 2.0, 3.0, 0.0])
    assert found.marginals(1.0)["g0"] == pytest.approx(expected.marginals(1.0)["g0"])
    with pytest.raises(InputError, match="expected 6 scores, one a candidate"):
        prior.updated(rows_NG, [1.0])


def test_the_log_probability_is_that_of_the_marginals(small: WidthSpace):
    rng = np.random.default_rng(4)
    prior = Prior.fit(make_history(small, draw_uniform(small, 300, rng), rng.random(300)), small)
    rows_NG = every_setting(small)[::7]
    for row_G, found in zip(rows_NG, prior.log_prob(rows_NG), strict=True):
        marginals = prior.marginals(float(small.macs(row_G[None])[0]))
        expected = 0.0
        for group, width in zip(small.groups, row_G.tolist(), strict=True):
            expected += np.log(marginals[group.name][group.choices.index(width)])
        assert found == pytest.approx(expected)
    with pytest.raises(InputError, match=r"not among the choices of groups \['g1'\]"):
        prior.log_prob(np.array([[2, 3, 3, 2]]))


def test_a_saved_prior_samples_the_same(small: WidthSpace, tmp_path: Path):
    rng = np.random.default_rng(4)
    prior = Prior.fit(make_history(small, draw_uniform(small, 300, rng), rng.random(300)), small, num_bins=5)
    prior.save(tmp_path / "prior.npz")
    loaded = Prior.load(tmp_path / "prior.npz", small)
    budget = Budget(macs="40%")
    assert loaded.num_bins == 5
    assert loaded.sample(budget, 30, np.random.default_rng(0)) == prior.sample(budget, 30, np.random.default_rng(0))


def test_a_prior_of_another_space_is_refused(small: WidthSpace, tmp_path: Path):
    Prior.uniform(small).save(tmp_path / "prior.npz")
    other = make_space([(2, 4)])
    with pytest.raises(InputError, match=r"the prior '.*prior.npz' belongs to another width space"):
        Prior.load(tmp_path / "prior.npz", other)
    with pytest.raises(InputError, match="the history belongs to another width space"):
        Prior.fit(History(other), small)


def test_a_file_that_is_no_prior_is_refused(small: WidthSpace, tmp_path: Path):
    History(small).save(tmp_path / "history.npz")
    with pytest.raises(InputError, match="must be a psenet prior of version 1; got history of version 1"):
        Prior.load(tmp_path / "history.npz", small)
    Prior(small, np.full((2, 4, 4), np.nan), smoothing=1.0).save(tmp_path / "nan.npz")
    with pytest.raises(InputError, match="must hold finite visits, none negative"):
        Prior.load(tmp_path / "nan.npz", small)
    Prior(small, np.zeros((0, 4, 4)), smoothing=1.0).save(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"must hold visits of shape \(bins, 4, 4\) and one smoothing"):
        Prior.load(tmp_path / "none.npz", small)


def test_settings_of_the_prior_must_be_positive(small: WidthSpace):
    with pytest.raises(InputError, match="smoothing must be positive; got 0.*half_life must be positive; got -1"):
        Prior.fit(History(small), small, smoothing=0.0, half_life=-1.0)


def test_candidates_of_equal_score_change_nothing_however_often_a_choice_was_tried():
    space = make_space([(2, 4, 6, 8), (1, 2, 4), (2, 4, 6, 8)])
    prior = Prior.uniform(space)
    often = [widths for widths in _draws(space, 200) if widths[space.groups[0].name] == space.groups[0].choices[-1]]
    candidates = [*often, *_draws(space, 10)]
    learned = prior.updated(candidates, [1.0] * len(candidates))
    for macs in prior.bin_macs:
        for name, probability_C in prior.marginals(macs).items():
            assert np.allclose(learned.marginals(macs)[name], probability_C)


def test_what_candidates_taught_is_saved_too(tmp_path: Path):
    space = make_space([(2, 4, 6, 8), (1, 2, 4), (2, 4, 6, 8)])
    candidates = _draws(space, 60)
    scores = [float(widths[space.groups[1].name]) for widths in candidates]
    learned = Prior.uniform(space).updated(candidates, scores)
    learned.save(tmp_path / "prior.npz")
    loaded, rows_NG = Prior.load(tmp_path / "prior.npz", space), space.to_array(candidates)
    assert np.array_equal(loaded.log_prob(rows_NG), learned.log_prob(rows_NG))
    assert not np.array_equal(loaded.log_prob(rows_NG), Prior.uniform(space).log_prob(rows_NG))


def _draws(space: WidthSpace, num: int) -> list[Widths]:
    rng = np.random.default_rng(3)
    return [space.sample(rng) for _ in range(num)]


# Any space, any budget ------------------------------------------------------------------------------------------------

_choices = st.sets(st.integers(1, 9), min_size=1, max_size=4).map(lambda widths: tuple(sorted(widths)))


@settings(deadline=None, max_examples=60)
@given(st.lists(_choices, min_size=1, max_size=4), st.integers(0, 30), st.data())
def test_samples_of_any_prior_keep_any_budget_and_are_different_while_settings_last(
    choices: list[tuple[int, ...]], num: int, data: st.DataObject
):
    space = make_space(choices)
    rows_NG = every_setting(space)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    visited_NG = draw_uniform(space, data.draw(st.integers(0, 20)), rng)
    prior = Prior.fit(make_history(space, visited_NG, rng.random(len(visited_NG))), space)
    # A budget that some setting just keeps.
    limits = {
        name: int(getattr(space, name)(rows_NG[[data.draw(st.integers(0, len(rows_NG) - 1))]])[0])
        for name in data.draw(st.sets(st.sampled_from(["macs", "params", "memory"]), min_size=1))
    }
    inside_N = np.all([getattr(space, name)(rows_NG) <= limit for name, limit in limits.items()], axis=0)
    found, again = (prior.sample(Limits(**limits), num, np.random.default_rng(5)) for _ in range(2))
    assert found == again and len(found) == num
    assert len(set(found)) == min(num, inside_N.sum())
    assert set(found) <= set(space.from_array(rows_NG[inside_N]))
