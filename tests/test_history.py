from pathlib import Path

import numpy as np
import pytest
import torch

from psenet.cost import LinearForm, PeakCost, ProductCost
from psenet.errors import InputError
from psenet.history import History
from psenet.space import ChannelGroup, SpaceCosts, WidthSpace
from psenet.widths import Widths


def make_space(name: str = "b") -> WidthSpace:
    groups = [ChannelGroup("a", 8, (4, 8), ("a",)), ChannelGroup(name, 6, (2, 4, 6), (name,))]
    costs = SpaceCosts(
        macs=ProductCost([(1, LinearForm(0, ((0, 1),)), LinearForm(0, ((1, 1),)))], 2),
        params=ProductCost([], 2),
        memory=PeakCost([], 2),
    )
    return WidthSpace(groups, costs)


@pytest.fixture
def history() -> History:
    history = History(make_space())
    history.append(0, [Widths({"a": 8, "b": 2}), Widths({"b": 6, "a": 4})], torch.tensor([2.5, float("nan")]))
    history.append(3, [Widths({"a": 4, "b": 4})], torch.tensor([1.25], dtype=torch.float64, requires_grad=True))
    return history


def check_content(history: History) -> None:
    assert len(history) == 3
    assert history.steps.tolist() == [0, 0, 3]
    assert history.widths.tolist() == [[8, 2], [4, 6], [4, 4]]
    assert history.losses[[0, 2]].tolist() == [2.5, 1.25] and np.isnan(history.losses[1])
    assert (history.steps.dtype, history.widths.dtype, history.losses.dtype) == (np.int64, np.int64, np.float64)


def test_visits_come_back_in_order(history: History):
    check_content(history)


def test_visits_can_be_added_after_reading(history: History):
    check_content(history)
    history.append(4, [Widths({"a": 8, "b": 6})], torch.tensor([0.5]))
    assert len(history) == 4
    assert history.steps.tolist() == [0, 0, 3, 4]
    assert history.widths[-1].tolist() == [8, 6]
    assert history.losses[-1] == 0.5


def test_a_record_does_not_follow_the_callers_tensor():
    history = History(make_space())
    losses = torch.tensor([1.0])
    history.append(0, [Widths({"a": 8, "b": 2})], losses)
    losses.zero_()
    assert history.losses.tolist() == [1.0]


def test_appending_reads_no_value_of_the_tensor():
    # A meta tensor has no values: reading one, as a GPU synchronisation would, raises.
    history = History(make_space())
    history.append(0, [Widths({"a": 8, "b": 2})], torch.zeros(1, device="meta"))
    assert len(history) == 1


def test_there_is_one_loss_for_each_subnet():
    with pytest.raises(InputError, match=r"expected losses of shape \(1,\), one a subnet; got \(2,\)"):
        History(make_space()).append(0, [Widths({"a": 8, "b": 2})], torch.zeros(2))
    with pytest.raises(TypeError, match="losses must be a tensor; got list"):
        History(make_space()).append(0, [Widths({"a": 8, "b": 2})], [1.0])  # pyright: ignore[reportArgumentType]


def test_saving_and_loading_keeps_everything(history: History, tmp_path: Path):
    history.save(tmp_path / "history.npz")
    check_content(History.load(tmp_path / "history.npz", make_space()))


def test_an_empty_history_can_be_kept(tmp_path: Path):
    History(make_space()).save(tmp_path / "history.npz")
    assert len(History.load(tmp_path / "history.npz", make_space())) == 0


def test_a_state_dict_of_plain_tensors_restores_everything(history: History, tmp_path: Path):
    torch.save(history.state_dict(), tmp_path / "state.pt")
    restored = History(make_space())
    restored.append(9, [Widths({"a": 8, "b": 2})], torch.ones(1))
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    check_content(restored)


def test_a_state_that_does_not_fit_is_refused(history: History):
    state = history.state_dict()
    with pytest.raises(InputError, match="the checkpoint's history lacks losses"):
        History(make_space()).load_state_dict({name: state[name] for name in ("steps", "widths")})
    with pytest.raises(InputError, match=r"must hold steps \(N,\), widths \(N, 2\) and losses \(N,\)"):
        History(make_space()).load_state_dict(state | {"losses": torch.zeros(2)})
    with pytest.raises(InputError, match="holds widths of group 'b' that are not its choices"):
        History(make_space()).load_state_dict(state | {"widths": torch.full((3, 2), 8)})


def test_a_history_of_another_space_is_refused(history: History, tmp_path: Path):
    history.save(tmp_path / "history.npz")
    with pytest.raises(InputError, match=r"the history '.*history.npz' belongs to another width space"):
        History.load(tmp_path / "history.npz", make_space("c"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"the history '.*nowhere.npz' does not exist"):
        History.load(tmp_path / "nowhere.npz", make_space())


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "plain array", "pickle"])
def test_a_corrupt_file_is_named(history: History, tmp_path: Path, damage: str):
    path = tmp_path / "history.npz"
    history.save(path)
    whole = path.read_bytes()
    if damage == "plain array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "pickle":
        with path.open("wb") as file:
            np.savez(file, steps=np.array([{"a": 1}], dtype=object))
    else:
        middle = whole.index(b"steps.npy") + 40
        flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 40]) + whole[middle + 40 :]
        path.write_bytes({"cut": whole[:-30], "flipped": flipped, "text": b"steps: 1", "empty": b""}[damage])
    with pytest.raises(InputError, match=r"the history '.*history.npz' cannot be read; it is corrupt"):
        History.load(path, make_space())


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    np.savez(tmp_path / "other.npz", numbers=np.zeros(3))
    with pytest.raises(InputError, match="must be a psenet history of version 1; got None of version None"):
        History.load(tmp_path / "other.npz", make_space())
