"""Latency models on known latencies, and once on a tiny net that is really measured."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import psenet
from psenet import latency_model
from psenet.budget import Budget, Limits
from psenet.errors import InputError
from psenet.history import read_arrays, write_arrays
from psenet.latency_model import LatencyModel, spread_settings
from psenet.prior import Prior
from psenet.proposal import Levels, bend, mean_costs
from psenet.runners import Runner
from psenet.space import WidthSpace
from psenet.widths import Widths
from synthetic import Additive, make_space, simulate_history

EXAMPLE = torch.zeros(1, 3, 8, 8)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 4, 1))


def _by_layer(widths: Widths, space: WidthSpace) -> float:
    """Milliseconds counted by hand on `make_space(3)`: MACs 16 * 3 a, 8 a b and 4 b c, of three speeds, and 0.5."""
    a, b, c = (widths[group.name] for group in space.groups)
    return 1e-3 * 16 * 3 * a + 3e-3 * 8 * a * b + 2e-4 * 4 * b * c + 0.02 * b + 0.5


def _all(space: WidthSpace) -> list[Widths]:
    rows = itertools.product(*(group.choices for group in space.groups))
    return space.from_array(np.array(list(rows)))


def _fitted(space: WidthSpace, truth: Callable[[Widths], float], num: int = 40) -> LatencyModel:
    settings = spread_settings(space, num, np.random.default_rng(0))
    return LatencyModel.fit(space, settings, [truth(widths) for widths in settings])


# Fitting --------------------------------------------------------------------------------------------------------------


def test_latencies_that_are_sums_of_the_parts_are_recovered_exactly():
    space = make_space(3)
    model = _fitted(space, lambda widths: _by_layer(widths, space))
    for widths in _all(space):
        assert model.predict(widths) == pytest.approx(_by_layer(widths, space), abs=1e-5)
    assert model.cv_error < 1e-5 and model.cv_max_error < 1e-4


def test_latency_that_follows_macs_alone_takes_the_plainest_features():
    space = make_space(3)
    rng = np.random.default_rng(1)
    model = _fitted(space, lambda widths: (0.4 + 1e-3 * space.macs(widths)) * rng.lognormal(sigma=0.03))
    assert model.features == "MACs"
    assert 0.01 < model.cv_error < 0.05  # the median of |N(0, 0.03)| is 0.02


def test_pure_noise_is_not_taken_for_knowledge():
    space = make_space(6)
    rng = np.random.default_rng(0)
    model = _fitted(space, lambda widths: rng.lognormal(sigma=1.0), num=60)
    assert model.cv_error > 0.35
    assert model.cv_max_error >= model.cv_error


@pytest.mark.parametrize("seed", range(3))
def test_more_channels_never_take_less_predicted_time(seed: int):
    space = make_space(5)
    rng = np.random.default_rng(seed)
    model = _fitted(space, lambda widths: rng.lognormal(sigma=0.5) * space.macs(widths) ** 0.7)
    one_NG, other_NG = (space.to_array([space.sample(rng) for _ in range(500)]) for _ in range(2))
    low_N, high_N = model.predict(np.minimum(one_NG, other_NG)), model.predict(np.maximum(one_NG, other_NG))
    assert (low_N <= model.predict(one_NG)).all() and (model.predict(one_NG) <= high_N).all()
    assert (low_N < high_N).any()


def test_a_setting_an_array_and_a_list_get_the_same_prediction():
    space = make_space(4)
    model = _fitted(space, lambda widths: 0.1 + space.params(widths) / 7)
    settings = [space.sample(np.random.default_rng(n)) for n in range(50)]
    singles = [model.predict(widths) for widths in settings]
    assert all(type(single) is float for single in singles)
    assert model.predict(settings).tolist() == model.predict(space.to_array(settings)).tolist() == singles


@pytest.mark.parametrize("latencies", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]]])
def test_latencies_that_are_not_one_for_each_setting_are_refused(latencies: list[Any]):
    space = make_space(2)
    with pytest.raises(InputError, match="one latency for each of at least two settings; got 2 settings"):
        LatencyModel.fit(space, [space.full(), space.smallest()], latencies)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_latencies_that_are_no_times_are_refused(bad: float):
    space = make_space(2)
    with pytest.raises(InputError, match="finite and above 0"):
        LatencyModel.fit(space, [space.full(), space.smallest()], [1.0, bad])


def test_widths_of_another_space_are_refused():
    space = make_space(2)
    rows = np.array([[2, 2], [8, 7]])
    with pytest.raises(InputError, match="7 is not a choice of group 'g1'"):
        LatencyModel.fit(space, rows, [1.0, 2.0])


# Which settings -------------------------------------------------------------------------------------------------------


def test_settings_are_different_and_spread_from_the_smallest_to_the_full():
    space = make_space(20)
    settings = spread_settings(space, 100, np.random.default_rng(0))
    assert len(set(settings)) == 100 and settings[:2] == [space.full(), space.smallest()]
    shares = np.sort(np.array([space.macs(widths) for widths in settings]) / space.macs(space.full()))
    counts, _ = np.histogram(shares, bins=5, range=(shares[0], 1))
    assert (counts >= 5).all()
    # Of uniform draws alone nine in ten would be in two fifths of the range.
    uniform = np.array([space.macs(space.sample(np.random.default_rng(n))) for n in range(100)])
    assert (uniform / space.macs(space.full()) < 0.6).mean() > 0.9


def test_a_small_space_gives_what_it_has():
    space = make_space(1)
    assert sorted(widths["g0"] for widths in spread_settings(space, 30, np.random.default_rng(0))) == [2, 4, 6, 8]


# Measuring ------------------------------------------------------------------------------------------------------------


def _measured(monkeypatch: pytest.MonkeyPatch, ms: Callable[[int], tuple[float, float]]) -> list[int]:
    """Replace the clock: measurement n gives what `ms(n)` says for the full model and the subnet."""
    numbers: list[int] = []

    def time_passes(passes: dict[str, Any], runner: Runner, *, num_runs: int, warmup: int) -> dict[str, psenet.Latency]:
        assert [run().shape[0] for run in passes.values()] == [runner.batch_size] * 2
        numbers.append(len(numbers))
        return {
            name: psenet.Latency(median_ms=value, q1_ms=0.9 * value, q3_ms=9.0, num_runs=num_runs)
            for name, value in zip(("full", "subnet"), ms(numbers[-1]), strict=True)
        }

    monkeypatch.setattr(latency_model, "time_passes", time_passes)
    return numbers


def test_a_slow_moment_of_the_machine_cancels_out(monkeypatch: pytest.MonkeyPatch):
    net = _net()
    space = psenet.trace(net, EXAMPLE, divisor=4)
    settings = spread_settings(space, 10, np.random.default_rng(3))

    def ms(number: int) -> tuple[float, float]:
        slower = 5.0 if number in (1, 4, 5) else 1.0
        return 2.0 * slower, 2.0 * slower * space.macs(settings[number]) / space.macs(space.full())

    done: list[tuple[int, int]] = []
    numbers = _measured(monkeypatch, ms)
    model = LatencyModel.measure(
        net,
        space,
        EXAMPLE,
        num_subnets=10,
        num_runs=3,
        seed=3,
        runner=Runner(num_threads=1, batch_size=3),
        progress=lambda count, total: done.append((count, total)),
    )
    assert len(numbers) == len(settings)
    assert done == [(count, len(settings)) for count in range(1, len(settings) + 1)]
    expected = [2.0 * space.macs(widths) / space.macs(space.full()) for widths in settings]
    np.testing.assert_allclose(model.latency_N, expected)
    assert model.predict(space.full()) == pytest.approx(2.0, rel=1e-4)
    assert model.cv_error < 1e-4


def test_a_measured_model_says_what_it_is_and_leaves_the_net_as_it_was():
    net = _net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    space = psenet.trace(net, EXAMPLE, divisor=4)
    model = LatencyModel.measure(net, space, EXAMPLE, num_subnets=10, num_runs=3, runner=Runner(batch_size=2))
    assert net.training and all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert 0 < model.predict(space.smallest()) <= model.predict(space.full()) < 1000
    assert model.runner == Runner(num_threads=torch.get_num_threads(), batch_size=2)
    assert f"by eager on cpu, threads {torch.get_num_threads()}, batch 2; fitted to 10 subnets by MACs" in repr(model)
    assert f"median {model.cv_error:.1%}, largest {model.cv_max_error:.1%}" in repr(model)


@pytest.mark.parametrize(("full_ms", "num_runs"), [(0.2, 25), (5.0, 20), (90.0, 7)])
def test_a_short_pass_is_measured_more_often(full_ms: float, num_runs: int, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []

    def time_passes(passes: dict[str, Any], runner: Runner, *, num_runs: int, warmup: int) -> dict[str, psenet.Latency]:
        seen.append((len(passes), num_runs))
        return dict.fromkeys(passes, psenet.Latency(full_ms, full_ms, full_ms, num_runs))

    monkeypatch.setattr(latency_model, "time_passes", time_passes)
    net = _net()
    LatencyModel.measure(net, psenet.trace(net, EXAMPLE), EXAMPLE, num_subnets=10)
    assert seen[0] == (1, 3) and set(seen[1:]) == {(2, num_runs)}


def test_too_few_subnets_are_refused():
    space = make_space(2)
    with pytest.raises(InputError, match="num_subnets must be at least 10; got 9"):
        LatencyModel.measure(nn.Identity(), space, EXAMPLE, num_subnets=9)


# Keeping --------------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_the_same(tmp_path: Path):
    space = make_space(3)
    model = _fitted(space, lambda widths: _by_layer(widths, space))
    model.save(tmp_path / "latency.npz")
    back = LatencyModel.load(tmp_path / "latency.npz", make_space(3))
    assert back.predict(_all(space)).tolist() == model.predict(_all(space)).tolist()
    assert repr(back) == repr(model) and back.runner == model.runner
    assert back.widths_NG.tolist() == model.widths_NG.tolist() and back.latency_N.tolist() == model.latency_N.tolist()


def test_a_model_of_another_space_is_refused(tmp_path: Path):
    space, other = make_space(3), make_space(3, choices=(2, 4, 8))
    model = _fitted(space, lambda widths: _by_layer(widths, space))
    model.save(tmp_path / "latency.npz")
    with pytest.raises(InputError, match="belongs to another width space"):
        LatencyModel.load(tmp_path / "latency.npz", other)
    with pytest.raises(InputError, match="was measured on another width space .* measure it on this one"):
        other.with_latency(model)


def test_a_model_of_another_input_size_is_refused(tmp_path: Path):
    net = _net()
    small, large = (psenet.trace(net, torch.zeros(1, 3, size, size)) for size in (8, 16))
    model = _fitted(small, lambda widths: float(small.macs(widths)), num=10)
    model.save(tmp_path / "latency.npz")
    assert small.digest() == large.digest()
    with pytest.raises(InputError, match="the input size differs; measure it at this one"):
        large.with_latency(model)
    with pytest.raises(InputError, match="the input size differs"):
        LatencyModel.load(tmp_path / "latency.npz", large)


def test_a_damaged_file_is_refused(tmp_path: Path):
    space, path = make_space(2), tmp_path / "latency.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="cannot be read; it is corrupt"):
        LatencyModel.load(path, space)
    _fitted(space, lambda widths: 1.0 + space.macs(widths), num=10).save(path)
    identity: dict[str, Any] = {"space_digest": space.digest(), "kind": "latency model", "version": 1}
    arrays = read_arrays(path, **identity)
    write_arrays(path, {**arrays, "weights": arrays["weights"][1:]}, **identity)
    with pytest.raises(InputError, match=r"latency.npz' is damaged: weights; measure it again"):
        LatencyModel.load(path, space)
    del arrays["errors"]
    write_arrays(path, arrays, **identity)
    with pytest.raises(InputError, match="damaged: errors"):
        LatencyModel.load(path, space)


# As a cost of the space -----------------------------------------------------------------------------------------------


@pytest.fixture
def timed() -> WidthSpace:
    space = make_space(4)
    return space.with_latency(_fitted(space, lambda widths: _four_groups_ms(widths)))


def _four_groups_ms(widths: Widths) -> float:
    """By hand on `make_space(4)`: the MACs of its second layer, the channels of the third, and a constant."""
    return 0.01 * 8 * widths["g0"] * widths["g1"] + 0.1 * widths["g2"] + 0.3


def test_a_space_with_latency_is_the_same_space_with_one_more_cost(timed: WidthSpace):
    plain = make_space(4)
    assert timed.digest() == plain.digest() and timed.groups == plain.groups
    assert timed.macs(timed.full()) == plain.macs(plain.full())
    assert timed.latency_ms(timed.smallest()) == pytest.approx(0.01 * 8 * 4 + 0.2 + 0.3, abs=1e-4)
    rows = timed.to_array([timed.full(), timed.smallest()])
    assert timed.latency_ms(rows).dtype == np.float64 and timed.latency_ms(rows).shape == (2,)
    with pytest.raises(InputError, match="not a choice"):
        timed.latency_ms(Widths({**timed.full(), "g0": 3}))


def _evaluated(space: WidthSpace, limits: Limits | Budget, prior: Prior | None, num: int) -> Sequence[Widths]:
    found = psenet.search(space, limits, Additive(space), prior=prior, num_evaluations=num, seed=1)
    return [evaluation.widths for evaluation in found.evaluated]


@pytest.mark.parametrize("share", ["30%", "50%", "80%"])
@pytest.mark.parametrize("more", [{}, {"macs": "60%"}])
def test_search_evaluates_nothing_above_a_latency_limit(timed: WidthSpace, share: str, more: dict[str, Any]):
    budget = Budget(latency_ms=share, **more)
    limits = budget.resolve(timed)
    assert limits.latency_ms is not None
    # The prior was fitted before latency was known.
    plain = make_space(4)
    history = simulate_history(plain, Additive(plain), seed=0, num=160, noise=0.1)
    for prior in (None, Prior.fit(history, plain)):
        evaluated = _evaluated(timed, budget, prior, 24)
        assert len(set(evaluated)) == 24
        for widths in evaluated:
            assert _four_groups_ms(widths) <= limits.latency_ms + 1e-4
            assert limits.macs is None or timed.macs(widths) <= limits.macs


def test_all_settings_inside_a_tight_latency_are_found(timed: WidthSpace):
    limit_ms = 1.2
    inside = {widths for widths in _all(timed) if timed.latency_ms(widths) <= limit_ms}
    assert {widths for widths in _all(timed) if _four_groups_ms(widths) <= limit_ms - 1e-4} <= inside
    assert 4 < len(inside) < 60
    assert set(_evaluated(timed, Budget(latency_ms=limit_ms), None, 100)) == inside


def test_draws_are_bent_until_about_half_of_them_land_inside_a_latency():
    space = make_space(12)
    timed = space.with_latency(_fitted(space, lambda widths: 0.2 + 1e-3 * space.macs(widths), num=60))
    limits = Budget(latency_ms="30%").resolve(timed)
    levels = Levels(timed)
    bent_GC = bend(levels, levels.uniform(), limits)
    share = mean_costs(levels, bent_GC[None], limits).max()
    assert 0.9 < share <= 0.985
    proposal = Prior.uniform(timed).proposal(limits)
    rng = np.random.default_rng(0)
    assert 0.3 < proposal.fits(proposal.draw(500, rng)).mean() < 0.9
    assert proposal.fits(proposal.repair(proposal.draw(500, rng), rng)).all()
    assert proposal.fits(proposal.grow(np.zeros(12, dtype=np.int64), rng)[None]).all()
