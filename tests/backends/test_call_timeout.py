"""Calls with a time limit."""

from __future__ import annotations

import threading

import pytest

from moondream_cv.backends.call_timeout import TimeoutExecutor


def test_call_returns_the_result_and_reuses_the_thread() -> None:
    executor = TimeoutExecutor()
    threads = {executor.call(threading.get_ident, 240) for _ in range(5)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    with pytest.raises(KeyError, match="x"):
        executor.call(lambda: {}["x"], 240)
    assert executor.call(threading.get_ident, 240) in threads
    executor.close()


def test_call_that_exceeds_the_timeout_is_abandoned() -> None:
    executor, release, ended = TimeoutExecutor(), threading.Event(), threading.Event()

    def slow() -> None:
        release.wait(240)
        ended.set()

    first = executor.call(threading.get_ident, 240)
    with pytest.raises(TimeoutError, match=r"no result within 0.01 s"):
        executor.call(slow, 0.01)
    assert executor.call(threading.get_ident, 240) != first
    release.set()
    assert ended.wait(240)
    executor.close()


def test_timeout_error_of_the_function_is_raised() -> None:
    def fail() -> None:
        raise TimeoutError("mine")

    executor = TimeoutExecutor()
    with pytest.raises(TimeoutError, match="mine"):
        executor.call(fail, 240)
    executor.close()


def test_close_stops_threads() -> None:
    executor = TimeoutExecutor()
    thread = executor.call(threading.current_thread, 240)
    executor.close()
    thread.join(240)
    assert not thread.is_alive()
    late = executor.call(threading.current_thread, 240)  # a call that was under way while it closed
    late.join(240)
    assert not late.is_alive()
