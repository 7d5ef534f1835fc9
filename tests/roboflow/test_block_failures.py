"""Test failures at run time: error outputs for the failed image, and normal outputs for other images and frames."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector, Pointer
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.images import to_rgb
from moondream_cv.scenes import render_scene
from moondream_cv_blocks import ModelPool, pool
from tests.helpers.remote_server import ReceivedRequest, RemoteServer, Reply, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.served import served
from tests.helpers.workflows import (
    BLOCKS,
    CLASS_BLOCKS,
    compile_error,
    compile_workflow,
    run_engine,
    run_workflow,
    step,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

QUESTION = "How many objects are there?"
REQUIRED: dict[str, dict[str, Any]] = {
    "detect": {"class_names": ["dog", "bus"]},
    "point": {"class_names": ["dog", "bus"]},
    "query": {"question": QUESTION},
    "caption": {},
    "track": {"class_names": ["dog", "bus"]},
}
NO_DETECTIONS: dict[str, list[Any]] = {"xyxy": [], "confidence": [], "class_name": []}
EMPTY: dict[str, dict[str, Any]] = {
    "detect": {"predictions": NO_DETECTIONS},
    "point": {"predictions": NO_DETECTIONS, "points": []},
    "query": {"answer": "", "reasoning": "", "grounding": []},
    "caption": {"caption": ""},
    "track": {
        "tracked_detections": NO_DETECTIONS,
        "new_instances": NO_DETECTIONS,
        "already_seen_instances": NO_DETECTIONS,
    },
}
NO_ERROR = {"error_status": False, "error_message": ""}
BAD = {
    "damaged file": "the image cannot be read",
    "invalid base64": "the image cannot be read",
    "no pixels": "has no pixels: it is 0 wide and 0 high",
    "no height": "has no pixels: it is 10 wide and 0 high",
    "floats out of range": "has values from 7.5 to 7.5",
    "too many channels": "of shape (4, 4, 5)",
}
ODD = ("1x1", "gray", "gray with an axis", "with transparency", "floats")

MODELS_ANSWER = Reply({"models": [{"id": "tiny", "has_scores": True}]})
BOX = {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "confidence": 0.5}
BOX_XYXY = [32, 60, 160, 180]  # on 320x240
BAD_REQUEST = Reply({"error": "not today"}, 400)  # is not retried
ROUTES = ("/v1/detect", "/v1/point", "/v1/query", "/v1/caption")
INVALID_RESPONSES = {
    "HTML": (Reply(b"<html>hello</html>", kind="text/html"), "returned text/html instead of JSON"),
    "JSON of another shape": (Reply({"result": [1]}), "returned no valid '"),
    "a list": (Reply([1]), "returned no JSON object"),
    "other types": (Reply({"objects": 1, "points": 1, "answer": 1, "caption": 1}), "returned no valid '"),
    "500": (Reply({"error": "no memory"}, 500), "returned status 500"),
    "nothing more": (Reply(fault="cut"), "closed the connection early"),
}


@pytest.fixture
def remote() -> Iterator[RemoteServer]:
    """Start a server with the models route of `moondream-cv serve`; tests add the other routes."""
    with remote_server() as running:
        yield running.on("/v1/models", MODELS_ANSWER)


@pytest.fixture
def silent_url() -> Iterator[str]:
    """Return the URL of a server that accepts connections and never responds."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def other_bgr() -> np.ndarray:
    """Return another BGR image, [240, 320, 3], with two dogs and no bus."""
    scene = render_scene(8, resolution_wh=(320, 240), names=["dog", "red circle", "dog"], style="plain")
    return np.ascontiguousarray(scene.image[..., ::-1])


def image_data(pixels: Any = None, source: str = "camera", number: int = 1, **origin: Any) -> Any:
    """Return an image object of the engine, which can be invalid.

    Args:
        pixels: Pixels of the image.
        source: Identifier of the video source.
        number: Frame number.
        origin: File or base64 text to load instead of `pixels`.
    """
    from roboflow_workflows.execution_engine.entities.base import ImageParentMetadata, VideoMetadata, WorkflowImageData

    metadata = VideoMetadata(
        video_identifier=source, frame_number=number, frame_timestamp=datetime.now(timezone.utc), fps=10
    )
    return WorkflowImageData(ImageParentMetadata("image"), numpy_image=pixels, video_metadata=metadata, **origin)


def bad_image(kind: str, folder: Path, **metadata: Any) -> Any:
    """Return an image of a kind in `BAD`."""
    if kind == "damaged file":
        (folder / "damaged.png").write_bytes(b"\x89PNG and no more")
        return image_data(image_reference=str(folder / "damaged.png"), **metadata)
    if kind == "invalid base64":
        return image_data(base64_image="!!", **metadata)
    pixels = {
        "no pixels": np.zeros((0, 0, 3), np.uint8),
        "no height": np.zeros((0, 10, 3), np.uint8),
        "floats out of range": np.full((20, 20, 3), 7.5),
        "too many channels": np.zeros((4, 4, 5), np.uint8),
    }
    return image_data(pixels[kind], **metadata)


def odd_image(kind: str, bgr: np.ndarray) -> np.ndarray:
    """Return an image of a kind in `ODD`."""
    return {
        "1x1": np.full((1, 1, 3), 200, np.uint8),
        "gray": bgr.mean(2).astype(np.uint8),
        "gray with an axis": bgr.mean(2, keepdims=True).astype(np.uint8),
        "with transparency": np.dstack([bgr, np.full(bgr.shape[:2], 90, np.uint8)]),
        "floats": bgr / 255,
    }[kind]


def comparable(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return outputs without IDs, with detections as lists."""
    return {name: _as_lists(value) if hasattr(value, "xyxy") else value for name, value in outputs.items()}


def _as_lists(detections: Any) -> dict[str, list[Any]]:
    return {
        "xyxy": detections.xyxy.tolist(),
        "confidence": detections.confidence.tolist(),
        "class_name": detections.data["class_name"].tolist(),
    }


def expected_outputs(block: str, tiny: LocalModel, pixels: np.ndarray) -> dict[str, Any]:
    """Return the outputs of a block for an image, computed without a workflow."""
    names = ["dog", "bus"]
    if block in ("detect", "track"):
        found = _as_lists(Detector(tiny)(pixels, names))
        boxes = {"tracked_detections": found, "new_instances": found, "already_seen_instances": NO_DETECTIONS}
        return {"predictions": found} if block == "detect" else boxes
    if block == "point":
        found = _as_lists(Pointer(tiny)(pixels, names))
        points = [{"x": x, "y": y, "positive": True} for x, y, *_ in found["xyxy"]]
        return {"predictions": found, "points": points}
    image = Image.fromarray(to_rgb(pixels))
    if block == "query":
        answer = tiny.query(image, QUESTION, settings={"temperature": 0.0})["answer"]
        return {"answer": answer, "reasoning": "", "grounding": []}
    return {"caption": tiny.caption(image, settings={"temperature": 0.0})["caption"]}


def minimal_step(block: str, **fields: Any) -> dict[str, Any]:
    return step(block, **{**REQUIRED[block], **fields})


def make_engine(block: str, timeout: float = 5.0, **fields: Any) -> Any:
    """Compile a workflow of one block, with a new pool of models."""
    models = {"moondream_cv_blocks.models": ModelPool(timeout=timeout)}
    return compile_workflow(workflow(minimal_step(block, **fields)), **models)


def assert_outputs(outputs: dict[str, Any], expected: dict[str, Any], pixels: float = 1e-3) -> None:
    """Assert that a block returns the expected outputs without an error.

    Args:
        outputs: Outputs of the block.
        expected: Result of `expected_outputs`.
        pixels: Tolerance of boxes and points in pixels; rounding depends on the batch size.
    """
    actual = comparable(outputs)
    assert actual.keys() == expected.keys() | NO_ERROR.keys()
    assert {name: actual[name] for name in NO_ERROR} == NO_ERROR
    for name, value in expected.items():
        if not isinstance(value, dict):
            assert actual[name] == value or name == "points"
            continue
        assert actual[name]["class_name"] == value["class_name"]
        np.testing.assert_allclose(actual[name]["xyxy"], value["xyxy"], atol=pixels)
        np.testing.assert_allclose(actual[name]["confidence"], value["confidence"], atol=pixels / 100 + 1e-4)
    if "points" in expected:
        assert [(p["x"], p["y"], p["positive"]) for p in actual["points"]] == [
            (x, y, True) for x, y, *_ in actual["predictions"]["xyxy"]
        ]


def assert_failed(block: str, outputs: dict[str, Any], expected: str) -> None:
    """Assert that the outputs of a block are empty and that its error message contains a string."""
    message = outputs["error_message"]
    assert expected in message
    assert comparable(outputs) == {**EMPTY[block], "error_status": True, "error_message": message}


# Invalid images


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_image_does_not_affect_the_others(
    block: str, bad: str, tiny: LocalModel, bgr: np.ndarray, other_bgr: np.ndarray, tmp_path: Path
) -> None:
    images = [image_data(bgr, "a"), bad_image(bad, tmp_path, source="b"), image_data(other_bgr, "c")]
    first, failed, last = run_workflow(workflow(minimal_step(block)), images)
    assert_failed(block, failed, BAD[bad])
    assert_outputs(first, expected_outputs(block, tiny, bgr))
    assert_outputs(last, expected_outputs(block, tiny, other_bgr))
    assert comparable(first) != comparable(last)


@pytest.mark.parametrize("block", BLOCKS)
def test_all_images_of_a_batch_can_fail(block: str, tmp_path: Path) -> None:
    images = [bad_image(bad, tmp_path, source=bad) for bad in BAD]
    for outputs, message in zip(run_workflow(workflow(minimal_step(block)), images), BAD.values(), strict=True):
        assert_failed(block, outputs, message)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bad", BAD)
def test_outputs_of_a_failed_image_are_json_serializable(block: str, bad: str, tmp_path: Path) -> None:
    (outputs,) = run_workflow(workflow(minimal_step(block)), bad_image(bad, tmp_path), serialize=True)
    assert json.loads(json.dumps(outputs)) == outputs
    assert outputs["error_status"] is True
    for name, empty in EMPTY[block].items():
        assert (outputs[name]["predictions"] if empty is NO_DETECTIONS else outputs[name]) == (
            [] if empty is NO_DETECTIONS else empty
        )


@pytest.mark.parametrize("block", CLASS_BLOCKS)
def test_error_message_of_an_image_has_no_batch_index(block: str, tmp_path: Path) -> None:
    images = [bad_image(bad, tmp_path, source=bad) for bad in ("damaged file", "no pixels")]
    _, second = run_workflow(workflow(minimal_step(block)), images)
    assert "frames[0]" not in second["error_message"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("odd", ODD)
def test_unusual_image_formats_are_accepted(block: str, odd: str, tiny: LocalModel, bgr: np.ndarray) -> None:
    pixels = odd_image(odd, bgr)
    (outputs,) = run_workflow(workflow(minimal_step(block)), image_data(pixels))
    assert_outputs(outputs, expected_outputs(block, tiny, pixels))


# Values of selectors


@pytest.mark.parametrize(
    ("block", "field", "values"),
    [
        *((block, "class_names", [[], ["dog", "dog"], 5, None, [["dog"]], "", ","]) for block in CLASS_BLOCKS),
        *((block, "model", ["moondream3", "./nothing", "ftp://example.org", 5, None]) for block in BLOCKS),
        *((block, "confidence", [2, -0.1, "much", None]) for block in CLASS_BLOCKS),
        ("detect", "nms", [2, "much"]),
        ("point", "max_objects", [0, 1.5, None]),
        ("track", "every", [0, -1, None]),
        ("query", "question", [5, "", None, ["What?"]]),
        ("caption", "length", ["medium", 5, None]),
        ("caption", "max_tokens", [0, "many"]),
        ("caption", "temperature", [-1, "hot"]),
    ],
)
def test_invalid_workflow_inputs_return_error_outputs(
    block: str, field: str, values: list[Any], bgr: np.ndarray
) -> None:
    keyframes = {"every": 1} if block == "track" and field != "every" else {}
    engine = compile_workflow(
        workflow(minimal_step(block, **keyframes, **{field: f"$inputs.{field}"}), parameters=[field])
    )
    for value in values:
        (outputs,) = run_engine(engine, bgr, **{field: value})
        assert_failed(block, outputs, "" if field == "model" and isinstance(value, str) else field)


@pytest.mark.parametrize(
    ("block", "field", "value", "message"),
    [
        *((block, "class_names", [], "must have at least one class name") for block in CLASS_BLOCKS),
        *((block, "class_names", ["dog", " dog"], "duplicates: 'dog'") for block in CLASS_BLOCKS),
        *((block, "class_names", 5, "got int: 5") for block in CLASS_BLOCKS),
        *((block, "class_names", [["dog"]], "must be a string, got list") for block in CLASS_BLOCKS),
        *((block, "class_names", {"dog": 1}, "got dict") for block in CLASS_BLOCKS),
        *((block, "class_names", ["\ud800"], "must be valid Unicode") for block in CLASS_BLOCKS),
        *((block, "model", "moondream3", "did you mean 'moondream2'?") for block in BLOCKS),
        *((block, "model", 5, "model must be a name or the URL of a server, got int") for block in BLOCKS),
        *((block, "confidence", 2, "confidence must be between 0 and 1, got 2") for block in CLASS_BLOCKS),
        *((block, "confidence", "much", "confidence must be between 0 and 1") for block in CLASS_BLOCKS),
        *((block, "max_objects", 0, "must be an integer between 1 and 2147483647, got 0") for block in CLASS_BLOCKS),
        ("detect", "nms", -1, "nms must be between 0 and 1, got -1"),
        ("track", "nms", -1, "nms must be between 0 and 1, got -1"),
        ("track", "every", 0, "every must be an integer between 1 and 2147483647, got 0"),
        ("track", "every", "often", "every must be an integer between 1 and 2147483647, got 'often'"),
        ("query", "question", 5, "question must be a string, got int"),
        ("query", "question", " ", "question must not be empty"),
        ("query", "question", "Is there a {object}?", "the placeholder {object}"),
        *(
            (block, "max_tokens", 0, "max_tokens must be an integer between 1 and 2147483647")
            for block in ("query", "caption")
        ),
        *((block, "temperature", -1, "temperature must be between 0 and 2, got -1") for block in ("query", "caption")),
        ("caption", "length", "medium", "length must be one of short, normal, long, got 'medium'"),
        ("caption", "length", 5, "length must be one of short, normal, long, got 5"),
    ],
)
def test_invalid_values_of_other_steps_return_error_outputs(
    block: str, field: str, value: Any, message: str, bgr: np.ndarray
) -> None:
    """The engine does not check the outputs of a step."""
    for outputs in run_engine(engine_with_input(block, field), [image_data(bgr), image_data(bgr, "b")], value=value):
        assert_failed(block, outputs, message)


def engine_with_input(block: str, field: str) -> Any:
    """Compile a workflow of a block with one field from another step, which passes on the parameter `value`."""
    source = {"type": "roboflow_core/first_non_empty_or_default@v1", "name": "source", "data": ["$inputs.value"]}
    step = minimal_step(block, **{field: "$steps.source.output"})
    return compile_workflow(workflow(source, step, parameters=["value"]))


@pytest.mark.parametrize("block", BLOCKS)
def test_frame_after_an_invalid_value_is_processed(block: str, tiny: LocalModel, bgr: np.ndarray) -> None:
    engine = engine_with_input(block, "model")
    (failed,) = run_engine(engine, image_data(bgr, number=1), value="moondream3")
    (outputs,) = run_engine(engine, image_data(bgr, number=6), value="tiny")  # the next keyframe of the track block
    assert failed["error_status"] is True
    assert_outputs(outputs, expected_outputs(block, tiny, bgr))


@pytest.mark.parametrize("block", CLASS_BLOCKS)
@pytest.mark.parametrize("as_list", [True, False])
def test_one_hundred_class_names_are_accepted_at_run_time(
    block: str, as_list: bool, tiny: LocalModel, bgr: np.ndarray
) -> None:
    """Only the last two names are in the image."""
    names = [*(f"class {number}" for number in range(98)), "dog", "bus"]
    value = names if as_list else ", ".join(names)
    (outputs,) = run_engine(engine_with_input(block, "class_names"), image_data(bgr), value=value)
    found = outputs["tracked_detections" if block == "track" else "predictions"]
    assert outputs["error_message"] == ""
    known = np.isin(found.class_id, [98, 99])
    expected = expected_outputs(block, tiny, bgr)["tracked_detections" if block == "track" else "predictions"]
    np.testing.assert_allclose(found.xyxy[known], expected["xyxy"], atol=1e-3)
    assert found.data["class_name"][known].tolist() == expected["class_name"]


@pytest.mark.parametrize("value", ["no", "false"])
def test_reasoning_can_be_disabled_at_run_time(value: str, bgr: np.ndarray) -> None:
    definition = workflow(minimal_step("query", reasoning="$inputs.reasoning"), parameters=["reasoning"])
    (outputs,) = run_workflow(definition, bgr, reasoning=value)
    assert outputs["reasoning"] == ""


def test_every_accepts_large_integers(bgr: np.ndarray) -> None:
    (outputs,) = run_workflow(workflow(minimal_step("track", every=2**31 - 1)), bgr)
    assert len(outputs["tracked_detections"])
    assert compile_error(workflow(minimal_step("track", every=10**400))).startswith("every: ")


# Server failures


@pytest.mark.parametrize("block", BLOCKS)
def test_refused_connection_returns_error_outputs(block: str, closed_url: str, bgr: np.ndarray) -> None:
    for outputs in run_engine(make_engine(block, model=closed_url), [image_data(bgr), image_data(bgr, "b")]):
        assert_failed(block, outputs, f"{closed_url}/v1/models is unreachable")


@pytest.mark.parametrize("block", BLOCKS)
def test_hanging_server_times_out(block: str, remote: RemoteServer, bgr: np.ndarray) -> None:
    for route in ROUTES:
        remote.on(route, Reply(fault="hang"))
    (outputs,) = run_engine(make_engine(block, timeout=0.3, model=remote.url), bgr)
    assert_failed(block, outputs, "did not respond within 0.3 s")


@pytest.mark.parametrize("block", BLOCKS)
def test_silent_server_returns_error_outputs(
    block: str, silent_url: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moondream_cv.backends.http.PROBE_TIMEOUT", 0.1)
    (outputs,) = run_engine(make_engine(block, model=silent_url), bgr)
    assert_failed(block, outputs, silent_url)


def test_time_out_includes_probing_the_server(
    silent_url: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moondream_cv.backends.http.PROBE_TIMEOUT", 240.0)
    engine = make_engine("caption", timeout=0.2, model=silent_url)
    start = time.monotonic()
    (outputs,) = run_engine(engine, bgr)
    assert outputs["error_status"] is True
    assert time.monotonic() - start < 240


def test_error_message_of_a_silent_server_names_the_time_out(
    silent_url: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moondream_cv.backends.http.PROBE_TIMEOUT", 0.1)
    (outputs,) = run_engine(make_engine("caption", timeout=0.1, model=silent_url), bgr)
    assert "did not respond" in outputs["error_message"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("response", INVALID_RESPONSES)
def test_invalid_response_returns_error_outputs(
    block: str, response: str, remote: RemoteServer, bgr: np.ndarray
) -> None:
    answer, message = INVALID_RESPONSES[response]
    for route in ROUTES:
        remote.on(route, answer)
    (outputs,) = run_engine(make_engine(block, model=remote.url), bgr)
    assert_failed(block, outputs, message)
    assert remote.url in outputs["error_message"]


@pytest.mark.parametrize("block", BLOCKS)
def test_unknown_api_returns_error_outputs(block: str, bgr: np.ndarray) -> None:
    with remote_server() as other:
        (outputs,) = run_engine(make_engine(block, model=other.url), bgr)
    assert_failed(block, outputs, f"{other.url} has an unknown API")


@pytest.mark.parametrize("block", ["detect", "caption", "track"])
def test_server_error_for_one_image_does_not_affect_the_others(
    block: str, remote: RemoteServer, bgr: np.ndarray
) -> None:
    def reply(asked: ReceivedRequest) -> Reply:
        found = Reply({"objects": [BOX], "caption": "a picture"})
        return BAD_REQUEST if _size_of(asked) == (20, 20) else found

    remote.on("/v1/detect", reply).on("/v1/caption", reply)
    small = np.zeros((20, 20, 3), np.uint8)
    images = [image_data(bgr, "a"), image_data(small, "b"), image_data(bgr, "c")]
    first, failed, last = run_engine(make_engine(block, model=remote.url), images)
    assert_failed(block, failed, "not today")
    assert comparable(first) == comparable(last)
    assert first["error_message"] == ""
    assert comparable(first) != {**EMPTY[block], **NO_ERROR}


def _size_of(asked: ReceivedRequest) -> tuple[int, int]:
    """Return width and height of the image in a request."""
    return Image.open(io.BytesIO(base64.b64decode(asked.body["image_url"].partition(",")[2]))).size


@pytest.mark.parametrize("block", ["detect", "track"])
def test_frame_after_a_server_error_is_processed(block: str, remote: RemoteServer, bgr: np.ndarray) -> None:
    remote.on("/v1/detect", BAD_REQUEST, Reply({"objects": [BOX]}))
    engine = make_engine(block, model=remote.url, class_names=["dog"], **({"every": 1} if block == "track" else {}))
    (failed,) = run_engine(engine, image_data(bgr, number=1))
    assert_failed(block, failed, "not today")
    (outputs,) = run_engine(engine, image_data(bgr, number=2))
    probes = len(remote.to("/v1/models"))
    run_engine(engine, image_data(bgr, number=3))
    found = outputs["tracked_detections" if block == "track" else "predictions"]
    np.testing.assert_allclose(found.xyxy, [BOX_XYXY])
    assert outputs["error_message"] == ""
    assert len(remote.to("/v1/models")) == probes  # the connection is kept


def test_failed_connection_is_not_retried_for_every_frame(bgr: np.ndarray) -> None:
    with remote_server() as server:
        engine = make_engine("caption", model=server.url)
        (failed,) = run_engine(engine, bgr)
        requests = len(server.requests)
        (again,) = run_engine(engine, bgr)
    assert failed == again
    assert len(server.requests) == requests > 0


def test_server_that_starts_later_is_connected(bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RETRY_SECONDS", 0.0)
    with remote_server() as server:
        server.on("/v1/models", Reply({}, 404), MODELS_ANSWER).on("/v1/caption", Reply({"caption": "a picture"}))
        engine = make_engine("caption", model=server.url)
        assert [run_engine(engine, bgr)[0]["caption"] for _ in range(3)] == ["", "a picture", "a picture"]


# Tracks across failures


@pytest.mark.parametrize(
    "bad",
    [
        "damaged file",
        "invalid base64",
        "no pixels",
        "no height",
        "floats out of range",
        "too many channels",
    ],
)
def test_track_ids_survive_a_bad_frame(bad: str, bgr: np.ndarray, tmp_path: Path) -> None:
    engine = make_engine("track", every=1)
    (before,) = run_engine(engine, image_data(bgr, number=1))
    run_engine(engine, bad_image(bad, tmp_path, number=2))
    (after,) = run_engine(engine, image_data(bgr, number=3))
    assert after["tracked_detections"].tracker_id.tolist() == before["tracked_detections"].tracker_id.tolist() == [1, 2]


def test_track_ids_survive_a_failed_keyframe(remote: RemoteServer, bgr: np.ndarray) -> None:
    remote.on("/v1/detect", Reply({"objects": [BOX]}), BAD_REQUEST, Reply({"objects": [BOX]}))
    engine = make_engine("track", model=remote.url, class_names=["dog"], every=2)
    found = [run_engine(engine, image_data(bgr, number=number))[0] for number in range(1, 6)]
    assert [outputs["error_status"] for outputs in found] == [False, False, True, True, False]
    assert [outputs["tracked_detections"].tracker_id.tolist() for outputs in found] == [[1], [1], [], [1], [1]]
    assert len(remote.to("/v1/detect")) == 3


def test_restarted_video_keeps_no_tracks_if_its_first_keyframe_fails(remote: RemoteServer, bgr: np.ndarray) -> None:
    remote.on("/v1/detect", Reply({"objects": [BOX]}), BAD_REQUEST, Reply({"objects": []}))
    engine = make_engine("track", model=remote.url, class_names=["dog"])
    run_engine(engine, image_data(bgr, number=50))
    run_engine(engine, image_data(bgr, number=1))  # the video restarts, and the model fails on its first frame
    (outputs,) = run_engine(engine, image_data(bgr, number=2))
    assert len(outputs["tracked_detections"]) == 0


def test_removed_class_has_no_tracks_after_a_failed_keyframe(remote: RemoteServer, bgr: np.ndarray) -> None:
    found = Reply({"objects": [BOX]})
    remote.on("/v1/detect", found, found, BAD_REQUEST, found)
    definition = workflow(
        minimal_step("track", model=remote.url, class_names="$inputs.class_names"), parameters=["class_names"]
    )
    engine = compile_workflow(definition, **{"moondream_cv_blocks.models": ModelPool()})
    run_engine(engine, image_data(bgr, number=1), class_names=["dog", "bus"])
    run_engine(engine, image_data(bgr, number=2), class_names=["dog"])
    (outputs,) = run_engine(engine, image_data(bgr, number=3), class_names=["dog"])
    assert set(outputs["tracked_detections"].data["class_name"]) <= {"dog"}


# Steps after a failed step


@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_of_a_failed_step_are_json_serializable(block: str, closed_url: str, bgr: np.ndarray) -> None:
    (outputs,) = run_engine(make_engine(block, model=closed_url), image_data(bgr), serialize=True)
    assert json.loads(json.dumps(outputs)) == outputs
    assert outputs["error_status"] is True
    for name, empty in EMPTY[block].items():
        no_predictions = {"image": {"width": 320, "height": 240}, "predictions": []}
        assert outputs[name] == (no_predictions if empty is NO_DETECTIONS else empty)


@pytest.mark.parametrize(
    ("block", "output", "visualization"),
    [
        ("detect", "predictions", "bounding_box_visualization"),
        ("detect", "predictions", "label_visualization"),
        ("point", "predictions", "dot_visualization"),
        ("point", "predictions", "keypoint_visualization"),
        ("track", "tracked_detections", "bounding_box_visualization"),
        ("track", "new_instances", "trace_visualization"),
    ],
)
def test_visualizations_accept_the_outputs_of_a_failed_step(
    block: str, output: str, visualization: str, closed_url: str, bgr: np.ndarray
) -> None:
    drawn = {
        "type": f"roboflow_core/{visualization}@v1",
        "name": "drawn",
        "image": "$inputs.image",
        "predictions": f"$steps.step.{output}",
    }
    definition = workflow(minimal_step(block, model=closed_url), drawn, outputs=["step.error_status", "drawn.image"])
    (outputs,) = run_workflow(definition, image_data(bgr))
    assert outputs["step.error_status"] is True
    np.testing.assert_array_equal(outputs["drawn.image"].numpy_image, bgr)


def test_line_counter_counts_objects_that_cross_during_failures(remote: RemoteServer, bgr: np.ndarray) -> None:
    """The object crosses the line while the model fails."""
    boxes = [Reply({"objects": [{**BOX, "x_min": x, "x_max": x + 0.4}]}) for x in (0.05, 0.2, 0.35, 0.5)]
    remote.on("/v1/detect", BAD_REQUEST, *boxes[:2], BAD_REQUEST, *boxes[2:])
    counter = {
        "type": "roboflow_core/line_counter@v2",
        "name": "counter",
        "image": "$inputs.image",
        "detections": "$steps.step.tracked_detections",
        "line_segment": [[160, 0], [160, 240]],
        "triggering_anchor": "CENTER",
    }
    tracking = minimal_step("track", model=remote.url, class_names=["dog"], every=1)
    outputs = ["step.error_status", "step.tracked_detections", "counter.count_in", "counter.count_out"]
    definition = workflow(tracking, counter, outputs=outputs)
    engine = compile_workflow(definition, **{"moondream_cv_blocks.models": ModelPool()})
    frames = [run_engine(engine, image_data(bgr, number=number))[0] for number in range(1, 7)]
    assert [frame["step.error_status"] for frame in frames] == [True, False, False, True, False, False]
    track_ids = [frame["step.tracked_detections"].tracker_id.tolist() for frame in frames]
    assert track_ids == [[], [1], [1], [], [1], [1]]
    assert [frame["counter.count_in"] + frame["counter.count_out"] for frame in frames] == [0, 0, 0, 0, 1, 1]


# Remote models


@pytest.mark.parametrize(("block", "skill"), [("point", "point"), ("query", "query"), ("caption", "caption")])
def test_unsupported_skill_returns_error_outputs(block: str, skill: str, url: str, bgr: np.ndarray) -> None:
    """Roboflow's server supports detect only."""
    (outputs,) = run_engine(make_engine(block, model=url), image_data(bgr))
    assert_failed(block, outputs, skill)
    assert "detect" in outputs["error_message"]


@pytest.mark.parametrize("block", ["detect", "track"])
def test_supported_skill_of_a_roboflow_server_works(block: str, url: str, tiny: LocalModel, bgr: np.ndarray) -> None:
    (outputs,) = run_engine(make_engine(block, model=url), image_data(bgr))
    name = "tracked_detections" if block == "track" else "predictions"
    expected = expected_outputs(block, tiny, bgr)[name]
    assert outputs["error_message"] == ""
    assert _as_lists(outputs[name])["class_name"] == expected["class_name"] == ["dog", "bus"]
    np.testing.assert_allclose(outputs[name].xyxy, expected["xyxy"], atol=1.0)  # the server rounds to whole pixels


@pytest.fixture(scope="module")
def served_url(tiny: LocalModel) -> Iterator[str]:
    """Return the URL of `moondream-cv serve` with the tiny model."""
    with served(tiny) as running:
        yield running.url


@pytest.mark.parametrize("block", BLOCKS)
def test_served_model_matches_the_local_model(
    block: str, served_url: str, tiny: LocalModel, bgr: np.ndarray, other_bgr: np.ndarray
) -> None:
    images = [image_data(bgr, "a"), image_data(np.zeros((0, 0, 3), np.uint8), "b"), image_data(other_bgr, "c")]
    first, failed, last = run_engine(make_engine(block, model=served_url), images)
    assert_failed(block, failed, "has no pixels")
    for outputs, pixels in ((first, bgr), (last, other_bgr)):
        assert_outputs(outputs, expected_outputs(block, tiny, pixels), pixels=1.0)  # images are sent as JPEG
