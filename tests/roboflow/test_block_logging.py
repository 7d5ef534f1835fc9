"""Test the log of failures: one record per minute and message, with a traceback for unexpected errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from moondream_cv.errors import BackendError
from moondream_cv.requests import ErrorResult, Request
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    BLOCKS,
    CountingModel,
    assert_failed,
    make_engine,
    minimal_step,
    run_engine,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

NO_IMAGE = np.zeros((0, 0, 3), np.uint8)
LOGGER = "moondream_cv_blocks.results"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """Return a function that returns the records of the blocks since its last call."""
    caplog.set_level(logging.DEBUG, logger="moondream_cv_blocks")

    def take() -> list[logging.LogRecord]:
        records = [record for record in caplog.records if record.name == LOGGER]
        caplog.clear()
        return records

    return take


Log = Callable[[], list[logging.LogRecord]]


@pytest.mark.parametrize("block", BLOCKS)
def test_repeated_failure_of_a_stream_is_logged_once_per_minute(
    block: str, clock: SimpleNamespace, log: Log, bgr: np.ndarray
) -> None:
    engine = make_engine(workflow(minimal_step(block, model="$inputs.model"), parameters=["model"]))

    def frames(model: str, count: int) -> list[str]:
        """Run `count` frames, one per second, and return the logged messages."""
        for _ in range(count):
            clock.seconds += 1
            (outputs,) = run_engine(engine, NO_IMAGE if model == "tiny" else bgr, model=model)
            assert outputs["error_status"] is True
        return [record.getMessage() for record in log()]

    one, other = "moondream3", "moondream4"
    interval = {"track": 5}.get(block, 1)  # the track block logs failed keyframes only, which are 5 frames apart
    (message,) = frames(one, 50)
    assert message.startswith(f"moondream_cv/{block}: there is no model 'moondream3'")
    (message,) = frames(other, interval)
    assert "'moondream4'" in message
    (message,) = frames("tiny", 1)
    assert "no pixels" in message
    assert frames(one, interval) == []
    (message,) = frames(one, 20)  # more than a minute after the first record
    assert "'moondream3'" in message


def test_each_block_logs_its_failures(clock: SimpleNamespace, log: Log) -> None:
    steps = [minimal_step(block, name=block) for block in BLOCKS]
    engine = make_engine(workflow(*steps, outputs=[f"{block}.error_message" for block in BLOCKS]))
    for _ in range(3):
        engine.run(runtime_parameters={"image": NO_IMAGE})
    prefixes = sorted(record.getMessage().partition(":")[0] for record in log())
    assert prefixes == sorted(f"moondream_cv/{block}" for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("error", "expected"),
    [(BackendError("the server is down"), True), (ValueError("no such value"), True), (KeyError("a key"), False)],
    ids=lambda value: type(value).__name__,
)
def test_unexpected_errors_are_logged_with_a_traceback(
    block: str,
    error: Exception,
    expected: bool,
    clock: SimpleNamespace,
    log: Log,
    counting_model: CountingModel,
    bgr: np.ndarray,
) -> None:
    def fail(request: Request) -> ErrorResult:
        try:
            raise error
        except Exception as caught:
            return ErrorResult(caught)

    counting_model.make_result = fail
    (outputs,) = run_engine(make_engine(workflow(minimal_step(block)), counting_model), bgr)
    assert_failed(block, outputs, str(error))
    (record,) = log()
    assert record.levelno == (logging.WARNING if expected else logging.ERROR)
    if expected:
        assert not record.exc_info
    else:
        assert record.exc_info
        assert record.exc_info[1] is error
        assert record.exc_info[2] is not None


def test_number_of_remembered_messages_is_limited(clock: SimpleNamespace, log: Log) -> None:
    from moondream_cv_blocks import results as block_results

    engine = make_engine(workflow(minimal_step("caption", length="$inputs.length"), parameters=["length"]))
    small = np.zeros((8, 8, 3), np.uint8)
    for number in range(block_results.MAX_LOGGED_MESSAGES + 50):
        run_engine(engine, small, length=f"length {number}")
        assert len(block_results._logged_at) <= block_results.MAX_LOGGED_MESSAGES
    assert len(log()) == block_results.MAX_LOGGED_MESSAGES + 50  # all messages differ


def test_invalid_value_that_differs_per_frame_is_logged_once(
    clock: SimpleNamespace, log: Log, counting_model: CountingModel, moving: list[np.ndarray]
) -> None:
    """A misconfigured workflow passes detections as text; their repr differs for each frame."""
    query = minimal_step("query", question="Where is {it}?", parameters={"it": "$steps.found.predictions"})
    engine = make_engine(workflow(minimal_step("detect", name="found"), query), counting_model)
    for bgr in moving:
        (outputs,) = run_engine(engine, bgr)
        assert_failed("query", outputs, "parameters['it'] must be a string or a number, got Detections")
    assert len(log()) == 1
