"""The text ends where a stop string begins, however the text is divided into pieces."""

import itertools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.answer.stop_strings import StopFilter


def reference(text: str, stops: list[str]) -> str:
    """Slow reference: reads one more character at a time and checks whether a stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    text=st.text(alphabet="ab😀\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab😀\n", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 100), max_size=12),
)
@example(text="abcd", stops=["abcd", "bc"], cuts=[])
@example(text="aab", stops=["ab"], cuts=[1, 2])
def test_the_pieces_shown_add_up_to_the_text_before_the_first_complete_stop(text: Any, stops: Any, cuts: Any) -> None:
    shown = StopFilter(stops)
    total = "".join(shown.push(piece) for piece in pieces_of(text, cuts))
    total += shown.finish()
    assert total == reference(text, stops)
    assert shown.stopped == any(stop in text for stop in stops)


@given(text=st.text(alphabet="ab", max_size=30), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4)))
def test_nothing_is_held_back_that_cannot_begin_a_stop(text: Any, stops: Any) -> None:
    shown = StopFilter(stops)
    seen = ""
    for i, character in enumerate(text):
        seen += shown.push(character)
        if shown.stopped:
            break
        held = text[len(seen) : i + 1]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_passes_at_once_without_stops() -> None:
    shown = StopFilter()
    assert [shown.push("a"), shown.push(""), shown.push("b")] == ["a", "", "b"]


@pytest.mark.parametrize("later", ["more", "STOP"])
def test_nothing_comes_after_a_stop(later: str) -> None:
    shown = StopFilter(["STOP"])
    assert shown.push("before STOP after") == "before "
    assert shown.push(later) == ""
    assert shown.finish() == ""
