import copy
import json
import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psenet.cost import LinearForm, PeakCost, ProductCost
from psenet.errors import InputError
from psenet.space import ChannelGroup, Frozen, SpaceCosts, WidthSpace
from psenet.widths import Widths

_GROUPS = (
    ChannelGroup("stem", 16, (4, 8, 12, 16), ("stem", "norm", "body")),
    ChannelGroup("body", 24, (8, 16, 24), ("body", "head"), unit=4),
    ChannelGroup("head", 10, (3, 10), ("head", "out")),
)


def _space(groups: tuple[ChannelGroup, ...] = _GROUPS) -> WidthSpace:
    """A space without a model. One unit of the body is 4 channels, so 4 * units are its channels.

    MACs: 100 * 3 * stem + 7 * stem * body. Parameters: stem * body + 5 * head. Memory: the larger of 2 * stem + 10 and
    body + head.
    """
    three, one = LinearForm(3), LinearForm(1)
    stem, body, head = LinearForm(0, ((0, 1),)), LinearForm(0, ((1, 4),)), LinearForm(0, ((2, 1),))
    return WidthSpace(
        groups,
        SpaceCosts(
            macs=ProductCost([(100, three, stem), (7, stem, body)], 3),
            params=ProductCost([(1, stem, body), (5, head, one)], 3),
            memory=PeakCost([LinearForm(10, ((0, 2),)), LinearForm(0, ((1, 4), (2, 1)))], 3),
        ),
        frozen=(Frozen("out", "the model's output", 0.25),),
    )


_settings = st.builds(
    lambda stem, body, head: Widths({"stem": stem, "body": body, "head": head}),
    *(st.sampled_from(group.choices) for group in _GROUPS),
)


# Widths ---------------------------------------------------------------------------------------------------------------


def test_widths_are_a_mapping_from_group_to_channels():
    widths = Widths({"stem": 8, "body": 16})
    assert widths["stem"] == 8 and len(widths) == 2 and list(widths) == ["stem", "body"]
    assert dict(widths) == {"stem": 8, "body": 16} and "head" not in widths
    assert repr(widths) == "Widths({'stem': 8, 'body': 16})"


def test_equal_widths_are_equal_and_hash_alike_whatever_the_order():
    one, other = Widths({"stem": 8, "body": 16}), Widths({"body": 16, "stem": 8})
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert one != Widths({"stem": 8, "body": 24}) and one != Widths({"stem": 8})
    assert one != {"stem": 8, "body": 16}


def test_widths_cannot_be_changed():
    given_mapping = {"stem": 8}
    widths = Widths(given_mapping)
    given_mapping["stem"] = 4
    assert widths["stem"] == 8
    with pytest.raises(TypeError, match="does not support item assignment"):
        widths["stem"] = 4  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        widths.stem = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_widths_of_numpy_become_plain_integers():
    widths = Widths({"stem": np.int64(8)})  # pyright: ignore[reportArgumentType]
    assert type(widths["stem"]) is int and widths == Widths({"stem": 8})


@given(st.dictionaries(st.text(), st.integers(1, 10**6)))
def test_widths_survive_json_pickle_and_copies(mapping: dict[str, int]):
    widths = Widths(mapping)
    assert json.loads(widths.to_json()) == mapping
    for again in (Widths.from_json(widths.to_json()), pickle.loads(pickle.dumps(widths)), copy.deepcopy(widths)):
        assert again == widths and list(again) == list(mapping) and hash(again) == hash(widths)


@pytest.mark.parametrize("width", [0, -8, 2.5, True, "8", None, float("nan"), float("inf")], ids=repr)
def test_a_width_that_is_no_positive_integer_is_refused(width: object):
    words = f"a width is a positive integer for a group name; got 'stem': {width!r}"
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        Widths({"body": 16, "stem": width})  # pyright: ignore[reportArgumentType]


def test_a_group_name_that_is_no_string_is_refused():
    with pytest.raises(InputError, match="positive integer for a group name; got 3: 8"):
        Widths({3: 8})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "widths must be a JSON object of group name to width: Expecting property name"),
        ("", "widths must be a JSON object of group name to width: Expecting value"),
        ("[16, 8]", "widths must be a JSON object of group name to width; got list"),
        ("16", "widths must be a JSON object of group name to width; got int"),
        ('{"stem": "16"}', "a width is a positive integer for a group name; got 'stem': '16'"),
        ('{"stem": null}', "a width is a positive integer for a group name; got 'stem': None"),
        ('{"stem": Infinity}', "a width is a positive integer for a group name; got 'stem': inf"),
    ],
)
def test_text_that_is_not_widths_is_refused(text: str, words: str):
    with pytest.raises(InputError, match=re.escape(words)):
        Widths.from_json(text)


# Settings of a space --------------------------------------------------------------------------------------------------


def test_the_bounds_of_a_space_are_the_full_model_and_every_smallest_choice():
    assert _space().full() == Widths({"stem": 16, "body": 24, "head": 10})
    assert _space().smallest() == Widths({"stem": 4, "body": 8, "head": 3})


@pytest.mark.parametrize(
    ("keep_ratio", "expected"),
    [
        (1.0, (16, 24, 10)),
        (0.5, (8, 16, 3)),  # 12 lies between 8 and 16: the wider; 5 is nearer to 3 than to 10
        (0.625, (12, 16, 3)),  # 10 lies between 8 and 12: the wider
        (0.65, (12, 16, 10)),  # 6.5 lies between 3 and 10: the wider
        (0.01, (4, 8, 3)),
    ],
)
def test_a_uniform_setting_takes_the_nearest_choice_and_the_wider_of_two(
    keep_ratio: float, expected: tuple[int, int, int]
):
    assert tuple(_space().uniform(keep_ratio).values()) == expected


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, 1.01, float("nan")])
def test_a_uniform_setting_outside_the_model_is_refused(keep_ratio: float):
    with pytest.raises(InputError, match=f"keep_ratio must be above 0 and at most 1; got {keep_ratio}"):
        _space().uniform(keep_ratio)


def test_sampling_draws_every_choice_of_every_group_equally_often():
    rng = np.random.default_rng(0)
    drawn = [_space().sample(rng) for _ in range(3000)]
    for group in _GROUPS:
        counts = Counter(widths[group.name] for widths in drawn)
        assert set(counts) == set(group.choices)
        expected = 3000 / len(group.choices)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_sampling_is_the_generators_business_alone():
    first, again, other = ([_space().sample(rng) for _ in range(5)] for rng in map(np.random.default_rng, (3, 3, 4)))
    assert first == again != other


def test_sampling_below_a_ceiling_draws_every_choice_that_fits_and_no_other():
    rng = np.random.default_rng(0)
    ceiling = Widths({"stem": 8, "body": 24, "head": 3})
    drawn = [_space().sample(rng, ceiling) for _ in range(200)]
    assert {widths["stem"] for widths in drawn} == {4, 8}
    assert {widths["body"] for widths in drawn} == {8, 16, 24}
    assert {widths["head"] for widths in drawn} == {3}


@given(st.lists(_settings, max_size=8))
def test_settings_and_arrays_are_two_forms_of_one_thing(settings: list[Widths]):
    space = _space()
    array = space.to_array(settings)
    assert array.shape == (len(settings), 3) and array.dtype == np.int64
    assert array.tolist() == [[widths["stem"], widths["body"], widths["head"]] for widths in settings]
    assert space.from_array(array) == settings


def test_the_order_of_names_in_a_setting_does_not_matter():
    shuffled = Widths({"head": 3, "stem": 16, "body": 8})
    space = _space()
    space.check(shuffled)
    assert space.to_array([shuffled]).tolist() == [[16, 8, 3]] and space.units(shuffled) == (16, 2, 3)


def test_units_count_what_lives_and_dies_together():
    assert _space().units(Widths({"stem": 12, "body": 16, "head": 10})) == (12, 4, 10)


def test_a_space_counts_its_settings():
    assert _space().num_settings() == 4 * 3 * 2
    assert repr(_space()) == "WidthSpace(3 groups, 24 settings, 1 frozen)"


def test_the_digest_tells_spaces_apart():
    digest = _space().digest()
    assert re.fullmatch("[0-9a-f]{16}", digest) and digest == _space().digest()
    others = [
        (replace(_GROUPS[0], name="root"), *_GROUPS[1:]),
        (replace(_GROUPS[0], choices=(8, 16)), *_GROUPS[1:]),
        (_GROUPS[1], _GROUPS[0], _GROUPS[2]),
        _GROUPS[:2],
    ]
    assert len({digest, *(_space(groups).digest() for groups in others)}) == 5


# Refusals -------------------------------------------------------------------------------------------------------------


def test_all_offenders_of_a_setting_are_named_together():
    with pytest.raises(InputError) as caught:
        _space().check(Widths({"stem": 7, "body": 12, "tail": 3}))
    assert str(caught.value) == (
        "these widths are not of this space: no width for group 'head'; unknown group 'tail'; "
        "7 is not a choice of group 'stem' (choices: (4, 8, 12, 16)); "
        "12 is not a choice of group 'body' (choices: (8, 16, 24))"
    )


def test_a_setting_that_is_not_widths_is_refused():
    with pytest.raises(TypeError, match="expected psenet.Widths; got dict"):
        _space().check({"stem": 4, "body": 8, "head": 3})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("cost", ["macs", "params", "memory", "units"])
def test_the_cost_of_a_setting_of_another_space_is_refused(cost: str):
    with pytest.raises(InputError, match="7 is not a choice of group 'stem'"):
        getattr(_space(), cost)(Widths({"stem": 7, "body": 8, "head": 3}))


@pytest.mark.parametrize("cost", ["macs", "params", "memory"])
def test_the_costs_of_a_list_with_a_setting_of_another_space_are_refused(cost: str):
    space = _space()
    with pytest.raises(InputError, match="no width for group 'head'"):
        getattr(space, cost)([space.full(), Widths({"stem": 4, "body": 8})])
    with pytest.raises(InputError, match="12 is not a choice of group 'body'"):
        getattr(space, cost)([space.full(), Widths({"stem": 4, "body": 12, "head": 3})])


# Costs ----------------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_formulas_by_hand():
    space, widths = _space(), Widths({"stem": 8, "body": 16, "head": 3})
    assert space.macs(widths) == 100 * 3 * 8 + 7 * 8 * 16
    assert space.params(widths) == 8 * 16 + 5 * 3
    assert space.memory(widths) == max(2 * 8 + 10, 16 + 3)
    assert space.memory(space.full()) == max(2 * 16 + 10, 24 + 10)
    assert space.memory(Widths({"stem": 4, "body": 24, "head": 10})) == 24 + 10


@pytest.mark.parametrize("cost", ["macs", "params", "memory"])
@given(settings=st.lists(_settings, max_size=6))
def test_one_setting_a_list_and_an_array_cost_the_same(cost: str, settings: list[Widths]):
    space = _space()
    singles = [getattr(space, cost)(widths) for widths in settings]
    assert all(type(single) is int for single in singles)
    for many in (getattr(space, cost)(settings), getattr(space, cost)(space.to_array(settings))):
        assert many.dtype == np.int64 and many.shape == (len(settings),) and many.tolist() == singles
