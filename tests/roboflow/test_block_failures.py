"""Failures while a workflow runs: each block says which image failed and why, and the others and later frames go on."""

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
from moondream_cv.engine.local import LocalModel
from moondream_cv.images import to_rgb
from moondream_cv.scenes import render_scene
from moondream_cv_blocks import ModelPool, pool
from tests.helpers.remote_server import Answer, Asked, RemoteServer, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.served import served
from tests.helpers.workflows import BLOCKS, FINDERS, compiled, refusal, results, run, step, workflow

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
NOTHING: dict[str, list[Any]] = {"xyxy": [], "confidence": [], "class_name": []}
EMPTY: dict[str, dict[str, Any]] = {
    "detect": {"predictions": NOTHING},
    "point": {"predictions": NOTHING, "points": []},
    "query": {"answer": "", "reasoning": "", "grounding": []},
    "caption": {"caption": ""},
    "track": {"tracked_detections": NOTHING, "new_instances": NOTHING, "already_seen_instances": NOTHING},
}
FINE = {"error_status": False, "error_message": ""}
BAD = {
    "a damaged file": "the image cannot be read",
    "text that is no image": "the image cannot be read",
    "no pixels": "has no pixels: it is 0 wide and 0 high",
    "no height": "has no pixels: it is 10 wide and 0 high",
    "floats out of range": "has values from 7.5 to 7.5",
    "too many channels": "of shape (4, 4, 5)",
}
ODD = ("1x1", "grey", "grey with an axis", "with transparency", "floats")

OURS = Answer({"models": [{"id": "tiny", "has_scores": True}]})
BOX = {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "confidence": 0.5}
BOX_XYXY = [32, 60, 160, 180]  # on 320x240
REFUSED = Answer({"error": "not today"}, 400)  # which is not tried again
ROUTES = ("/v1/detect", "/v1/point", "/v1/query", "/v1/caption")
RUBBISH = {
    "HTML": (Answer(b"<html>hello</html>", kind="text/html"), "answered text/html that is no JSON"),
    "JSON of another shape": (Answer({"result": [1]}), "answered no '"),
    "a list": (Answer([1]), "answered no JSON object"),
    "other types": (Answer({"objects": 1, "points": 1, "answer": 1, "caption": 1}), "answered no '"),
    "500": (Answer({"error": "no memory"}, 500), "answered 500"),
    "nothing more": (Answer(fault="cut"), "broke off"),
}


@pytest.fixture
def remote() -> Iterator[RemoteServer]:
    """A server that says it is one of ours, and is told what else to answer."""
    with remote_server() as running:
        yield running.on("/v1/models", OURS)


@pytest.fixture
def silent_url() -> Iterator[str]:
    """Where connections are taken and nothing is ever said."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def other_bgr() -> np.ndarray:
    """[240, 320, 3]: another picture, with two dogs and no bus."""
    scene = render_scene(8, resolution_wh=(320, 240), names=["dog", "red circle", "dog"], style="plain")
    return np.ascontiguousarray(scene.image[..., ::-1])


def image_data(pixels: Any = None, source: str = "camera", number: int = 1, **origin: Any) -> Any:
    """What the engine makes of an image: one of its own, so that anything can be in it.

    Args:
        origin: Where the pixels come from, in the place of `pixels`.
    """
    from roboflow_workflows.execution_engine.entities.base import ImageParentMetadata, VideoMetadata, WorkflowImageData

    metadata = VideoMetadata(
        video_identifier=source, frame_number=number, frame_timestamp=datetime.now(timezone.utc), fps=10
    )
    return WorkflowImageData(ImageParentMetadata("image"), numpy_image=pixels, video_metadata=metadata, **origin)


def bad_image(kind: str, folder: Path, **metadata: Any) -> Any:
    """One of `BAD`."""
    if kind == "a damaged file":
        (folder / "damaged.png").write_bytes(b"\x89PNG and no more")
        return image_data(image_reference=str(folder / "damaged.png"), **metadata)
    if kind == "text that is no image":
        return image_data(base64_image="!!", **metadata)
    pixels = {
        "no pixels": np.zeros((0, 0, 3), np.uint8),
        "no height": np.zeros((0, 10, 3), np.uint8),
        "floats out of range": np.full((20, 20, 3), 7.5),
        "too many channels": np.zeros((4, 4, 5), np.uint8),
    }
    return image_data(pixels[kind], **metadata)


def odd_image(kind: str, bgr: np.ndarray) -> np.ndarray:
    """One of `ODD`."""
    return {
        "1x1": np.full((1, 1, 3), 200, np.uint8),
        "grey": bgr.mean(2).astype(np.uint8),
        "grey with an axis": bgr.mean(2, keepdims=True).astype(np.uint8),
        "with transparency": np.dstack([bgr, np.full(bgr.shape[:2], 90, np.uint8)]),
        "floats": bgr / 255,
    }[kind]


def comparable(outputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs without ids, and detections as lists."""
    return {name: _listed(value) if hasattr(value, "xyxy") else value for name, value in outputs.items()}


def _listed(detections: Any) -> dict[str, list[Any]]:
    return {
        "xyxy": detections.xyxy.tolist(),
        "confidence": detections.confidence.tolist(),
        "class_name": detections.data["class_name"].tolist(),
    }


def direct(block: str, tiny: LocalModel, pixels: np.ndarray) -> dict[str, Any]:
    """What a block should say of an image, without a workflow."""
    names = ["dog", "bus"]
    if block in ("detect", "track"):
        found = _listed(Detector(tiny)(pixels, names))
        boxes = {"tracked_detections": found, "new_instances": found, "already_seen_instances": NOTHING}
        return {"predictions": found} if block == "detect" else boxes
    if block == "point":
        found = _listed(Pointer(tiny)(pixels, names))
        points = [{"x": x, "y": y, "positive": True} for x, y, *_ in found["xyxy"]]
        return {"predictions": found, "points": points}
    picture = Image.fromarray(to_rgb(pixels))
    if block == "query":
        answer = tiny.query(picture, QUESTION, settings={"temperature": 0.0})["answer"]
        return {"answer": answer, "reasoning": "", "grounding": []}
    return {"caption": tiny.caption(picture, settings={"temperature": 0.0})["caption"]}


def block_step(block: str, **fields: Any) -> dict[str, Any]:
    return step(block, **{**REQUIRED[block], **fields})


def engine_of(block: str, timeout: float = 5.0, **fields: Any) -> Any:
    """An engine with one block and models of its own."""
    models = {"moondream_cv_blocks.models": ModelPool(timeout=timeout)}
    return compiled(workflow(block_step(block, **fields)), **models)


def check_fine(outputs: dict[str, Any], expected: dict[str, Any], pixels: float = 1e-3) -> None:
    """A block gives this on an image, and no error.

    Args:
        expected: As `direct` gives it; the same, apart from rounding, which differs with the size of a batch.
        pixels: How far boxes and points may lie apart.
    """
    said = comparable(outputs)
    assert said.keys() == expected.keys() | FINE.keys()
    assert {name: said[name] for name in FINE} == FINE
    for name, value in expected.items():
        if not isinstance(value, dict):
            assert said[name] == value or name == "points"
            continue
        assert said[name]["class_name"] == value["class_name"]
        np.testing.assert_allclose(said[name]["xyxy"], value["xyxy"], atol=pixels)
        np.testing.assert_allclose(said[name]["confidence"], value["confidence"], atol=pixels / 100 + 1e-4)
    if "points" in expected:
        assert [(p["x"], p["y"], p["positive"]) for p in said["points"]] == [
            (x, y, True) for x, y, *_ in said["predictions"]["xyxy"]
        ]


def check_failed(block: str, outputs: dict[str, Any], says: str) -> None:
    """A block gives nothing on an image, and says why."""
    message = outputs["error_message"]
    assert says in message
    assert comparable(outputs) == {**EMPTY[block], "error_status": True, "error_message": message}


# An image that fails


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bad", BAD)
def test_an_image_fails_alone(
    block: str, bad: str, tiny: LocalModel, bgr: np.ndarray, other_bgr: np.ndarray, tmp_path: Path
) -> None:
    images = [image_data(bgr, "a"), bad_image(bad, tmp_path, source="b"), image_data(other_bgr, "c")]
    first, failed, last = run(workflow(block_step(block)), images)
    check_failed(block, failed, BAD[bad])
    check_fine(first, direct(block, tiny, bgr))
    check_fine(last, direct(block, tiny, other_bgr))
    assert comparable(first) != comparable(last)


@pytest.mark.parametrize("block", BLOCKS)
def test_nothing_but_images_that_fail(block: str, tmp_path: Path) -> None:
    images = [bad_image(bad, tmp_path, source=bad) for bad in BAD]
    for outputs, says in zip(run(workflow(block_step(block)), images), BAD.values(), strict=True):
        check_failed(block, outputs, says)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bad", BAD)
def test_the_outputs_of_a_failed_image_go_through_json(block: str, bad: str, tmp_path: Path) -> None:
    (outputs,) = run(workflow(block_step(block)), bad_image(bad, tmp_path), serialize=True)
    assert json.loads(json.dumps(outputs)) == outputs
    assert outputs["error_status"] is True
    for name, empty in EMPTY[block].items():
        assert (outputs[name]["predictions"] if empty is NOTHING else outputs[name]) == (
            [] if empty is NOTHING else empty
        )


@pytest.mark.parametrize("block", FINDERS)
def test_the_message_of_an_image_does_not_number_it_wrongly(block: str, tmp_path: Path) -> None:
    images = [bad_image(bad, tmp_path, source=bad) for bad in ("a damaged file", "no pixels")]
    _, second = run(workflow(block_step(block)), images)
    assert "frames[0]" not in second["error_message"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("odd", ODD)
def test_unusual_images(block: str, odd: str, tiny: LocalModel, bgr: np.ndarray) -> None:
    pixels = odd_image(odd, bgr)
    (outputs,) = run(workflow(block_step(block)), image_data(pixels))
    check_fine(outputs, direct(block, tiny, pixels))


# Values that come at run time


@pytest.mark.parametrize(
    ("block", "field", "values"),
    [
        *((block, "class_names", [[], ["dog", "dog"], 5, None, [["dog"]], "", ","]) for block in FINDERS),
        *((block, "model", ["moondream3", "./nothing", "ftp://example.org", 5, None]) for block in BLOCKS),
        *((block, "confidence", [2, -0.1, "much", None]) for block in FINDERS),
        ("detect", "nms", [2, "much"]),
        ("point", "max_objects", [0, 1.5, None]),
        ("track", "every", [0, -1, None]),
        ("query", "question", [5, "", None, ["What?"]]),
        ("caption", "length", ["medium", 5, None]),
        ("caption", "max_tokens", [0, "many"]),
        ("caption", "temperature", [-1, "hot"]),
    ],
)
def test_wrong_inputs(block: str, field: str, values: list[Any], bgr: np.ndarray) -> None:
    often = {"every": 1} if block == "track" and field != "every" else {}
    engine = compiled(workflow(block_step(block, **often, **{field: f"$inputs.{field}"}), parameters=[field]))
    for value in values:
        (outputs,) = results(engine, bgr, **{field: value})
        check_failed(block, outputs, "" if field == "model" and isinstance(value, str) else field)


@pytest.mark.parametrize(
    ("block", "field", "value", "says"),
    [
        *((block, "class_names", [], "must name at least one class") for block in FINDERS),
        *((block, "class_names", ["dog", " dog"], "duplicates: 'dog'") for block in FINDERS),
        *((block, "class_names", 5, "not int: 5") for block in FINDERS),
        *((block, "class_names", [["dog"]], "must be a string, not list") for block in FINDERS),
        *((block, "class_names", {"dog": 1}, "not dict") for block in FINDERS),
        *((block, "class_names", ["\ud800"], "not valid Unicode") for block in FINDERS),
        *((block, "model", "moondream3", "did you mean 'moondream2'?") for block in BLOCKS),
        *((block, "model", 5, "model must be a name or the URL of a server, not int") for block in BLOCKS),
        *((block, "confidence", 2, "confidence must be between 0 and 1, got 2") for block in FINDERS),
        *((block, "confidence", "much", "confidence must be between 0 and 1") for block in FINDERS),
        *((block, "max_objects", 0, "max_objects must be an integer between 1 and 2147483647, got 0") for block in FINDERS),
        ("detect", "nms", -1, "nms must be between 0 and 1, got -1"),
        ("track", "nms", -1, "nms must be between 0 and 1, got -1"),
        ("track", "every", 0, "every must be an integer between 1 and 2147483647, got 0"),
        ("track", "every", "often", "every must be an integer between 1 and 2147483647, got 'often'"),
        ("query", "question", 5, "question must be a text, not int"),
        ("query", "question", " ", "question must not be empty"),
        ("query", "question", "Is there a {thing}?", "the placeholder {thing}"),
        *(
            (block, "max_tokens", 0, "max_tokens must be an integer between 1 and 2147483647")
            for block in ("query", "caption")
        ),
        *((block, "temperature", -1, "temperature must be between 0 and 2, got -1") for block in ("query", "caption")),
        ("caption", "length", "medium", "length must be one of short, normal, long, got 'medium'"),
        ("caption", "length", 5, "length must be one of short, normal, long, got 5"),
    ],
)
def test_wrong_values_of_other_steps(block: str, field: str, value: Any, says: str, bgr: np.ndarray) -> None:
    """Of what a step gives the engine knows nothing."""
    for outputs in results(fed_engine(block, field), [image_data(bgr), image_data(bgr, "b")], value=value):
        check_failed(block, outputs, says)


def fed_engine(block: str, field: str) -> Any:
    """An engine with a block of which one field comes from another step, which hands over what `value` brings."""
    giver = {"type": "roboflow_core/first_non_empty_or_default@v1", "name": "giver", "data": ["$inputs.value"]}
    return compiled(workflow(giver, block_step(block, **{field: "$steps.giver.output"}), parameters=["value"]))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_frame_after_a_wrong_value(block: str, tiny: LocalModel, bgr: np.ndarray) -> None:
    engine = fed_engine(block, "model")
    (failed,) = results(engine, image_data(bgr, number=1), value="moondream3")
    (fine,) = results(engine, image_data(bgr, number=6), value="tiny")  # 5 frames on, tracks look again
    assert failed["error_status"] is True
    check_fine(fine, direct(block, tiny, bgr))


@pytest.mark.parametrize("block", FINDERS)
@pytest.mark.parametrize("many", [True, False])
def test_a_hundred_names_at_run_time(block: str, many: bool, tiny: LocalModel, bgr: np.ndarray) -> None:
    """The names of the test are the last of them: nothing that the picture shows is called like the others."""
    names = [*(f"thing {number}" for number in range(98)), "dog", "bus"]
    (outputs,) = results(fed_engine(block, "class_names"), image_data(bgr), value=names if many else ", ".join(names))
    found = outputs["tracked_detections" if block == "track" else "predictions"]
    assert outputs["error_message"] == ""
    known = np.isin(found.class_id, [98, 99])
    expected = direct(block, tiny, bgr)["tracked_detections" if block == "track" else "predictions"]
    np.testing.assert_allclose(found.xyxy[known], expected["xyxy"], atol=1e-3)
    assert found.data["class_name"][known].tolist() == expected["class_name"]


@pytest.mark.parametrize("value", ["no", "false"])
def test_no_reasoning_at_run_time(value: str, bgr: np.ndarray) -> None:
    definition = workflow(block_step("query", reasoning="$inputs.reasoning"), parameters=["reasoning"])
    (outputs,) = run(definition, bgr, reasoning=value)
    assert outputs["reasoning"] == ""


def test_a_very_large_interval(bgr: np.ndarray) -> None:
    (outputs,) = run(workflow(block_step("track", every=2**31 - 1)), bgr)
    assert len(outputs["tracked_detections"])
    assert refusal(workflow(block_step("track", every=10**400))).startswith("every: ")


# Servers that fail


@pytest.mark.parametrize("block", BLOCKS)
def test_a_server_that_refuses(block: str, closed_url: str, bgr: np.ndarray) -> None:
    for outputs in results(engine_of(block, model=closed_url), [image_data(bgr), image_data(bgr, "b")]):
        check_failed(block, outputs, f"{closed_url}/v1/models is not reachable")


@pytest.mark.parametrize("block", BLOCKS)
def test_a_server_that_hangs(block: str, remote: RemoteServer, bgr: np.ndarray) -> None:
    for route in ROUTES:
        remote.on(route, Answer(fault="hang"))
    (outputs,) = results(engine_of(block, timeout=0.3, model=remote.url), bgr)
    check_failed(block, outputs, "did not answer within 0.3 s")


@pytest.mark.parametrize("block", BLOCKS)
def test_a_server_that_never_says_anything(
    block: str, silent_url: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moondream_cv.backends.http.PROBE_TIMEOUT", 0.1)
    (outputs,) = results(engine_of(block, model=silent_url), bgr)
    check_failed(block, outputs, silent_url)


def test_the_time_out_counts_from_the_first_question(
    silent_url: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moondream_cv.backends.http.PROBE_TIMEOUT", 240.0)
    engine = engine_of("caption", timeout=0.2, model=silent_url)
    start = time.monotonic()
    (outputs,) = results(engine, bgr)
    assert outputs["error_status"] is True
    assert time.monotonic() - start < 240


def test_a_silent_server_is_said_to_be_silent(
    silent_url: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moondream_cv.backends.http.PROBE_TIMEOUT", 0.1)
    (outputs,) = results(engine_of("caption", timeout=0.1, model=silent_url), bgr)
    assert "did not answer" in outputs["error_message"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rubbish", RUBBISH)
def test_a_server_that_answers_rubbish(block: str, rubbish: str, remote: RemoteServer, bgr: np.ndarray) -> None:
    answer, says = RUBBISH[rubbish]
    for route in ROUTES:
        remote.on(route, answer)
    (outputs,) = results(engine_of(block, model=remote.url), bgr)
    check_failed(block, outputs, says)
    assert remote.url in outputs["error_message"]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_server_that_is_no_model(block: str, bgr: np.ndarray) -> None:
    with remote_server() as other:
        (outputs,) = results(engine_of(block, model=other.url), bgr)
    check_failed(block, outputs, f"{other.url} does not say what it is")


@pytest.mark.parametrize("block", ["detect", "caption", "track"])
def test_a_server_that_fails_on_one_image(block: str, remote: RemoteServer, bgr: np.ndarray) -> None:
    def reply(asked: Asked) -> Answer:
        fine = Answer({"objects": [BOX], "caption": "a picture"})
        return REFUSED if _size_of(asked) == (20, 20) else fine

    remote.on("/v1/detect", reply).on("/v1/caption", reply)
    small = np.zeros((20, 20, 3), np.uint8)
    images = [image_data(bgr, "a"), image_data(small, "b"), image_data(bgr, "c")]
    first, failed, last = results(engine_of(block, model=remote.url), images)
    check_failed(block, failed, "not today")
    assert comparable(first) == comparable(last)
    assert first["error_message"] == ""
    assert comparable(first) != {**EMPTY[block], **FINE}


def _size_of(asked: Asked) -> tuple[int, int]:
    """Width and height of the image in a request."""
    return Image.open(io.BytesIO(base64.b64decode(asked.body["image_url"].partition(",")[2]))).size


@pytest.mark.parametrize("block", ["detect", "track"])
def test_the_next_frame_after_a_server_failed(block: str, remote: RemoteServer, bgr: np.ndarray) -> None:
    remote.on("/v1/detect", REFUSED, Answer({"objects": [BOX]}))
    engine = engine_of(block, model=remote.url, class_names=["dog"], **({"every": 1} if block == "track" else {}))
    (failed,) = results(engine, image_data(bgr, number=1))
    check_failed(block, failed, "not today")
    (fine,) = results(engine, image_data(bgr, number=2))
    asked = len(remote.to("/v1/models"))
    results(engine, image_data(bgr, number=3))
    found = fine["tracked_detections" if block == "track" else "predictions"]
    np.testing.assert_allclose(found.xyxy, [BOX_XYXY])
    assert fine["error_message"] == ""
    assert len(remote.to("/v1/models")) == asked  # it stays connected


def test_a_server_that_is_not_there_is_not_asked_for_every_frame(bgr: np.ndarray) -> None:
    with remote_server() as server:
        engine = engine_of("caption", model=server.url)
        (failed,) = results(engine, bgr)
        asked = len(server.asked)
        (again,) = results(engine, bgr)
    assert failed == again
    assert len(server.asked) == asked > 0


def test_a_server_that_comes_later(bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RETRY_SECONDS", 0.0)
    with remote_server() as server:
        server.on("/v1/models", Answer({}, 404), OURS).on("/v1/caption", Answer({"caption": "a picture"}))
        engine = engine_of("caption", model=server.url)
        assert [results(engine, bgr)[0]["caption"] for _ in range(3)] == ["", "a picture", "a picture"]


# Tracks across failures


@pytest.mark.parametrize(
    "bad",
    [
        "a damaged file",
        "text that is no image",
        "no pixels",
        "no height",
        "floats out of range",
        "too many channels",
    ],
)
def test_things_keep_their_numbers_over_a_bad_frame(bad: str, bgr: np.ndarray, tmp_path: Path) -> None:
    engine = engine_of("track", every=1)
    (before,) = results(engine, image_data(bgr, number=1))
    results(engine, bad_image(bad, tmp_path, number=2))
    (after,) = results(engine, image_data(bgr, number=3))
    assert after["tracked_detections"].tracker_id.tolist() == before["tracked_detections"].tracker_id.tolist() == [1, 2]


def test_things_keep_their_numbers_over_a_failed_look(remote: RemoteServer, bgr: np.ndarray) -> None:
    remote.on("/v1/detect", Answer({"objects": [BOX]}), REFUSED, Answer({"objects": [BOX]}))
    engine = engine_of("track", model=remote.url, class_names=["dog"], every=2)
    found = [results(engine, image_data(bgr, number=number))[0] for number in range(1, 6)]
    assert [outputs["error_status"] for outputs in found] == [False, False, True, True, False]
    assert [outputs["tracked_detections"].tracker_id.tolist() for outputs in found] == [[1], [1], [], [1], [1]]
    assert len(remote.to("/v1/detect")) == 3


def test_nothing_stays_from_before_where_the_first_look_fails(remote: RemoteServer, bgr: np.ndarray) -> None:
    remote.on("/v1/detect", Answer({"objects": [BOX]}), REFUSED, Answer({"objects": []}))
    engine = engine_of("track", model=remote.url, class_names=["dog"])
    results(engine, image_data(bgr, number=50))
    results(engine, image_data(bgr, number=1))  # the video starts again, and the model fails on it
    (outputs,) = results(engine, image_data(bgr, number=2))
    assert len(outputs["tracked_detections"]) == 0


def test_fewer_names_where_the_look_fails(remote: RemoteServer, bgr: np.ndarray) -> None:
    found = Answer({"objects": [BOX]})
    remote.on("/v1/detect", found, found, REFUSED, found)
    definition = workflow(
        block_step("track", model=remote.url, class_names="$inputs.class_names"), parameters=["class_names"]
    )
    engine = compiled(definition, **{"moondream_cv_blocks.models": ModelPool()})
    results(engine, image_data(bgr, number=1), class_names=["dog", "bus"])
    results(engine, image_data(bgr, number=2), class_names=["dog"])
    (outputs,) = results(engine, image_data(bgr, number=3), class_names=["dog"])
    assert set(outputs["tracked_detections"].data["class_name"]) <= {"dog"}


# What comes after a step that failed


@pytest.mark.parametrize("block", BLOCKS)
def test_the_outputs_of_a_failed_step_go_through_json(block: str, closed_url: str, bgr: np.ndarray) -> None:
    (outputs,) = results(engine_of(block, model=closed_url), image_data(bgr), serialize=True)
    assert json.loads(json.dumps(outputs)) == outputs
    assert outputs["error_status"] is True
    for name, empty in EMPTY[block].items():
        nothing = {"image": {"width": 320, "height": 240}, "predictions": []}
        assert outputs[name] == (nothing if empty is NOTHING else empty)


@pytest.mark.parametrize(
    ("block", "output", "drawing"),
    [
        ("detect", "predictions", "bounding_box_visualization"),
        ("detect", "predictions", "label_visualization"),
        ("point", "predictions", "dot_visualization"),
        ("point", "predictions", "keypoint_visualization"),
        ("track", "tracked_detections", "bounding_box_visualization"),
        ("track", "new_instances", "trace_visualization"),
    ],
)
def test_a_picture_of_a_failed_step(block: str, output: str, drawing: str, closed_url: str, bgr: np.ndarray) -> None:
    drawn = {
        "type": f"roboflow_core/{drawing}@v1",
        "name": "drawn",
        "image": "$inputs.image",
        "predictions": f"$steps.step.{output}",
    }
    definition = workflow(block_step(block, model=closed_url), drawn, outputs=["step.error_status", "drawn.image"])
    (outputs,) = run(definition, image_data(bgr))
    assert outputs["step.error_status"] is True
    np.testing.assert_array_equal(outputs["drawn.image"].numpy_image, bgr)


def test_a_line_counter_over_frames_that_failed(remote: RemoteServer, bgr: np.ndarray) -> None:
    """A thing crosses the line while the model fails."""
    boxes = [Answer({"objects": [{**BOX, "x_min": x, "x_max": x + 0.4}]}) for x in (0.05, 0.2, 0.35, 0.5)]
    remote.on("/v1/detect", REFUSED, *boxes[:2], REFUSED, *boxes[2:])
    counter = {
        "type": "roboflow_core/line_counter@v2",
        "name": "counter",
        "image": "$inputs.image",
        "detections": "$steps.step.tracked_detections",
        "line_segment": [[160, 0], [160, 240]],
        "triggering_anchor": "CENTER",
    }
    tracking = block_step("track", model=remote.url, class_names=["dog"], every=1)
    outputs = ["step.error_status", "step.tracked_detections", "counter.count_in", "counter.count_out"]
    engine = compiled(workflow(tracking, counter, outputs=outputs), **{"moondream_cv_blocks.models": ModelPool()})
    frames = [results(engine, image_data(bgr, number=number))[0] for number in range(1, 7)]
    assert [frame["step.error_status"] for frame in frames] == [True, False, False, True, False, False]
    numbers = [frame["step.tracked_detections"].tracker_id.tolist() for frame in frames]
    assert numbers == [[], [1], [1], [], [1], [1]]
    assert [frame["counter.count_in"] + frame["counter.count_out"] for frame in frames] == [0, 0, 0, 0, 1, 1]


# Other places of the model


@pytest.mark.parametrize(("block", "skill"), [("point", "point"), ("query", "query"), ("caption", "caption")])
def test_a_skill_that_a_server_lacks(block: str, skill: str, url: str, bgr: np.ndarray) -> None:
    """Roboflow's own server detects, and that is all."""
    (outputs,) = results(engine_of(block, model=url), image_data(bgr))
    check_failed(block, outputs, skill)
    assert "detect" in outputs["error_message"]


@pytest.mark.parametrize("block", ["detect", "track"])
def test_the_skill_that_it_has(block: str, url: str, tiny: LocalModel, bgr: np.ndarray) -> None:
    (outputs,) = results(engine_of(block, model=url), image_data(bgr))
    name = "tracked_detections" if block == "track" else "predictions"
    expected = direct(block, tiny, bgr)[name]
    assert outputs["error_message"] == ""
    assert _listed(outputs[name])["class_name"] == expected["class_name"] == ["dog", "bus"]
    np.testing.assert_allclose(outputs[name].xyxy, expected["xyxy"], atol=1.0)  # it gives whole pixels


@pytest.fixture(scope="module")
def served_url(tiny: LocalModel) -> Iterator[str]:
    """`moondream-cv serve` with the tiny model."""
    with served(tiny) as running:
        yield running.url


@pytest.mark.parametrize("block", BLOCKS)
def test_a_server_of_ours_gives_what_the_model_gives(
    block: str, served_url: str, tiny: LocalModel, bgr: np.ndarray, other_bgr: np.ndarray
) -> None:
    images = [image_data(bgr, "a"), image_data(np.zeros((0, 0, 3), np.uint8), "b"), image_data(other_bgr, "c")]
    first, failed, last = results(engine_of(block, model=served_url), images)
    check_failed(block, failed, "has no pixels")
    for outputs, pixels in ((first, bgr), (last, other_bgr)):
        check_fine(outputs, direct(block, tiny, pixels), pixels=1.0)  # they travel as JPEG
