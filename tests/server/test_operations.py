"""Operations in an engine: order, requests in the batch of all requests, cancellation and errors.

Run with `pytest tests/server/test_operations.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import MoondreamError, RequestCancelled
from moondream_cv.requests import Caption, Detect, ErrorResult, Request, Settings
from moondream_cv.server.runtime.engine_loop import EngineLoop, StepOutput
from moondream_cv.server.runtime.operations import MIN_STEPS_BETWEEN_PAUSES, Operation, OperationResult
from moondream_cv.server.runtime.tuning_worker import TuningTarget
from tests.helpers.models import endless_model


class Recorder:
    """Records the calls of its methods."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.is_closed = False

    def note(self, value: Any) -> int:
        """Record a value and return the number of calls."""
        self.calls.append(value)
        return len(self.calls)

    def fail(self) -> None:
        """Raise an error."""
        raise MoondreamError("this failed")

    def detect(self, image: Any, names: Sequence[str]) -> Generator[list[Request], Any, list[int]]:
        """Return the number of objects of each class, with one round of requests per class."""
        counts = []
        try:
            for name in names:
                (job,) = yield [Detect(image, name)]
                counts.append(len(job.result.objects))
        except GeneratorExit:
            self.calls.append("abandoned")
            raise
        return counts

    def close(self) -> None:
        self.is_closed = True


@dataclass(frozen=True)
class Opening:
    """Opens the same recorder every time; fails as often as requested."""

    recorder: Recorder
    failures: int = 0

    def __hash__(self) -> int:
        return id(self.recorder)

    def open(self, model: LocalModel) -> Recorder:
        if len(self.recorder.calls) < self.failures:
            self.recorder.calls.append("failed")
            raise MoondreamError("cannot be opened")
        return self.recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def run(loop: EngineLoop[str]) -> dict[str, Any]:
    """Step until no work is left; return the results."""
    results: dict[str, Any] = {}
    has_work = True
    while has_work:
        has_work, output = loop.step()
        results |= {request_id: result for request_id, (result, _) in output.results.items()}
    return results


def steps(loop: EngineLoop[str]) -> Iterator[StepOutput[str]]:
    while True:
        yield loop.step()[1]


def test_operations_run_in_order_and_fail_alone(tiny: LocalModel, recorder: Recorder) -> None:
    loop: EngineLoop[str] = EngineLoop(tiny)
    target = Opening(recorder)
    loop.submit("a", Operation(target, "note", {"value": 1}), False)
    loop.submit("b", Operation(target, "fail", {}), False)
    loop.submit("c", Operation(target, "note", {"value": 2}), False)
    results = run(loop)
    assert results["a"] == OperationResult(1)
    assert isinstance(results["b"].error, MoondreamError)
    assert results["c"] == OperationResult(2)
    assert recorder.calls == [1, 2]
    loop.close()
    assert recorder.is_closed


def test_requests_of_operations_share_the_batch(tiny: LocalModel, recorder: Recorder, scene: Any) -> None:
    loop: EngineLoop[str] = EngineLoop(tiny)
    image = scene.image[..., ::-1]
    for i in range(3):
        arguments = {"image": image, "names": ["cat", "dog", "red circle"]}
        loop.submit(f"operation {i}", Operation(Opening(recorder), "detect", arguments), False)
    loop.submit("request", Detect(image, "blue square"), False)
    _, first = loop.step()
    assert first.num_running == 4
    results = run(loop)
    assert [results[f"operation {i}"].value for i in range(3)] == [[1, 0, 1]] * 3
    assert len(results["request"].objects) == 1
    assert loop.request_ids == []


def test_cancelled_operations_abandon_their_requests(recorder: Recorder) -> None:
    loop: EngineLoop[str] = EngineLoop(endless_model())
    image = np.zeros((24, 32, 3), np.uint8)
    loop.submit("running", Operation(Opening(recorder), "detect", {"image": image, "names": ["cat"]}), False)
    loop.step()
    loop.submit("queued", Operation(Opening(recorder), "note", {"value": 1}), False)
    assert sorted(loop.request_ids) == ["queued", "running"]
    for request_id in ("running", "queued", "unknown"):
        loop.cancel(request_id)
    results = run(loop)
    assert results.keys() == {"running", "queued"}
    assert all(isinstance(result, ErrorResult) for result in results.values())
    assert all(isinstance(result.error, RequestCancelled) for result in results.values())
    assert recorder.calls == ["abandoned"]


def test_cancelled_rollouts_free_their_adapter(tiny: LocalModel, tmp_path: Path, scene: Any) -> None:
    loop: EngineLoop[str] = EngineLoop(tiny)
    target = TuningTarget(tmp_path)
    loop.submit("create", Operation(target, "create", {"name": "parts", "rank": 8}), False)
    finetune_id = run(loop)["create"].value["finetune_id"]
    request = {"skill": "detect", "object": "cat", "image": Image.fromarray(scene.image)}
    arguments = {"finetune_id": finetune_id, "request": request, "num_rollouts": 2, "ground_truth": None}
    loop.submit("rollouts", Operation(target, "rollouts", arguments), False)
    loop.step()
    (live,) = (name for name in tiny._adapters if name.startswith(f"{finetune_id}@live"))
    loop.cancel("rollouts")
    assert isinstance(run(loop)["rollouts"], ErrorResult)

    # The next step replaces the adapter, which is then freed with the next rollouts
    groups = [{"mode": "sft", "request": request, "target": {"boxes": []}}]
    loop.submit(
        "step", Operation(target, "train_step", {"finetune_id": finetune_id, "groups": groups, "lr": 1e-3}), False
    )
    loop.submit("rollouts", Operation(target, "rollouts", arguments), False)
    results = run(loop)
    assert results["step"].value["step"] == 1
    assert len(results["rollouts"].value["rollouts"]) == 2
    assert live not in tiny._adapters
    loop.close()


def test_requests_advance_between_operations_that_pause_decoding(recorder: Recorder) -> None:
    loop: EngineLoop[str] = EngineLoop(endless_model())
    caption = Caption(np.zeros((24, 32, 3), np.uint8), "normal", Settings(max_tokens=100_000))
    loop.submit("caption", caption, False)
    loop.step()
    for i in range(3):
        loop.submit(f"pause {i}", Operation(Opening(recorder), "note", {"value": i}, pauses_decoding=True), False)
    finished = {}
    for number, output in zip(range(3 * MIN_STEPS_BETWEEN_PAUSES), steps(loop), strict=False):
        finished |= dict.fromkeys(output.results, number)
    assert list(finished) == ["pause 0", "pause 1", "pause 2"]
    assert finished["pause 1"] - finished["pause 0"] == MIN_STEPS_BETWEEN_PAUSES
    assert finished["pause 2"] - finished["pause 1"] == MIN_STEPS_BETWEEN_PAUSES
    loop.cancel("caption")
    run(loop)


def test_operations_that_pause_decoding_do_not_wait_without_requests(tiny: LocalModel, recorder: Recorder) -> None:
    loop: EngineLoop[str] = EngineLoop(tiny)
    for i in range(3):
        loop.submit(f"{i}", Operation(Opening(recorder), "note", {"value": i}, pauses_decoding=True), False)
    assert [list(output.results) for _, output in zip(range(3), steps(loop), strict=False)] == [["0"], ["1"], ["2"]]


def test_target_that_cannot_be_opened_is_opened_again(tiny: LocalModel, recorder: Recorder) -> None:
    loop: EngineLoop[str] = EngineLoop(tiny)
    target = Opening(recorder, failures=1)
    loop.submit("a", Operation(target, "note", {"value": 1}), False)
    loop.submit("b", Operation(target, "note", {"value": 2}), False)
    results = run(loop)
    assert "cannot be opened" in str(results["a"].error)
    assert results["b"] == OperationResult(2)
