"""Calls that are given up after a while."""

from __future__ import annotations

import threading

import pytest

from moondream_cv.backends.deadlines import Callers


def test_a_call_gives_what_the_function_gives() -> None:
    callers = Callers()
    threads = {callers.call(threading.get_ident, 240) for _ in range(5)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    with pytest.raises(KeyError, match="x"):
        callers.call(lambda: {}["x"], 240)
    assert callers.call(threading.get_ident, 240) in threads
    callers.close()


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    callers, release, ended = Callers(), threading.Event(), threading.Event()

    def slow() -> None:
        release.wait(240)
        ended.set()

    first = callers.call(threading.get_ident, 240)
    with pytest.raises(TimeoutError, match=r"no answer within 0.01 s"):
        callers.call(slow, 0.01)
    assert callers.call(threading.get_ident, 240) != first
    release.set()
    assert ended.wait(240)
    callers.close()


def test_a_timeout_of_the_function_itself_is_its_own() -> None:
    def fail() -> None:
        raise TimeoutError("mine")

    callers = Callers()
    with pytest.raises(TimeoutError, match="mine"):
        callers.call(fail, 240)
    callers.close()


def test_threads_end_when_they_are_no_longer_needed() -> None:
    callers = Callers()
    thread = callers.call(threading.current_thread, 240)
    callers.close()
    thread.join(240)
    assert not thread.is_alive()
    late = callers.call(threading.current_thread, 240)  # a call that was under way while it closed
    late.join(240)
    assert not late.is_alive()
