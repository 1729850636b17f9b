"""Stop strings end a text at the same place however it is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.errors import UsageError
from freehold.formats.stops import StopStrings

TEXT = st.text(alphabet="ab\n", max_size=30)


@given(text=TEXT, stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3), data=st.data())
def test_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    matcher = StopStrings(stops)
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += matcher.feed(text[start:end])
        assert not any(stop in shown for stop in stops)
    shown += matcher.flush()
    found = [text.find(stop) for stop in stops if stop in text]
    assert matcher.stopped == bool(found)
    # Read from left to right, the stop string that is complete first ends the text.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("pieces", [["xabbx"], ["x", "a", "b", "b", "x"], ["xab", "bx"]])
def test_the_first_complete_one_counts(pieces: list[str]) -> None:
    matcher = StopStrings(["abb", "b"])
    assert "".join(matcher.feed(piece) for piece in pieces) == "xa"


def test_what_cannot_be_a_stop_is_not_held_back() -> None:
    matcher = StopStrings(["User:"])
    pieces = ("Hi. Us", "ed. User", "s. Use", "r: you")
    assert [matcher.feed(piece) for piece in pieces] == ["Hi. ", "Used. ", "Users. ", ""]
    assert matcher.stopped
    assert matcher.feed("more") == matcher.flush() == ""


def test_empty_strings_are_refused() -> None:
    with pytest.raises(UsageError, match="stop strings must not be empty"):
        StopStrings(["a", ""])
