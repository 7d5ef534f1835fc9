"""Stop strings end an answer before their first occurrence, however the text is split."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.stop_strings import StopStringMatcher
from moondream_cv.requests import Query, QueryResult, Settings

QUESTION = "What is this?"
SAMPLED = Settings(temperature=1.0, top_p=0.95, max_tokens=40, seed=3)


def expected(text: str, stop: list[str]) -> str:
    """Return the text before the stop string that is completed first."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_emitted_text_never_contains_the_start_of_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    matcher, emitted = StopStringMatcher(stop), ""
    text = ""
    for character in "".join(pieces):  # one at a time, so that the first complete stop string is unambiguous
        text += character
        new, stopped = matcher.add(character)
        emitted += new
        assert expected(text, stop).startswith(emitted)
        if stopped:
            break
    else:
        emitted += matcher.flush()
    assert emitted == expected("".join(pieces), stop)


def test_pending_text_is_searched_but_not_emitted() -> None:
    matcher = StopStringMatcher(["cat."])
    assert matcher.add("a ", "ca") == ("a ", False)
    assert matcher.add("", "cat") == ("", False)
    assert matcher.add("", "cat.") == ("", True)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_engine_stops_at_a_stop_string(model: LocalModel, length: int) -> None:
    (whole,) = model.run([Query(None, QUESTION, settings=SAMPLED)])
    assert isinstance(whole, QueryResult)
    for start in range(0, len(whole.answer) - length, 5):
        stop = whole.answer[start : start + length]
        request = Query(None, QUESTION, settings=SAMPLED, stop=stop)  # type: ignore[arg-type]
        (result,) = model.run([request])
        assert isinstance(result, QueryResult)
        assert (result.answer, result.truncated) == (whole.answer[: whole.answer.index(stop)], False)
        assert "".join(model.stream(request)) == result.answer


def test_stop_strings_do_not_end_the_reasoning(model: LocalModel) -> None:
    plain = Query(None, QUESTION, True, settings=SAMPLED)
    (whole,) = model.run([plain])
    assert isinstance(whole, QueryResult)
    assert whole.reasoning is not None
    letter = next(c for c in whole.reasoning.text if c.isalpha() and c in whole.answer)
    (result,) = model.run([Query(None, QUESTION, True, settings=SAMPLED, stop=(letter,))])
    assert isinstance(result, QueryResult)
    assert (result.reasoning, result.answer) == (whole.reasoning, whole.answer[: whole.answer.index(letter)])


def test_an_absent_stop_string_changes_nothing(model: LocalModel) -> None:
    plain, with_stop = (model.run([Query(None, QUESTION, settings=SAMPLED, stop=stop)]) for stop in ((), ("#!#",)))
    assert plain == with_stop


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (("a", "b", "c", "d", "e"), "at most 4 strings, got 5"),
        ("", "1 to 256 characters, got 0"),
        (("x" * 257,), "1 to 256 characters, got 257"),
        ((1,), "string or a sequence of strings, got 1"),
    ],
)
def test_invalid_stop_strings_are_rejected(stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Query(None, QUESTION, stop=stop)
