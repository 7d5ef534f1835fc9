"""X-AnyLabeling: the tasks, requests and shapes of its remote-server protocol.

`moondream-cv serve` has the routes of the protocol, in `server/apis/x_anylabeling.py`. This module has no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moondream_cv.geometry import clip_xyxy, denormalize_xyxy
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Request,
    Result,
)

MAX_CLASSES = 100  # per request; all of them decode at the same time
_SEPARATORS = re.compile(r"[,.]")


class Task(NamedTuple):
    """A task that people choose in X-AnyLabeling.

    Attributes:
        name: Name in the user interface.
        description: Description of the result of the task.
        placeholder: Text in the empty prompt; None: the task has no prompt.
        has_shapes: Whether the task returns shapes; otherwise it returns a description of the image.
    """

    name: str
    description: str
    placeholder: str | None
    has_shapes: bool


TASKS: dict[str, Task] = {
    "detect": Task("Detect", "Boxes of all objects of the classes", "Classes: person, dog", True),
    "point": Task("Point", "Points on all objects of the classes", "Classes: person, dog", True),
    "caption": Task("Caption", "Description of the image", None, False),
    "query": Task("Query", "Answer to a question about the image", "Question", False),
}
"""Tasks by ID, which is also the skill of the model. The first one is selected when X-AnyLabeling connects."""


def describe_model(display_name: str, skills: Collection[str], has_scores: bool) -> dict[str, Any]:
    """Return the description of a model: its tasks and the controls that X-AnyLabeling shows for each.

    Args:
        display_name: Name in the user interface.
        skills: Skills of the model, such as "detect".
        has_scores: Whether confidences are real; otherwise there is no control for their minimum.
    """
    shape_widgets: dict[str, dict[str, str]] = {"toggle_preserve_existing_annotations": {}}
    values: list[dict[str, Any]] = [{"name": "toggle_preserve_existing_annotations", "value": False}]
    if has_scores:
        shape_widgets |= {"input_conf": {}, "edit_conf": {"tooltip": "Minimum confidence"}}
        values.append({"name": "edit_conf", "value": 0.0})
    tasks = []
    for task_id, task in TASKS.items():
        if task_id not in skills:
            continue
        if task.placeholder is None:
            widgets: dict[str, dict[str, str]] = {"button_run": {}}
        else:
            widgets = {"edit_text": {"placeholder": task.placeholder, "tooltip": task.description}, "button_send": {}}
        tasks.append(
            {
                "id": task_id,
                "name": task.name,
                "description": task.description,
                "batch_processing_mode": "default" if task.placeholder is None else "text_prompt",
                "active_widgets": widgets | (shape_widgets if task.has_shapes else {}),
            }
        )
    return {
        "display_name": display_name,
        "batch_processing_mode": "text_prompt",
        "available_tasks": tasks,
        "widgets": values,
    }


def parse_classes(text_prompt: str) -> list[str]:
    """Return the class names in a prompt, without repetitions.

    Args:
        text_prompt: Class names, separated by commas or periods.

    Raises:
        ValueError: There is no class name, or there are more than `MAX_CLASSES`.
    """
    names = list(dict.fromkeys(name for part in _SEPARATORS.split(text_prompt) if (name := " ".join(part.split()))))
    if not names:
        raise ValueError(f"text_prompt must have class names, separated by commas or periods, got {text_prompt!r:.100}")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"text_prompt must have at most {MAX_CLASSES} class names, got {len(names)}")
    return names


def build_requests(task_id: str | None, text_prompt: str | None, image: Any) -> list[Request]:
    """Return the requests to the model.

    Args:
        task_id: ID of a task in `TASKS`; None: the first one.
        text_prompt: Class names, separated by commas or periods, or a question.
        image: Image as `Request.image` accepts it.

    Raises:
        ValueError: The task is unknown, or the prompt is invalid.
    """
    if task_id in (None, "detect"):
        return [Detect(image, name) for name in parse_classes(text_prompt or "")]
    if task_id == "point":
        return [Point(image, name) for name in parse_classes(text_prompt or "")]
    if task_id == "caption":
        return [Caption(image)]
    if task_id == "query":
        return [Query(image, text_prompt or "")]
    raise ValueError(f"current_task must be one of {', '.join(TASKS)}, got {task_id!r:.100}")


def build_prediction(
    requests: Sequence[Request],
    results: Sequence[Result],
    resolution_wh: tuple[int, int],
    conf_threshold: float = 0.0,
) -> dict[str, Any]:
    """Return the shapes and the description of an image.

    Boxes are clipped to the image. Boxes without area and repeated boxes and points are dropped.

    Args:
        requests: Requests of `build_requests`.
        results: Results of the requests.
        resolution_wh: Width and height of the image in pixels.
        conf_threshold: Minimum confidence, 0..1.

    Returns:
        `shapes`; `description`, the caption or the answer; `replace`: False for descriptions, so that X-AnyLabeling
        keeps the shapes of the image, and None for shapes: people choose it.
    """
    shapes: dict[tuple[str, str, tuple[float, ...]], dict[str, Any]] = {}  # without repetitions
    description, replace = "", None
    for request, result in zip(requests, results, strict=True):
        if isinstance(result, CaptionResult):
            description, replace = result.caption, False
        elif isinstance(result, QueryResult):
            description, replace = result.answer, False
        else:
            assert isinstance(request, (Detect, Point))
            for kind, xyxy, confidence in _found(result, resolution_wh):
                if confidence >= conf_threshold:
                    shape = _shape(request.object, kind, xyxy, confidence)
                    known = shapes.setdefault((request.object, kind, xyxy), shape)
                    known["score"] = max(known["score"], shape["score"])
    return {"shapes": list(shapes.values()), "description": description, "replace": replace}


def _found(
    result: Result, resolution_wh: tuple[int, int]
) -> Iterator[tuple[str, tuple[float, float, float, float], float]]:
    """Yield the shape type, the box in pixels and the confidence of each object. A point is a box without area."""
    if isinstance(result, DetectResult):
        kind = "rectangle"
        places = [((o.x_min, o.y_min, o.x_max, o.y_max), o.confidence) for o in result.objects]
    else:
        assert isinstance(result, PointResult)
        kind = "point"
        places = [((p.x, p.y, p.x, p.y), p.confidence) for p in result.points]
    for fractions, confidence in places:
        pixels = clip_xyxy(denormalize_xyxy(np.array([fractions]), resolution_wh), resolution_wh)[0]
        x_min, y_min, x_max, y_max = (round(float(value), 2) for value in pixels)
        if kind == "point" or (x_max > x_min and y_max > y_min):
            yield kind, (x_min, y_min, x_max, y_max), confidence


def _shape(label: str, kind: str, xyxy: tuple[float, float, float, float], confidence: float) -> dict[str, Any]:
    x_min, y_min, x_max, y_max = xyxy
    corners = [[x_min, y_min], [x_max, y_min], [x_max, y_max], [x_min, y_max]]
    return {
        "label": label,
        "shape_type": kind,
        "points": corners if kind == "rectangle" else corners[:1],
        "score": round(confidence, 4),
        "group_id": None,
        "attributes": {},
        "description": None,
        "difficult": False,
        "direction": 0,
        "flags": None,
        "kie_linking": [],
    }
