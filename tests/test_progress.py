import pytest

from psenet.progress import progress_bar


def test_a_progress_bar_shows_what_is_done_and_the_note(capsys: pytest.CaptureFixture[str]):
    with progress_bar("searching", total=8, done=2) as advance:
        advance(5, "best 71.25")
    shown = capsys.readouterr()
    assert all(part in shown.out for part in ("searching", "5/8", "left", "best 71.25"))
    assert shown.err == ""


def test_a_progress_bar_starts_where_the_work_was_left(capsys: pytest.CaptureFixture[str]):
    with progress_bar("searching", total=8, done=2):
        pass
    assert "2/8" in capsys.readouterr().out


def test_a_hidden_progress_bar_prints_nothing(capsys: pytest.CaptureFixture[str]):
    with progress_bar("searching", total=8, show=False) as advance:
        advance(5, "best 71.25")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("show", [True, False])
def test_an_error_goes_through_and_the_next_bar_can_be_shown(show: bool, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt), progress_bar("first", total=2, show=show):
        raise KeyboardInterrupt
    with progress_bar("second", total=2) as advance:
        advance(2, "")
    assert "second" in capsys.readouterr().out
