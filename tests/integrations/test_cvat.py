"""The auto-annotation function, loaded by cvat-cli and checked by the validation of cvat-sdk's driver."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector, Pointer
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import render_scene

pytestmark = pytest.mark.integrations
pytest.importorskip("cvat_cli", reason="needs cvat-cli (make test-integrations)")

CLASSES = ["red circle", "dog", "bus"]
FRAME = 7


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(render_scene(0, names=["dog", "dog", "red circle"], resolution_wh=(320, 240)).image)


def command_line_function(*parameters: str) -> Any:
    """Return the function that `cvat-cli task auto-annotate` loads for these parameters of its command line."""
    from cvat_cli._internal.common import FunctionLoader
    from cvat_cli._internal.parsers import parse_function_parameter

    values = dict(map(parse_function_parameter, parameters))
    return FunctionLoader("moondream_cv.integrations.cvat", None, values).load()


def annotate(function: Any, image: Image.Image, label_type: str, conf_threshold: float | None = None) -> list[Any]:
    """Return the shapes that the driver would upload for a task whose labels have the IDs 10, 11, ..."""
    from cvat_sdk.auto_annotation.driver import _AnnotationMapper, _DetectionFunctionContextImpl
    from cvat_sdk.models import Label

    labels = [
        Label._from_openapi_data(id=10 + index, name=name, type=label_type, attributes=[], sublabels=[])
        for index, name in enumerate(CLASSES)
    ]
    mapper = _AnnotationMapper(
        logging.getLogger(), function.spec.labels, labels, allow_unmatched_labels=False, conv_mask_to_poly=False
    )
    context = _DetectionFunctionContextImpl(frame_name="a.png", conf_threshold=conf_threshold)
    tags, shapes = mapper.validate_and_remap(function.detect(context, image), FRAME)
    assert tags == []
    return [shape.to_dict() for shape in shapes]


def test_command_line_function_returns_the_boxes_of_the_detector(tiny: LocalModel, image: Image.Image) -> None:
    function = command_line_function("classes=str:red circle, dog,bus", "model=str:tiny", "confidence=float:0.1")
    shapes = annotate(function, image, "rectangle")
    expected = Detector(tiny, confidence=0.1)(image, CLASSES)
    assert expected.class_id.tolist() == [0, 1, 1]
    assert [shape["label_id"] - 10 for shape in shapes] == [0, 1, 1]
    assert {(shape["type"], shape["frame"], shape["source"]) for shape in shapes} == {("rectangle", FRAME, "auto")}
    assert np.allclose([shape["points"] for shape in shapes], expected.xyxy)
    assert np.allclose([shape["score"] for shape in shapes], expected.confidence)


def test_points_of_the_pointer(tiny: LocalModel, image: Image.Image) -> None:
    from moondream_cv.integrations.cvat import create

    shapes = annotate(create(CLASSES, tiny, skill="point"), image, "points")
    expected = Pointer(tiny)(image, CLASSES)
    assert len(expected) == 3
    assert {shape["type"] for shape in shapes} == {"points"}
    assert np.allclose([shape["points"] for shape in shapes], expected.xyxy[:, :2])


def test_confidence_threshold_of_the_command_drops_shapes(tiny: LocalModel, image: Image.Image) -> None:
    from moondream_cv.integrations.cvat import create

    scores = sorted(float(score) for score in Detector(tiny)(image, CLASSES).confidence)
    shapes = annotate(create(CLASSES, tiny), image, "rectangle", conf_threshold=scores[1])
    assert sorted(shape["score"] for shape in shapes) == scores[1:]


def test_task_with_labels_of_another_type_is_rejected(tiny: LocalModel, image: Image.Image) -> None:
    from cvat_sdk.auto_annotation import BadFunctionError

    from moondream_cv.integrations.cvat import create

    with pytest.raises(BadFunctionError, match="label 'red circle' has type 'rectangle' in the function"):
        annotate(create(CLASSES, tiny), image, "polygon")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["classes=str:dog,,cat"], r"classes\[1\] must not be"),
        (["classes=str:dog,dog"], "classes must be unique"),
        (["classes=str:dog", "skill=str:segment"], "skill must be one of detect, point, got 'segment'"),
    ],
)
def test_invalid_parameters_are_rejected(parameters: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_line_function(*parameters)
