import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toys import make_net, make_space

import psenet
from psenet.budget import Budget
from psenet.errors import InputError
from psenet.history import History
from psenet.space import WidthSpace
from psenet.training import TrainConfig, make_strategy, strategy
from psenet.training.steps import train_distilled, train_on_both_sides, train_together
from psenet.training.strategies import _STRATEGIES, SinglePathStrategy
from psenet.widths import Widths

_NUM_STEPS = 600


@pytest.fixture(scope="module")
def space() -> WidthSpace:
    return make_space(make_net())


@pytest.fixture(scope="module")
def steps(space: WidthSpace) -> list[list[Widths]]:
    chosen = make_strategy("parallel", space, num_subnets=4, seed=0)
    return [chosen.next_widths() for _ in range(_NUM_STEPS)]


def _ceilings(space: WidthSpace) -> list[Widths]:
    """The five ceilings, counted by hand from (4, 8, 12, 16) and (8, 12, 16, 20, 24); the wider one of two."""
    return [
        Widths(dict(zip((group.name for group in space.groups), row, strict=True)))
        for row in ((8, 12), (12, 16), (12, 20), (16, 20), (16, 24))
    ]


def _lies_below(widths: Widths, ceiling: Widths) -> bool:
    return all(widths[name] <= ceiling[name] for name in ceiling)


# Parallel -------------------------------------------------------------------------------------------------------------


def test_a_parallel_step_has_as_many_subnets_as_asked_for_and_all_are_of_the_space(
    space: WidthSpace, steps: list[list[Widths]]
):
    for widths in steps:
        assert len(widths) == 4
        for setting in widths:
            space.check(setting)


def test_a_step_at_full_width_has_the_full_network_first_and_the_others_vary(
    space: WidthSpace, steps: list[list[Widths]]
):
    at_full = [widths for widths in steps if space.full() in widths]
    assert all(widths[0] == space.full() for widths in at_full)
    # Whatever a lower ceiling would not hold comes with the full network.
    lower = _ceilings(space)[:-1]
    for widths in steps:
        if any(not any(_lies_below(setting, ceiling) for ceiling in lower) for setting in widths):
            assert widths[0] == space.full()
    assert len({setting for widths in at_full for setting in widths[1:]}) == 20  # every setting there is


def test_the_subnets_of_a_step_lie_below_one_ceiling(space: WidthSpace, steps: list[list[Widths]]):
    lower = _ceilings(space)[:-1]
    for widths in steps:
        if space.full() not in widths:
            assert any(all(_lies_below(setting, ceiling) for setting in widths) for ceiling in lower)


def test_a_step_at_the_lowest_ceiling_has_the_smallest_network_first():
    # One group of 4 and 8 channels: a step at the lower ceiling can only have width 4, at the upper 8 comes first.
    space = make_space(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 3)))
    assert [group.choices for group in space.groups] == [(4, 8)]
    chosen = make_strategy("parallel", space, num_subnets=3, seed=1)
    steps = [chosen.next_widths() for _ in range(200)]
    firsts = Counter(widths[0] for widths in steps)
    assert set(firsts) == {space.full(), space.smallest()}
    assert all(set(widths) == {space.smallest()} for widths in steps if widths[0] == space.smallest())


def test_the_smallest_network_is_trained_at_the_lowest_ceiling(space: WidthSpace):
    # With one subnet a step, the lowest ceiling gives the smallest net alone, and the highest the full one alone.
    chosen = make_strategy("parallel", space, num_subnets=1, seed=0)
    counts = Counter(chosen.next_widths()[0] for _ in range(_NUM_STEPS))
    middle = _ceilings(space)[1:-1]
    # Uniform draws below the three middle ceilings meet the smallest with 1/9, 1/12 and 1/16.
    by_chance = 0.15 * sum(1 / n for n in (9, 12, 16))
    _assert_share(counts[space.smallest()], 0.15 + by_chance)
    _assert_share(counts[space.full()], 0.4)
    assert all(_lies_below(setting, middle[-1]) for setting in counts if setting != space.full())


def _assert_share(count: int, share: float) -> None:
    spread = math.sqrt(share * (1 - share) / _NUM_STEPS)
    assert abs(count / _NUM_STEPS - share) < 4 * spread


def test_two_of_five_steps_are_at_full_width_and_the_rest_shared_equally(space: WidthSpace):
    # With many subnets a step, their widest members show the ceiling.
    chosen = make_strategy("parallel", space, num_subnets=40, seed=3)
    tops: Counter[Widths] = Counter()
    for _ in range(_NUM_STEPS):
        widths = chosen.next_widths()
        tops[Widths({name: max(setting[name] for setting in widths) for name in space.full()})] += 1
    assert set(tops) == set(_ceilings(space))
    *lower, full = _ceilings(space)
    _assert_share(tops[full], 0.4)
    for ceiling in lower:
        _assert_share(tops[ceiling], 0.15)


# Sandwich -------------------------------------------------------------------------------------------------------------


def test_a_sandwich_is_the_full_the_smallest_and_two_random_networks(space: WidthSpace):
    chosen = make_strategy("sandwich", space, num_subnets=8, seed=0)
    steps = [chosen.next_widths() for _ in range(300)]
    assert all(len(widths) == 4 and widths[:2] == [space.full(), space.smallest()] for widths in steps)
    counts = Counter(setting for widths in steps for setting in widths[2:])
    assert len(counts) == 20  # every setting of the space
    assert max(abs(count / 600 - 1 / 20) for count in counts.values()) < 4 * math.sqrt(1 / 20 / 600)


# Bilateral and single-path --------------------------------------------------------------------------------------------

_COMPLEMENTS = {4: 16, 8: 12, 12: 8, 16: 4}, {8: 24, 12: 20, 16: 16, 20: 12, 24: 8}
"""Of (4, 8, 12, 16) and (8, 12, 16, 20, 24) channels."""


def test_a_bilateral_step_is_a_random_subnet_and_its_complement(space: WidthSpace):
    chosen = make_strategy("bilateral", space, num_subnets=8, seed=0)
    first, second = (group.name for group in space.groups)
    counts: Counter[Widths] = Counter()
    for _ in range(_NUM_STEPS):
        widths, complement = chosen.next_widths()
        assert complement == Widths({first: _COMPLEMENTS[0][widths[first]], second: _COMPLEMENTS[1][widths[second]]})
        space.check(complement)
        counts[widths] += 1
    _assert_uniform(counts, space)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_complement_of_the_full_net_is_the_smallest(num_groups: int):
    layers = [torch.nn.Conv2d(8 if number else 3, 8, 1) for number in range(num_groups)]
    space = make_space(torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 2, 1)))
    assert [group.choices for group in space.groups] == [(4, 8)] * num_groups
    chosen = make_strategy("bilateral", space, seed=1)
    for _ in range(50):
        widths, complement = chosen.next_widths()
        assert list(complement) == list(widths) and all(widths[name] + complement[name] == 12 for name in widths)
        assert (widths == space.full()) == (complement == space.smallest())


def test_a_single_path_step_is_one_uniformly_random_subnet(space: WidthSpace):
    chosen = make_strategy("single-path", space, num_subnets=8, seed=0)
    steps = [chosen.next_widths() for _ in range(_NUM_STEPS)]
    assert all(len(widths) == 1 for widths in steps)
    _assert_uniform(Counter(widths[0] for widths in steps), space)


def _assert_uniform(counts: Counter[Widths], space: WidthSpace) -> None:
    assert len(counts) == 20  # every setting of the space
    for setting, count in counts.items():
        space.check(setting)
        _assert_share(count, 1 / 20)


# All ------------------------------------------------------------------------------------------------------------------


def test_each_strategy_has_its_passes(space: WidthSpace):
    functions = {"parallel": train_together, "single-path": train_together, "sandwich": train_distilled}
    for name, train in {**functions, "bilateral": train_on_both_sides}.items():
        assert make_strategy(name, space).train is train


@pytest.mark.parametrize("name", ["parallel", "steered", "sandwich", "bilateral", "single-path"])
def test_the_seed_alone_decides_the_sequence(space: WidthSpace, name: str):
    def first(seed: int) -> list[list[Widths]]:
        chosen = make_strategy(name, space, seed=seed)
        return [chosen.next_widths() for _ in range(5)]

    np.random.seed(1)  # noqa: NPY002 - global generators must not matter
    one = first(3)
    torch.manual_seed(5)
    assert first(3) == one
    assert first(4) != one


@pytest.mark.parametrize("name", ["parallel", "steered", "sandwich", "bilateral", "single-path"])
def test_a_state_continues_the_sequence_through_a_file(space: WidthSpace, tmp_path: Any, name: str):
    original, restored = make_strategy(name, space, seed=3), make_strategy(name, space, seed=77)
    for _ in range(5):
        original.next_widths()
    torch.save(original.state_dict(), tmp_path / "state.pt")
    ahead = [original.next_widths() for _ in range(5)]
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [restored.next_widths() for _ in range(5)] == ahead


@pytest.mark.parametrize("name", ["parallel", "steered", "sandwich", "bilateral", "single-path"])
def test_a_state_does_not_move_with_its_strategy(space: WidthSpace, name: str):
    chosen = make_strategy(name, space, seed=3)
    state = chosen.state_dict()
    first = chosen.next_widths()
    chosen.load_state_dict(state)
    assert chosen.next_widths() == first


# The registry ---------------------------------------------------------------------------------------------------------


def test_an_unknown_strategy_is_named_with_the_known_ones(space: WidthSpace):
    with pytest.raises(
        InputError,
        match=r"unknown strategy 'paralel'; there are \['bilateral', 'parallel', 'sandwich', 'single",
    ):
        make_strategy("paralel", space)


@pytest.mark.parametrize("num_subnets", [0, -2])
def test_less_than_one_subnet_is_refused(space: WidthSpace, num_subnets: int):
    with pytest.raises(InputError, match=f"num_subnets must be at least 1; got {num_subnets}"):
        make_strategy("parallel", space, num_subnets=num_subnets)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="strategy 'parallel' is registered already"):
        strategy("parallel")(object)


def test_a_registered_strategy_is_built_by_its_name(space: WidthSpace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psenet.training.strategies._STRATEGIES", dict(_STRATEGIES))

    @strategy("one at random")
    class OneAtRandom:
        train = staticmethod(train_together)

        def __init__(self, space: WidthSpace, num_subnets: int, rng: np.random.Generator) -> None:
            self.given = (space, num_subnets)
            self._rng = rng

        def next_widths(self) -> list[Widths]:
            return [self.given[0].sample(self._rng)]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    chosen: Any = make_strategy("one at random", space, num_subnets=5, seed=2)
    assert chosen.given == (space, 5)
    assert chosen.next_widths() == [space.sample(np.random.default_rng(2))]


# Steering -------------------------------------------------------------------------------------------------------------


def _history_that_likes(space: WidthSpace, group: int, num: int = 4000) -> History:
    """Visits whose loss falls with the width of one group, and with that of no other beyond what it costs."""
    rng, history = np.random.default_rng(0), History(space)
    for step in range(num // 8):
        widths = [space.sample(rng) for _ in range(8)]
        shares_N = space.to_array(widths)[:, group] / space.groups[group].size
        history.append(step, widths, torch.from_numpy(2.0 - 0.5 * shares_N + 0.05 * rng.normal(size=8)))
    return history


def _mean_shares(space: WidthSpace, steps: list[list[Widths]]) -> np.ndarray:
    sizes = np.array([group.size for group in space.groups])
    return np.mean([space.to_array(step) / sizes for step in steps], axis=(0, 1))


def test_every_second_subnet_of_a_steered_step_has_widths_that_did_well(wide_space: WidthSpace):
    chosen: Any = make_strategy("steered", wide_space, seed=0)
    chosen.learn(_history_that_likes(wide_space, group=2))
    steps = [chosen.next_widths() for _ in range(200)]
    own, steered = (_mean_shares(wide_space, [step[first::2] for step in steps]) for first in (0, 1))
    others = np.array([0, 1, 3, 4, 5])
    assert steered[2] > own[2] + 0.05 and (steered[others] < own[others] + 0.02).all()
    for step in steps:
        assert any(all(_lies_below(setting, ceiling) for setting in step) for ceiling in chosen.ceilings)


def test_steered_subnets_cost_about_as_much_as_the_others(wide_space: WidthSpace):
    chosen: Any = make_strategy("steered", wide_space, seed=0)
    chosen.learn(_history_that_likes(wide_space, group=2))
    steps = [chosen.next_widths()[2:] for _ in range(300)]
    own, steered = (_shares(wide_space, [step[first::2] for step in steps]).mean() for first in (0, 1))
    assert steered == pytest.approx(own, rel=0.1)


def test_before_it_has_learned_a_steered_strategy_is_the_parallel_one(wide_space: WidthSpace):
    chosen: Any = make_strategy("steered", wide_space, seed=4)
    chosen.learn(_history_that_likes(wide_space, group=0, num=80))
    plain = make_strategy("parallel", wide_space, seed=4)
    assert [chosen.next_widths() for _ in range(20)] == [plain.next_widths() for _ in range(20)]


def test_what_was_learned_is_part_of_the_state(wide_space: WidthSpace, tmp_path: Any):
    chosen: Any = make_strategy("steered", wide_space, seed=4)
    chosen.learn(_history_that_likes(wide_space, group=1))
    torch.save(chosen.state_dict(), tmp_path / "state.pt")
    restored = make_strategy("steered", wide_space, seed=5)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [restored.next_widths() for _ in range(5)] == [chosen.next_widths() for _ in range(5)]


def test_training_tells_a_learning_strategy_what_it_has_seen(space: WidthSpace):
    told: list[int] = []

    class Noting(SinglePathStrategy):
        learns_every = 3

        def learn(self, history: History) -> None:
            told.append(len(history))

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 4, 2))
    own = psenet.trace(net, torch.zeros(1, 3, 4, 4), divisor=2)
    loader = DataLoader(TensorDataset(torch.randn(16, 3, 4, 4), torch.arange(16) % 2), batch_size=2)
    psenet.train_supernet(
        psenet.Supernet(net, own),
        loader,
        strategy=Noting(own, 1, np.random.default_rng(0)),
        config=TrainConfig(epochs=1),
        show_progress=False,
    )
    assert told == [3, 6]


# Focus ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_space() -> WidthSpace:
    """Six groups of sixteen widths: enough for costs to spread around their mean."""
    layers = [torch.nn.Conv2d(3 if number == 0 else 64, 64, 3, padding=1) for number in range(6)]
    return psenet.trace(torch.nn.Sequential(*layers, torch.nn.Conv2d(64, 4, 1)), torch.zeros(1, 3, 8, 8), divisor=4)


def _shares(space: WidthSpace, steps: list[list[Widths]]) -> np.ndarray:
    return space.macs([widths for step in steps for widths in step]) / space.macs(space.full())


@pytest.mark.parametrize(("percent", "num_ceilings"), [(20, 5), (45, 3), (97, 1)])
def test_a_focus_draws_subnets_that_cost_about_as_much_as_it_allows(
    wide_space: WidthSpace, percent: int, num_ceilings: int
):
    # Ceilings of 1/2, 5/8, 3/4, 7/8 and 1 of the widths cost about their squares: .25, .39, .56, .77 and 1.
    chosen: Any = make_strategy("parallel", wide_space, num_subnets=8, seed=0, focus=Budget(macs=f"{percent}%"))
    steps = [chosen.next_widths() for _ in range(300)]
    assert len(chosen.ceilings) == num_ceilings
    shares = _shares(wide_space, [[*step[1:]] for step in steps])
    assert abs(np.median(shares) - percent / 100) < 0.07 * percent / 100 + 0.02
    assert np.mean(np.abs(shares - percent / 100) < 0.25 * percent / 100) > 0.6
    for step in steps:
        assert len(step) == 8
        assert any(all(_lies_below(setting, ceiling) for setting in step) for ceiling in chosen.ceilings)


def test_with_a_focus_one_step_in_five_has_the_full_network(wide_space: WidthSpace):
    chosen = make_strategy("parallel", wide_space, num_subnets=4, seed=1, focus=Budget(macs="40%"))
    _assert_share(sum(wide_space.full() in chosen.next_widths() for _ in range(_NUM_STEPS)), 0.2)


def test_a_focus_may_be_on_parameters_and_in_absolute_numbers(wide_space: WidthSpace):
    limits = Budget(params="30%").resolve(wide_space)
    chosen = make_strategy("parallel", wide_space, num_subnets=8, seed=1, focus=limits)
    drawn = [widths for _ in range(200) for widths in chosen.next_widths()[1:]]
    assert limits.params is not None
    assert abs(np.median(wide_space.params(drawn)) / limits.params - 1) < 0.1


def test_the_sequence_of_a_focused_strategy_continues_from_its_state(wide_space: WidthSpace):
    build = partial(make_strategy, "parallel", wide_space, focus=Budget(macs="40%"))
    original, restored = build(seed=3), build(seed=4)
    original.next_widths()
    restored.load_state_dict(original.state_dict())
    assert [restored.next_widths() for _ in range(3)] == [original.next_widths() for _ in range(3)]


@pytest.mark.parametrize("name", ["sandwich", "bilateral", "single-path"])
def test_only_the_parallel_strategy_has_a_focus(space: WidthSpace, name: str):
    with pytest.raises(InputError, match=f"only the parallel strategy can focus on a budget; got '{name}'"):
        make_strategy(name, space, focus=Budget(macs="50%"))


def test_a_focus_that_no_subnet_reaches_is_refused(space: WidthSpace):
    with pytest.raises(InputError, match="cannot be reached"):
        make_strategy("parallel", space, focus=Budget(macs="1%"))
