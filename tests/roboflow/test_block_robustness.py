"""Test the robustness of the blocks: internal failures, deleted model folders, unusual field values, and memory."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv

import moondream_cv
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import BackendError
from moondream_cv.requests import ErrorResult
from moondream_cv.scenes import render_clip
from moondream_cv.video.tracking.tracker import Tracker
from moondream_cv_blocks import ModelPool, pool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    BLOCKS,
    CLASS_BLOCKS,
    CountingModel,
    assert_failed,
    bgr_frames,
    compile_error,
    compile_workflow,
    make_engine,
    minimal_step,
    run_engine,
    run_workflow,
    step,
    video_frame,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

NO_IMAGE = np.zeros((0, 0, 3), np.uint8)
FAILURE = "internal failure"
NAMES = ["dog", "red circle"]
INTERVAL = 5


# Internal failures


def fail(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError(FAILURE)


@contextmanager
def broken_outputs(block: str, model: CountingModel, also_empty: bool) -> Iterator[None]:
    """Make a block fail when it creates the outputs of a result.

    Args:
        block: Block that fails.
        model: Model of the block.
        also_empty: Make the creation of empty detections fail as well.
    """
    with pytest.MonkeyPatch.context() as patch:
        if block in CLASS_BLOCKS:
            results = importlib.import_module("moondream_cv_blocks.results")
            original = results.as_prediction

            def fail_on_objects(detections: sv.Detections, image: Any, kind: str) -> sv.Detections:
                if also_empty or len(detections):
                    raise RuntimeError(FAILURE)
                return original(detections, image, kind)  # type: ignore[no-any-return]

            for module in (results, importlib.import_module(f"moondream_cv_blocks.{block}")):
                if hasattr(module, "as_prediction"):
                    patch.setattr(module, "as_prediction", fail_on_objects)
        else:
            model.make_result = lambda request: object()
        try:
            yield
        finally:
            model.make_result = None


@pytest.mark.parametrize("also_empty", [False, True], ids=["outputs", "empty outputs too"])
@pytest.mark.parametrize("block", BLOCKS)
def test_failure_to_create_outputs_returns_error_outputs(
    block: str, also_empty: bool, counting_model: CountingModel, bgr: np.ndarray
) -> None:
    keyframes = {"every": 1} if block == "track" else {}
    engine = make_engine(workflow(minimal_step(block, **keyframes)), counting_model)
    with broken_outputs(block, counting_model, also_empty):
        failed = run_engine(engine, [bgr, bgr])
    for outputs in failed:
        assert_failed(block, outputs, FAILURE if block in CLASS_BLOCKS else "object")
    for outputs in run_engine(engine, [bgr, bgr]):
        assert (outputs["error_status"], outputs["error_message"]) == (False, "")
        assert all(
            len(outputs[name]) for name in ("predictions", "answer", "caption", "new_instances") if name in outputs
        )


@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_after_an_internal_failure_are_json_serializable(
    block: str, counting_model: CountingModel, bgr: np.ndarray
) -> None:
    engine = make_engine(workflow(minimal_step(block)), counting_model)
    with broken_outputs(block, counting_model, also_empty=False):
        (outputs,) = run_engine(engine, bgr, serialize=True)
    assert json.loads(json.dumps(outputs)) == outputs
    assert outputs["error_status"] is True


def track_engine(model: CountingModel) -> Any:
    return make_engine(workflow(step("track", class_names=NAMES, every=INTERVAL)), model)


def ids(outputs: dict[str, Any], name: str = "tracked_detections") -> list[int]:
    return outputs[name].tracker_id.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("target", "at"),
    [("update of the tracker", INTERVAL), ("as_prediction", INTERVAL), ("as_prediction", 2)],
    ids=["tracker", "outputs of a keyframe", "outputs between keyframes"],
)
def test_tracking_restarts_after_a_failure(
    target: str, at: int, counting_model: CountingModel, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, outputs_of_frames = track_engine(counting_model), []
    for index, bgr in enumerate(moving):
        with monkeypatch.context() as patch:
            if index == at and target == "as_prediction":
                patch.setattr("moondream_cv_blocks.track.as_prediction", fail)
            elif index == at:
                patch.setattr(Tracker, "update", fail)
            outputs_of_frames += run_engine(engine, video_frame(bgr, index + 1))
    assert_failed("track", outputs_of_frames[at], FAILURE)
    assert ids(outputs_of_frames[at - 1]) == [1, 2]
    restart = INTERVAL * (at // INTERVAL + 1)  # the next keyframe
    assert ids(outputs_of_frames[restart], "new_instances") == ids(outputs_of_frames[restart]) == [3, 4]
    assert all(
        ids(outputs) == ids(outputs, "already_seen_instances") == [3, 4] for outputs in outputs_of_frames[restart + 1 :]
    )
    assert len(counting_model.call_sizes) == len(range(0, len(moving), INTERVAL))


@pytest.mark.parametrize("at", [INTERVAL, 2], ids=["at a keyframe", "between keyframes"])
def test_tracking_error_is_reported_until_the_next_keyframe(
    at: int, counting_model: CountingModel, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a counter would take the frames for empty ones."""
    engine = track_engine(counting_model)
    for index, bgr in enumerate(moving[: at + 2]):
        with monkeypatch.context() as patch:
            if index == at:
                patch.setattr("moondream_cv_blocks.track.as_prediction", fail)
            (outputs,) = run_engine(engine, video_frame(bgr, index + 1))
    assert outputs["error_status"] or ids(outputs) == [1, 2]


def test_instances_of_a_failed_frame_are_new_on_the_next_frame(
    counting_model: CountingModel, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moondream_cv_blocks import track

    original = track.as_prediction

    def fail_if_empty(detections: sv.Detections, *rest: Any) -> Any:
        return original(detections, *rest) if len(detections) else fail()

    engine = track_engine(counting_model)
    with monkeypatch.context() as patch:
        patch.setattr(track, "as_prediction", fail_if_empty)  # the first frame has no already seen instances
        assert_failed("track", run_engine(engine, video_frame(moving[0], 1))[0], FAILURE)
    outputs_of_frames = [run_engine(engine, video_frame(bgr, number))[0] for number, bgr in enumerate(moving[1:], 2)]
    track_ids = [number for outputs in outputs_of_frames for number in ids(outputs)]
    assert sorted({n for outputs in outputs_of_frames for n in ids(outputs, "new_instances")}) == sorted(set(track_ids))


# Deleted model folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the tiny model's folder."""
    copy: Path = shutil.copytree(Path(moondream_cv.__file__).parent / "tiny", tmp_path / "my-model")
    return copy


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelPool]:
    """Replace the shared pool for the test."""
    models = ModelPool(device="cpu")
    monkeypatch.setattr(pool, "_shared", models)
    yield models
    models.close()


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened before", "never opened"])
def test_open_model_does_not_need_its_folder(
    by: str, opened: bool, shared: ModelPool, folder: Path, bgr: np.ndarray
) -> None:
    """The model also works in workflows that are compiled after the folder was deleted."""
    before = shared.get(str(folder)) if opened else None
    shutil.rmtree(folder)
    if by == "input":
        definition = workflow(minimal_step("caption", model="$inputs.model"), parameters=["model"])
        (outputs,) = run_engine(compile_workflow(definition), bgr, model=str(folder))
    elif opened:
        (outputs,) = run_workflow(workflow(minimal_step("caption", model=str(folder))), bgr)
    else:
        assert "there is no model" in compile_error(workflow(minimal_step("caption", model=str(folder))))
        return
    if opened:
        assert (outputs["error_message"], bool(outputs["caption"])) == ("", True)
        assert shared.get(str(folder)) is before
    else:
        assert_failed("caption", outputs, "there is no model")


def test_folder_can_be_deleted_while_a_workflow_runs(shared: ModelPool, folder: Path, bgr: np.ndarray) -> None:
    engine = compile_workflow(workflow(minimal_step("caption", model=str(folder))))
    (before,) = run_engine(engine, bgr)
    shutil.rmtree(folder)
    assert run_engine(engine, bgr) == [before]
    assert before["error_message"] == ""


def test_allowed_model_of_a_deleted_folder_is_found_by_another_spelling(
    shared: ModelPool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pool.ALLOWED, str(folder))
    monkeypatch.chdir(folder.parent)
    before = shared.get("./my-model")
    shutil.rmtree(folder)
    assert shared.get("./my-model") is before


# Values of fields


@pytest.mark.parametrize("block", CLASS_BLOCKS)
@pytest.mark.parametrize(
    "names",
    [["$5 bill"], ["dog", "$5 bill"], "dog, $5 bill"],
    ids=str,
)
def test_class_names_can_start_with_a_dollar_sign(
    block: str, names: Any, counting_model: CountingModel, bgr: np.ndarray
) -> None:
    (outputs,) = run_engine(make_engine(workflow(minimal_step(block, class_names=names)), counting_model), bgr)
    assert outputs["error_message"] == ""
    assert counting_model.call_sizes == [1 if names == ["$5 bill"] else 2]


@pytest.mark.parametrize("question", ["Is it $20 or $30?", " $20 or $30?"])  # the engine rejects a leading "$"
def test_question_can_contain_dollar_signs(question: str, counting_model: CountingModel, bgr: np.ndarray) -> None:
    assert_question(
        make_engine(workflow(minimal_step("query", question=question)), counting_model), counting_model, bgr, question
    )


def test_question_from_an_input_can_start_with_a_dollar_sign(counting_model: CountingModel, bgr: np.ndarray) -> None:
    definition = workflow(minimal_step("query", question="$inputs.question"), parameters=["question"])
    assert_question(make_engine(definition, counting_model), counting_model, bgr, "$20 or $30?", question="$20 or $30?")


def test_manifest_accepts_a_question_that_starts_with_a_dollar_sign() -> None:
    """The engine rejects such a literal, not the block."""
    from moondream_cv_blocks.query import Manifest

    assert Manifest(**minimal_step("query", question="$20 or $30?")).question == "$20 or $30?"


def assert_question(
    engine: Any, counting_model: CountingModel, bgr: np.ndarray, expected: str, **parameters: Any
) -> None:
    """Run the engine, and assert the question that the model receives."""
    questions: list[str] = []

    def give(request: Any) -> Any:
        questions.append(request.question)
        return counting_model.model.run([request])[0]

    counting_model.make_result = give
    (outputs,) = run_engine(engine, bgr, **parameters)
    assert outputs["error_message"] == ""
    assert questions == [expected]


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, field) for block in CLASS_BLOCKS for field in ("class_names", "confidence", "max_objects")),
        ("track", "every"),
        ("query", "question"),
        ("query", "max_tokens"),
        ("caption", "temperature"),
    ],
)
@pytest.mark.parametrize("value", ["$input.x", "$inputs", "$steps.x y.z"])
def test_invalid_selectors_are_rejected(block: str, field: str, value: str) -> None:
    message = compile_error(workflow(minimal_step(block, **{field: value})))
    assert message.startswith(f"{field}: ")
    assert "invalid selector" in message


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, field) for block in CLASS_BLOCKS for field in ("confidence", "max_objects")),
        ("detect", "nms"),
        ("track", "nms"),
        ("track", "every"),
        *((block, field) for block in ("query", "caption") for field in ("max_tokens", "temperature")),
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_not_accepted_as_numbers(block: str, field: str, value: bool, bgr: np.ndarray) -> None:
    """This applies to literals and to values of inputs."""
    message = compile_error(workflow(minimal_step(block, **{field: value})))
    assert message.startswith(f"{field}: ")
    assert str(value) in message
    definition = workflow(minimal_step(block, **{field: f"$inputs.{field}"}), parameters=[field])
    (outputs,) = run_workflow(definition, bgr, **{field: value})
    assert_failed(block, outputs, field, str(value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "b"], "parameters['it'] must be a string or a number, got list: ['a', 'b']"),
        ({"a": 1}, "parameters['it'] must be a string or a number, got dict"),
        (None, "the placeholder {it}, but parameters has color"),
    ],
    ids=["list", "dict", "None"],
)
def test_parameters_must_be_strings_or_numbers(
    value: Any, message: str, counting_model: CountingModel, bgr: np.ndarray
) -> None:
    given = {"it": "$inputs.it", "color": "red"}
    step_ = minimal_step("query", question="Is {it} {color}?", parameters=given)
    (outputs,) = run_engine(make_engine(workflow(step_, parameters=["it"]), counting_model), bgr, it=value)
    assert_failed("query", outputs, message)
    assert counting_model.call_sizes == []


def test_detections_as_a_parameter_return_error_outputs(counting_model: CountingModel, bgr: np.ndarray) -> None:
    query = minimal_step("query", question="Where is {it}?", parameters={"it": "$steps.found.predictions"})
    engine = make_engine(workflow(minimal_step("detect", name="found"), query), counting_model)
    (outputs,) = run_engine(engine, bgr)
    assert_failed("query", outputs, "parameters['it'] must be a string or a number, got Detections")


@pytest.mark.parametrize("block", BLOCKS)
def test_unreadable_image_keeps_its_message_if_the_server_is_down(block: str, closed_url: str, bgr: np.ndarray) -> None:
    engine = make_engine(workflow(minimal_step(block, model=closed_url)))
    first, second, third = run_engine(engine, [bgr, NO_IMAGE, bgr])
    assert_failed(block, second, "no pixels")
    assert closed_url not in second["error_message"]
    for outputs in (first, third):
        assert_failed(block, outputs, f"{closed_url}/v1/models is unreachable")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("model", ["tiny", "http://localhost:2020"])
def test_no_model_is_opened_if_no_image_can_be_read(
    block: str, model: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def open_model(name: str, **options: Any) -> Any:
        opened.append(name)
        raise BackendError("is opened")

    monkeypatch.setattr(pool, "load", open_model)
    monkeypatch.setattr(pool, "connect", open_model)
    engine = make_engine(workflow(minimal_step(block, model=model)))
    for outputs in run_engine(engine, [NO_IMAGE, np.zeros((4, 4, 5), np.uint8)]):
        assert_failed(block, outputs, "shape" if "shape" in outputs["error_message"] else "no pixels")
    assert opened == []
    assert_failed(block, run_engine(engine, [NO_IMAGE, bgr])[1], "is opened")  # the second image is readable
    assert opened == [model]


# Memory


@pytest.mark.parametrize("fails", [False, True], ids=["success", "model failure"])
def test_track_block_keeps_no_frames_in_memory(fails: bool, tiny: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block keeps neither the input images nor its copies of the pixels."""
    from moondream_cv_blocks import track

    seen: list[weakref.ref[np.ndarray]] = []
    read = track.pixels_of

    def record(image: Any) -> np.ndarray:
        pixels = read(image)
        seen.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(track, "pixels_of", record)
    counting_model = CountingModel(tiny)
    if fails:
        counting_model.make_result = lambda request: ErrorResult(BackendError("the server is down"))
    engine = make_engine(workflow(step("track", class_names=["red circle"], every=INTERVAL)), counting_model)
    frames, sources = bgr_frames(render_clip(2, num_frames=10, names=NAMES, resolution_wh=(96, 72))), 20
    for number, frame in enumerate(frames, 1):
        copies = [frame.copy() for _ in range(sources)]
        seen += map(weakref.ref, copies)
        outputs_of_frames = run_engine(engine, [video_frame(copy, number, f"{at}") for at, copy in enumerate(copies)])
        assert [outputs["error_status"] for outputs in outputs_of_frames] == [fails] * sources
    del copies, outputs_of_frames
    gc.collect()
    assert len(seen) == 2 * sources * len(frames)
    assert len(counting_model.call_sizes) == len(range(0, len(frames), INTERVAL))
    assert sum(reference() is not None for reference in seen) == 0
