"""What blocks log of failures: once a minute, with a traceback where it was not expected."""

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
    Looks,
    block_step,
    check_nothing,
    engine_of,
    results,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

NO_IMAGE = np.zeros((0, 0, 3), np.uint8)
OUR_LOG = "moondream_cv_blocks.results"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """What the blocks have logged since the last call."""
    caplog.set_level(logging.DEBUG, logger="moondream_cv_blocks")

    def taken() -> list[logging.LogRecord]:
        records = [record for record in caplog.records if record.name == OUR_LOG]
        caplog.clear()
        return records

    return taken


Log = Callable[[], list[logging.LogRecord]]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_failure_of_a_stream_is_logged_once_a_minute(
    block: str, now: SimpleNamespace, log: Log, bgr: np.ndarray
) -> None:
    engine = engine_of(workflow(block_step(block, model="$inputs.model"), parameters=["model"]))

    def frames(model: str, count: int) -> list[str]:
        """What is logged of so many, of which one comes each second."""
        for _ in range(count):
            now.seconds += 1
            (outputs,) = results(engine, NO_IMAGE if model == "tiny" else bgr, model=model)
            assert outputs["error_status"] is True
        return [record.getMessage() for record in log()]

    one, other = "moondream3", "moondream4"
    often = {"track": 5}.get(block, 1)  # tracks look at one frame in five, and only a look that fails is logged
    (told,) = frames(one, 50)
    assert told.startswith(f"moondream_cv/{block}: there is no model 'moondream3'")
    (told,) = frames(other, often)
    assert "'moondream4'" in told
    (told,) = frames("tiny", 1)
    assert "no pixels" in told
    assert frames(one, often) == []
    (told,) = frames(one, 20)  # by now more than a minute has gone by since the first
    assert "'moondream3'" in told


def test_each_block_says_what_fails(now: SimpleNamespace, log: Log) -> None:
    steps = [block_step(block, name=block) for block in BLOCKS]
    engine = engine_of(workflow(*steps, outputs=[f"{block}.error_message" for block in BLOCKS]))
    for _ in range(3):
        engine.run(runtime_parameters={"image": NO_IMAGE})
    said = sorted(record.getMessage().partition(":")[0] for record in log())
    assert said == sorted(f"moondream_cv/{block}" for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("error", "expected"),
    [(BackendError("the server is away"), True), (ValueError("no such value"), True), (KeyError("a key"), False)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_meant_to_happen_is_logged_with_its_traceback(
    block: str, error: Exception, expected: bool, now: SimpleNamespace, log: Log, looks: Looks, bgr: np.ndarray
) -> None:
    def give(request: Request) -> ErrorResult:
        try:
            raise error
        except Exception as caught:
            return ErrorResult(caught)

    looks.gives = give
    (outputs,) = results(engine_of(workflow(block_step(block)), looks), bgr)
    check_nothing(block, outputs, str(error))
    (record,) = log()
    assert record.levelno == (logging.WARNING if expected else logging.ERROR)
    if expected:
        assert not record.exc_info
    else:
        assert record.exc_info
        assert record.exc_info[1] is error
        assert record.exc_info[2] is not None


def test_few_messages_are_remembered(now: SimpleNamespace, log: Log) -> None:
    from moondream_cv_blocks import results as block_results

    engine = engine_of(workflow(block_step("caption", length="$inputs.length"), parameters=["length"]))
    small = np.zeros((8, 8, 3), np.uint8)
    for number in range(block_results.MAX_LOGGED_MESSAGES + 50):
        results(engine, small, length=f"length {number}")
        assert len(block_results._logged_at) <= block_results.MAX_LOGGED_MESSAGES
    assert len(log()) == block_results.MAX_LOGGED_MESSAGES + 50  # all of them differ


def test_a_wrong_value_that_differs_on_each_frame_is_logged_once(
    now: SimpleNamespace, log: Log, looks: Looks, moving: list[np.ndarray]
) -> None:
    """Detections in the place of a text, as of a workflow that is put together wrongly."""
    asks = block_step("query", question="Where is {it}?", parameters={"it": "$steps.found.predictions"})
    engine = engine_of(workflow(block_step("detect", name="found"), asks), looks)
    for bgr in moving:
        (outputs,) = results(engine, bgr)
        check_nothing("query", outputs, "parameters['it'] must be a text or a number, not Detections")
    assert len(log()) == 1
