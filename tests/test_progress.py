"""The reporter of progress, with a clock and a stream of the test."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator

import pytest

from moondream_cv import progress
from moondream_cv.progress import Operation, StatusLine, showing_on
from tests.helpers.recording_display import Recorder


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def display() -> Iterator[Recorder]:
    recorder = Recorder()
    with showing_on(recorder):
        yield recorder


def test_fast_operations_show_nothing(clock: Clock, display: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), Operation("run", clock=clock) as operation:
        for done in range(20):
            clock.now += 0.099
            operation.update("Encoding image", done, 20, "crops")
    assert display.texts == []
    assert caplog.messages == []


def test_display_starts_after_2_seconds_and_is_cleared(clock: Clock, display: Recorder) -> None:
    with Operation("run", clock=clock) as operation:
        operation.update("Encoding image", 0.0, 9, "crops")
        clock.now += 2.0
        operation.update("Encoding image", 4.52, 9, "crops")
        assert display.texts == ["Encoding image: 4.5 of 9 crops, 2 s left"]
    assert display.texts[1:] == [""]


def test_display_is_refreshed_10_times_per_second(clock: Clock, display: Recorder) -> None:
    with Operation("run", clock=clock) as operation:
        for _ in range(2999):
            clock.now += 0.001
            operation.update("Decoding")
    assert 9 <= len(display.texts) - 1 <= 10  # in the third second


def test_details_are_computed_only_when_they_are_shown(clock: Clock, display: Recorder) -> None:
    calls: list[float] = []

    def detail() -> str:
        calls.append(clock.now)
        return "3 objects"

    with Operation("run", clock=clock) as operation:
        operation.update("Decoding", detail=detail)
        assert calls == []
        clock.now += 3
        operation.update("Decoding", detail=detail)
    assert display.texts == ["3 objects", ""]


def test_prefix_precedes_the_stage(clock: Clock, display: Recorder) -> None:
    with Operation("run", clock=clock) as operation:
        operation.prefix = lambda: "1 of 8 requests"
        clock.now += 3
        operation.update("Encoding image", 1, 9, "crops")
    assert display.texts[0] == "1 of 8 requests; encoding image: 1 of 9 crops"


@pytest.mark.parametrize(("seconds", "left"), [(0.5, ""), (10, ", 10 s left"), (200, ", 4 min left")])
def test_time_left_is_estimated_from_the_current_stage(
    clock: Clock, display: Recorder, seconds: float, left: str
) -> None:
    with Operation("run", clock=clock) as operation:
        clock.now += 50
        operation.update("Loading weights", 1.0, 3.0, "GB")
        clock.now += seconds
        operation.update("Loading weights", 2.0, 3.0, "GB")
    assert display.texts[-2] == f"Loading weights: 2.0 of 3.0 GB{left}"


def test_without_a_terminal_the_intervals_between_messages_double(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "moondream_cv.progress"), Operation("run", clock=clock) as operation:
        times = []
        for _ in range(1000):
            clock.now += 0.1
            count = len(caplog.messages)
            operation.update("Decoding", detail=lambda: "1 object")
            if len(caplog.messages) > count:
                times.append(round(clock.now - 100))
    assert times == [2, 5, 10, 20, 40, 80]
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_stages_are_logged_at_the_end(clock: Clock, display: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "moondream_cv.progress"), Operation("run on tiny", clock=clock) as operation:
        operation.update("Encoding image", 0, 9, "crops")
        clock.now += 3
        operation.update("Decoding")
        clock.now += 1
    assert caplog.messages == ["run on tiny took 4.0 s: Encoding image 3.0 s, Decoding 1.0 s"]


def test_other_threads_show_nothing_and_log_at_debug(
    clock: Clock, display: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        with Operation("run", clock=clock) as operation:
            clock.now += 3
            operation.update("Decoding")

    with caplog.at_level(logging.DEBUG, "moondream_cv.progress"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert display.texts == []
    assert caplog.messages[0] == "Decoding"
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


@pytest.mark.parametrize("is_enabled", [False, True])
def test_progress_can_be_turned_off(
    clock: Clock,
    display: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_enabled: bool,
) -> None:
    if is_enabled:
        monkeypatch.setenv("MOONDREAM_CV_PROGRESS", "0")
    with caplog.at_level(logging.DEBUG), Operation("run", is_enabled=is_enabled, clock=clock) as operation:
        clock.now += 3
        operation.update("Decoding")
    assert display.texts == []
    assert caplog.messages == []


def test_errors_of_a_display_turn_it_off(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Recorder):
        def show(self, text: str) -> None:
            super().show(text)
            raise BrokenPipeError

        def clear(self) -> None:
            raise ValueError("I/O operation on closed file")

    broken = Broken()
    with showing_on(broken), Operation("run", clock=clock) as operation:
        for _ in range(3):
            clock.now += 3
            operation.update("Decoding")
    assert broken.texts == ["Decoding"]
    with showing_on(broken), Operation("run", clock=clock) as operation:
        broken.show = broken.texts.append  # type: ignore[method-assign]
        clock.now += 3
        operation.update("Decoding")  # the error of `clear` follows
    closed = Terminal()
    closed.close()
    monkeypatch.setattr(progress.sys, "stderr", closed)
    with Operation("run", clock=clock) as operation:
        clock.now += 3
        operation.update("Decoding")


def test_terminal_shows_a_status_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with Operation("run", clock=clock) as operation:
        clock.now += 3
        operation.update("Decoding")
    assert stream.getvalue() == "\rDecoding\r\r        \r"


def test_dumb_terminal_gets_no_status_line(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    monkeypatch.setenv("TERM", "dumb")
    with caplog.at_level(logging.INFO, "moondream_cv.progress"), Operation("run", clock=clock) as operation:
        clock.now += 3
        operation.update("Decoding")
    assert stream.getvalue() == ""
    assert caplog.messages == ["Decoding"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a" * 200, "a" * 79),
        ("狗" * 200, "狗" * 39),  # two cells each
        ("é" * 10, "é" * 10),
        ("a\n\x1b[31m", "a\\n\\x1b[31m"),
    ],
)
def test_status_line_fits_the_terminal(text: str, shown: str) -> None:
    stream = Terminal()
    StatusLine(stream).show(text)
    assert stream.getvalue() == f"\r{shown}\r"


def test_shorter_text_overwrites_a_longer_one() -> None:
    stream = Terminal()
    line = StatusLine(stream)
    line.show("10 objects")
    line.show("cat")
    assert stream.getvalue() == "\r10 objects\r\rcat       \r"
