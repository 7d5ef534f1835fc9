"""X-AnyLabeling's tasks, requests and shapes, and its real client against a running server.

Run with `pytest tests/integrations/test_x_anylabeling.py`. The test of the client needs `x-anylabeling-cvhub`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from moondream_cv import Detector, Pointer, load, scenes
from moondream_cv.integrations.x_anylabeling import (
    MAX_CLASSES,
    build_prediction,
    build_requests,
    describe_model,
    parse_classes,
)
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectedObject,
    DetectedPoint,
    DetectResult,
    Point,
    PointResult,
    Query,
)

IMAGE = Image.new("RGB", (100, 50))


@pytest.mark.parametrize(
    ("prompt", "classes"),
    [
        ("dog", ["dog"]),
        ("dog, fire  hydrant,cat", ["dog", "fire hydrant", "cat"]),
        ("dog. cat.", ["dog", "cat"]),
        (" dog,, dog . cat", ["dog", "cat"]),
    ],
)
def test_classes_are_separated_by_commas_or_periods(prompt: str, classes: list[str]) -> None:
    assert parse_classes(prompt) == classes


@pytest.mark.parametrize("prompt", ["", " , . ", ",".join(map(str, range(MAX_CLASSES + 1)))])
def test_prompts_without_or_with_too_many_classes_are_rejected(prompt: str) -> None:
    with pytest.raises(ValueError, match="text_prompt must have"):
        parse_classes(prompt)


def test_tasks_select_the_requests() -> None:
    assert build_requests(None, "dog. cat", IMAGE) == [Detect(IMAGE, "dog"), Detect(IMAGE, "cat")]
    assert build_requests("point", "dog", IMAGE) == [Point(IMAGE, "dog")]
    assert build_requests("caption", None, IMAGE) == [Caption(IMAGE)]
    assert build_requests("query", "Is it 5 p.m., or later?", IMAGE) == [Query(IMAGE, "Is it 5 p.m., or later?")]
    with pytest.raises(ValueError, match="one of detect, point, caption, query, got 'segment'"):
        build_requests("segment", "dog", IMAGE)


def test_shapes_are_clipped_filtered_and_unique() -> None:
    boxes = DetectResult(
        (
            DetectedObject(-0.1, 0.2, 0.5, 1.2, 0.6),
            DetectedObject(0.0, 0.2, 0.5, 1.0, 0.9),  # the same box after clipping
            DetectedObject(1.1, 0.2, 1.2, 0.5, 0.9),  # outside the image
            DetectedObject(0.1, 0.2, 0.3, 0.4, 0.1),
        )
    )
    points = PointResult((DetectedPoint(0.5, 0.5, 0.75),))
    requests = [Detect(IMAGE, "dog"), Detect(IMAGE, "cat"), Point(IMAGE, "dog")]
    found = build_prediction(requests, [boxes, DetectResult(()), points], (100, 50), 0.25)
    assert [(shape["label"], shape["shape_type"], shape["points"], shape["score"]) for shape in found["shapes"]] == [
        ("dog", "rectangle", [[0.0, 10.0], [50.0, 10.0], [50.0, 50.0], [0.0, 50.0]], 0.9),
        ("dog", "point", [[50.0, 25.0]], 0.75),
    ]
    assert (found["description"], found["replace"]) == ("", None)


def test_descriptions_keep_the_shapes_of_the_image() -> None:
    found = build_prediction([Caption(IMAGE)], [CaptionResult("A dog.")], (100, 50))
    assert found == {"shapes": [], "description": "A dog.", "replace": False}


def test_description_of_a_model_depends_on_its_skills_and_scores() -> None:
    described = describe_model("tiny", {"detect", "gaze", "query"}, has_scores=False)
    assert [task["id"] for task in described["available_tasks"]] == ["detect", "query"]
    assert "edit_conf" not in described["available_tasks"][0]["active_widgets"]
    assert "edit_conf" in describe_model("tiny", {"detect"}, has_scores=True)["available_tasks"][0]["active_widgets"]


@pytest.mark.integrations
def test_client_of_x_anylabeling_draws_the_detections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    pytest.importorskip("anylabeling", reason="needs x-anylabeling-cvhub")
    from anylabeling import config
    from anylabeling.services.auto_labeling.remote_server import RemoteServer
    from PyQt6.QtGui import QImage

    from tests.helpers.served import served

    tiny, classes = load("tiny"), ["red circle", "cat", "dog"]
    path = tmp_path / "scene.png"
    scene = scenes.render_scene(5, resolution_wh=(320, 240), names=("red circle", "red circle", "cat"), style="plain")
    Image.fromarray(scene.image).save(path)
    expected = Detector(tiny)(str(path), classes), Pointer(tiny)(str(path), classes)
    with served(tiny, api_keys=("key",)) as server:
        settings = tmp_path / "settings.yaml"
        settings.write_text(
            f"remote_server_settings: {{server_url: '{server.url}/x-anylabeling', api_key: key}}", encoding="utf-8"
        )
        monkeypatch.setattr(config, "current_config_file", str(settings))
        monkeypatch.setattr(config, "_work_directory", str(tmp_path))
        messages: list[str] = []
        client = RemoteServer({"type": "remote_server", "display_name": "Remote"}, messages.append)
        assert list(client.get_available_models()) == ["tiny"]
        client.set_model_id("tiny")

        # Boxes and points
        image = QImage(str(path))
        for task, detections in zip(("detect", "point"), expected, strict=True):
            client.set_task(task)
            assert client.get_batch_processing_mode() == "text_prompt"
            drawn = client.predict_shapes(image, str(path), text_prompt="red circle, cat. dog.")
            assert drawn.replace
            assert [shape.label for shape in drawn.shapes] == list(detections.data["class_name"])
            assert len(drawn.shapes) == 3
            for shape, xyxy, confidence in zip(drawn.shapes, detections.xyxy, detections.confidence, strict=True):
                corners = [(point.x(), point.y()) for point in (shape.points[0], shape.points[len(shape.points) // 2])]
                assert [*corners[0], *corners[1]] == pytest.approx([float(value) for value in xyxy], abs=0.01)
                assert shape.score == pytest.approx(float(confidence), abs=1e-3)

        # Descriptions
        for task, prompt in (("caption", None), ("query", "How many cats are there?")):
            client.set_task(task)
            described = client.predict_shapes(image, str(path), text_prompt=prompt)
            assert described.description
            assert not described.replace
        assert not messages

        # Errors keep the shapes of the image
        client.set_task("detect")
        client.predict_shapes(image, str(path))
        assert "400" in messages[0]
