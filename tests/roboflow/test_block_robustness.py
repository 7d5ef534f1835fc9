"""What blocks keep to when things go wrong or come in an unusual form: outputs that cannot be made, folders that are
deleted, odd values of fields, and memory.
"""

from __future__ import annotations

import gc
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
from moondream_cv.engine.local import LocalModel
from moondream_cv.errors import BackendError
from moondream_cv.requests import ErrorResult
from moondream_cv.scenes import render_clip
from moondream_cv.video.tracking.tracker import Tracker
from moondream_cv_blocks import ModelPool, pool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    BLOCKS,
    FINDERS,
    Looks,
    bgr_frames,
    block_step,
    check_nothing,
    compiled,
    engine_of,
    in_video,
    refusal,
    results,
    run,
    step,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

NO_IMAGE = np.zeros((0, 0, 3), np.uint8)
OUT_OF_ORDER = "out of order"
NAMES = ["dog", "red circle"]
EVERY = 5


# Outputs that cannot be made


def fail(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError(OUT_OF_ORDER)


@contextmanager
def broken_outputs(block: str, model: Looks, everywhere: bool) -> Iterator[None]:
    """Meanwhile a block fails on making outputs of what the model has given.

    Args:
        everywhere: Whether empty detections cannot be made either.
    """
    with pytest.MonkeyPatch.context() as patch:
        if block in FINDERS:
            patch.setattr(f"moondream_cv_blocks.{block}.as_prediction", fail)
            if everywhere:
                patch.setattr("moondream_cv_blocks.results.as_prediction", fail)
        else:
            model.gives = lambda request: object()
        try:
            yield
        finally:
            model.gives = None


@pytest.mark.parametrize("everywhere", [False, True], ids=["outputs", "empty ones too"])
@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_that_cannot_be_made(block: str, everywhere: bool, looks: Looks, bgr: np.ndarray) -> None:
    once = {"every": 1} if block == "track" else {}
    engine = engine_of(workflow(block_step(block, **once)), looks)
    with broken_outputs(block, looks, everywhere):
        failed = results(engine, [bgr, bgr])
    for outputs in failed:
        check_nothing(block, outputs, OUT_OF_ORDER if block in FINDERS else "object")
    for outputs in results(engine, [bgr, bgr]):
        assert (outputs["error_status"], outputs["error_message"]) == (False, "")
        assert all(
            len(outputs[name]) for name in ("predictions", "answer", "caption", "new_instances") if name in outputs
        )


@pytest.mark.parametrize("block", BLOCKS)
def test_the_error_outputs_of_those_go_through_json(block: str, looks: Looks, bgr: np.ndarray) -> None:
    engine = engine_of(workflow(block_step(block)), looks)
    with broken_outputs(block, looks, everywhere=False):
        (outputs,) = results(engine, bgr, serialize=True)
    assert json.loads(json.dumps(outputs)) == outputs
    assert outputs["error_status"] is True


def track_engine(model: Looks) -> Any:
    return engine_of(workflow(step("track", class_names=NAMES, every=EVERY)), model)


def ids(outputs: dict[str, Any], name: str = "tracked_detections") -> list[int]:
    return outputs[name].tracker_id.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("target", "at"),
    [("update of the tracker", EVERY), ("as_prediction", EVERY), ("as_prediction", 2)],
    ids=["tracker", "outputs of a look", "outputs between looks"],
)
def test_tracking_begins_anew_after_a_failure(
    target: str, at: int, looks: Looks, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, said = track_engine(looks), []
    for index, bgr in enumerate(moving):
        with monkeypatch.context() as patch:
            if index == at and target == "as_prediction":
                patch.setattr("moondream_cv_blocks.track.as_prediction", fail)
            elif index == at:
                patch.setattr(Tracker, "update", fail)
            said += results(engine, in_video(bgr, index + 1))
    check_nothing("track", said[at], OUT_OF_ORDER)
    assert ids(said[at - 1]) == [1, 2]
    again = EVERY * (at // EVERY + 1)  # the next look
    assert ids(said[again], "new_instances") == ids(said[again]) == [3, 4]
    assert all(ids(outputs) == ids(outputs, "already_seen_instances") == [3, 4] for outputs in said[again + 1 :])
    assert len(looks.asked) == len(range(0, len(moving), EVERY))


@pytest.mark.parametrize("at", [EVERY, 2], ids=["at a look", "between looks"])
def test_the_error_of_a_tracker_stays_until_the_next_look(
    at: int, looks: Looks, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a model does: who counts must not take it for an empty scene."""
    engine = track_engine(looks)
    for index, bgr in enumerate(moving[: at + 2]):
        with monkeypatch.context() as patch:
            if index == at:
                patch.setattr("moondream_cv_blocks.track.as_prediction", fail)
            (outputs,) = results(engine, in_video(bgr, index + 1))
    assert outputs["error_status"] or ids(outputs) == [1, 2]


def test_what_is_new_on_a_frame_that_fails_is_new_on_the_next(
    looks: Looks, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moondream_cv_blocks import track

    given = track.as_prediction

    def fail_on_nothing(detections: sv.Detections, *rest: Any) -> Any:
        return given(detections, *rest) if len(detections) else fail()

    engine = track_engine(looks)
    with monkeypatch.context() as patch:
        patch.setattr(track, "as_prediction", fail_on_nothing)  # on the first frame nothing has been seen already
        check_nothing("track", results(engine, in_video(moving[0], 1))[0], OUT_OF_ORDER)
    said = [results(engine, in_video(bgr, number))[0] for number, bgr in enumerate(moving[1:], 2)]
    shown = [number for outputs in said for number in ids(outputs)]
    assert sorted({n for outputs in said for n in ids(outputs, "new_instances")}) == sorted(set(shown))


# A folder that is deleted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    copy: Path = shutil.copytree(Path(moondream_cv.__file__).parent / "tiny", tmp_path / "my-model")
    return copy


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelPool]:
    """What all blocks share, for this test."""
    models = ModelPool(device="cpu")
    monkeypatch.setattr(pool, "_shared", models)
    yield models
    models.close()


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened before", "never opened"])
def test_a_folder_that_is_deleted(by: str, opened: bool, shared: ModelPool, folder: Path, bgr: np.ndarray) -> None:
    """What was opened of it goes on working, also in workflows that are compiled afterwards."""
    before = shared.get(str(folder)) if opened else None
    shutil.rmtree(folder)
    if by == "input":
        definition = workflow(block_step("caption", model="$inputs.model"), parameters=["model"])
        (outputs,) = results(compiled(definition), bgr, model=str(folder))
    elif opened:
        (outputs,) = run(workflow(block_step("caption", model=str(folder))), bgr)
    else:
        assert "there is no model" in refusal(workflow(block_step("caption", model=str(folder))))
        return
    if opened:
        assert (outputs["error_message"], bool(outputs["caption"])) == ("", True)
        assert shared.get(str(folder)) is before
    else:
        check_nothing("caption", outputs, "there is no model")


def test_a_folder_that_is_deleted_while_a_workflow_runs(shared: ModelPool, folder: Path, bgr: np.ndarray) -> None:
    engine = compiled(workflow(block_step("caption", model=str(folder))))
    (before,) = results(engine, bgr)
    shutil.rmtree(folder)
    assert results(engine, bgr) == [before]
    assert before["error_message"] == ""


def test_a_deleted_folder_that_is_allowed_under_another_spelling(
    shared: ModelPool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pool.ALLOWED, str(folder))
    monkeypatch.chdir(folder.parent)
    before = shared.get("./my-model")
    shutil.rmtree(folder)
    assert shared.get("./my-model") is before


# Values of fields


@pytest.mark.parametrize("block", FINDERS)
@pytest.mark.parametrize(
    "names",
    [["$5 bill"], ["dog", "$5 bill"], "dog, $5 bill"],
    ids=str,
)
def test_names_of_classes_with_a_dollar(block: str, names: Any, looks: Looks, bgr: np.ndarray) -> None:
    (outputs,) = results(engine_of(workflow(block_step(block, class_names=names)), looks), bgr)
    assert outputs["error_message"] == ""
    assert looks.asked == [1 if names == ["$5 bill"] else 2]


@pytest.mark.parametrize("question", ["Is it $20 or $30?", " $20 or $30?"])  # at the beginning the engine takes it
def test_a_question_with_a_dollar(question: str, looks: Looks, bgr: np.ndarray) -> None:
    check_asked(engine_of(workflow(block_step("query", question=question)), looks), looks, bgr, question)


def test_a_question_with_a_dollar_from_an_input(looks: Looks, bgr: np.ndarray) -> None:
    definition = workflow(block_step("query", question="$inputs.question"), parameters=["question"])
    check_asked(engine_of(definition, looks), looks, bgr, "$20 or $30?", question="$20 or $30?")


def test_the_field_takes_a_question_with_a_dollar() -> None:
    """It is not ours to refuse."""
    from moondream_cv_blocks.query import Manifest

    assert Manifest(**block_step("query", question="$20 or $30?")).question == "$20 or $30?"


def check_asked(engine: Any, looks: Looks, bgr: np.ndarray, expected: str, **parameters: Any) -> None:
    """The model is asked this, and answers."""
    questions: list[str] = []

    def give(request: Any) -> Any:
        questions.append(request.question)
        return looks.model.run([request])[0]

    looks.gives = give
    (outputs,) = results(engine, bgr, **parameters)
    assert outputs["error_message"] == ""
    assert questions == [expected]


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, field) for block in FINDERS for field in ("class_names", "confidence", "max_objects")),
        ("track", "every"),
        ("query", "question"),
        ("query", "max_tokens"),
        ("caption", "temperature"),
    ],
)
@pytest.mark.parametrize("value", ["$input.x", "$inputs", "$steps.x y.z"])
def test_what_only_looks_like_a_selector_is_refused(block: str, field: str, value: str) -> None:
    told = refusal(workflow(block_step(block, **{field: value})))
    assert told.startswith(f"{field}: ")
    assert "is no selector" in told


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, field) for block in FINDERS for field in ("confidence", "max_objects")),
        ("detect", "nms"),
        ("track", "nms"),
        ("track", "every"),
        *((block, field) for block in ("query", "caption") for field in ("max_tokens", "temperature")),
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers(block: str, field: str, value: bool, bgr: np.ndarray) -> None:
    """Neither where they are written down nor where they come from an input."""
    told = refusal(workflow(block_step(block, **{field: value})))
    assert told.startswith(f"{field}: ")
    assert str(value) in told
    definition = workflow(block_step(block, **{field: f"$inputs.{field}"}), parameters=[field])
    (outputs,) = run(definition, bgr, **{field: value})
    check_nothing(block, outputs, field, str(value))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["a", "b"], "parameters['it'] must be a text or a number, not list: ['a', 'b']"),
        ({"a": 1}, "parameters['it'] must be a text or a number, not dict"),
        (None, "the placeholder {it}, and parameters has color"),
    ],
    ids=["list", "dict", "None"],
)
def test_parameters_that_are_no_text(value: Any, says: str, looks: Looks, bgr: np.ndarray) -> None:
    given = {"it": "$inputs.it", "color": "red"}
    step_ = block_step("query", question="Is {it} {color}?", parameters=given)
    (outputs,) = results(engine_of(workflow(step_, parameters=["it"]), looks), bgr, it=value)
    check_nothing("query", outputs, says)
    assert looks.asked == []


def test_a_parameter_that_is_detections(looks: Looks, bgr: np.ndarray) -> None:
    asks = block_step("query", question="Where is {it}?", parameters={"it": "$steps.found.predictions"})
    engine = engine_of(workflow(block_step("detect", name="found"), asks), looks)
    (outputs,) = results(engine, bgr)
    check_nothing("query", outputs, "parameters['it'] must be a text or a number, not Detections")


@pytest.mark.parametrize("block", BLOCKS)
def test_an_unreadable_image_keeps_its_message_where_the_server_is_down(
    block: str, closed_url: str, bgr: np.ndarray
) -> None:
    engine = engine_of(workflow(block_step(block, model=closed_url)))
    first, second, third = results(engine, [bgr, NO_IMAGE, bgr])
    check_nothing(block, second, "no pixels")
    assert closed_url not in second["error_message"]
    for outputs in (first, third):
        check_nothing(block, outputs, f"{closed_url}/v1/models is unreachable")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("model", ["tiny", "http://localhost:2020"])
def test_no_model_is_opened_where_nothing_can_be_read(
    block: str, model: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def refuse(name: str, **options: Any) -> Any:
        opened.append(name)
        raise BackendError("is opened")

    monkeypatch.setattr(pool, "load", refuse)
    monkeypatch.setattr(pool, "connect", refuse)
    engine = engine_of(workflow(block_step(block, model=model)))
    for outputs in results(engine, [NO_IMAGE, np.zeros((4, 4, 5), np.uint8)]):
        check_nothing(block, outputs, "shape" if "shape" in outputs["error_message"] else "no pixels")
    assert opened == []
    check_nothing(block, results(engine, [NO_IMAGE, bgr])[1], "is opened")  # by one that can be read it is
    assert opened == [model]


# Memory


@pytest.mark.parametrize("fails", [False, True], ids=["fine", "the model fails"])
def test_no_frame_is_kept(fails: bool, tiny: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that come in nor what the block has read of them."""
    from moondream_cv_blocks import track

    seen: list[weakref.ref[np.ndarray]] = []
    read = track.pixels_of

    def remembered(image: Any) -> np.ndarray:
        pixels = read(image)
        seen.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(track, "pixels_of", remembered)
    looks = Looks(tiny)
    if fails:
        looks.gives = lambda request: ErrorResult(BackendError("the server is away"))
    engine = engine_of(workflow(step("track", class_names=["red circle"], every=EVERY)), looks)
    frames, sources = bgr_frames(render_clip(2, num_frames=10, names=NAMES, resolution_wh=(96, 72))), 20
    for number, frame in enumerate(frames, 1):
        copies = [frame.copy() for _ in range(sources)]
        seen += map(weakref.ref, copies)
        said = results(engine, [in_video(copy, number, f"{at}") for at, copy in enumerate(copies)])
        assert [outputs["error_status"] for outputs in said] == [fails] * sources
    del copies, said
    gc.collect()
    assert len(seen) == 2 * sources * len(frames)
    assert len(looks.asked) == len(range(0, len(frames), EVERY))
    assert sum(reference() is not None for reference in seen) == 0
