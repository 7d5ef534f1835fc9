"""A `VisionModel` without weights that detects patches of pure colors.

The class "red" matches each connected patch of pure red. Its confidence is the share of its box that is red. A
completely magenta image returns an error. All requests are recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from moondream_cv.errors import BackendError
from moondream_cv.images import to_rgb
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectedObject,
    DetectedPoint,
    DetectResult,
    ErrorResult,
    Gaze,
    GazeResult,
    Grounding,
    Point,
    PointResult,
    Query,
    QueryResult,
    Reasoning,
    Request,
    Result,
)
from moondream_cv.vision_model import PublishedMethods

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
MAGENTA = (255, 0, 255)


class Encoded:
    """An encoded image, of which only the size is public."""

    def __init__(self, rgb: np.ndarray) -> None:
        self.rgb = rgb
        self.size = (rgb.shape[1], rgb.shape[0])


class ColorModel(PublishedMethods):
    """Detect patches of red, green and blue.

    Attributes:
        runs: Requests of each call of `run`.
        closed: Whether `close` was called.
    """

    skills = frozenset({"detect", "point", "query", "caption", "gaze"})

    def __init__(self, has_scores: bool = True) -> None:
        self.has_scores = has_scores
        self.runs: list[list[Request]] = []
        self.closed = False
        self._lock = threading.Lock()

    def run(self, requests: Sequence[Request]) -> list[Result]:
        with self._lock:
            self.runs.append(list(requests))
        return [self._run_one(request) for request in requests]

    def close(self) -> None:
        self.closed = True

    def stream(self, request: Request) -> Iterator[Any]:
        result = self._run_one(request)
        if isinstance(result, ErrorResult):
            raise result.error
        if isinstance(result, QueryResult):
            text, reasoning = result.answer, [result.reasoning] if result.reasoning else []
        else:
            assert isinstance(result, CaptionResult)
            text, reasoning = result.caption, []
        return iter([*reasoning, *(f"{word} " for word in text.split())])

    def encode(self, image: Any) -> Encoded:
        return Encoded(to_rgb(image))

    def _run_one(self, request: Request) -> Result:
        if request.image is None:
            return QueryResult("Nothing to see.")
        try:
            rgb = request.image.rgb if isinstance(request.image, Encoded) else to_rgb(request.image)
        except Exception as error:
            return ErrorResult(error)
        if (rgb == MAGENTA).all():
            return ErrorResult(BackendError("http://colors rejected the image"))
        if isinstance(request, Detect):
            limit = request.settings.max_objects
            objects = self._objects(rgb, request.object)
            return DetectResult(tuple(objects[:limit]), len(objects) > limit)
        if isinstance(request, Point):
            objects = self._objects(rgb, request.object)[: request.settings.max_objects]
            return PointResult(
                tuple(DetectedPoint((o.x_min + o.x_max) / 2, (o.y_min + o.y_max) / 2, o.confidence) for o in objects)
            )
        if isinstance(request, Query):
            counts = {name: len(self._objects(rgb, name)) for name in COLORS}
            answer = ", ".join(f"{count} {name}" for name, count in counts.items())
            reasoning = Reasoning("I count patches.", (Grounding(2, 7, ((0.5, 0.5),)),)) if request.reasoning else None
            return QueryResult(answer, reasoning)
        if isinstance(request, Gaze):
            return GazeResult(None)
        assert isinstance(request, Caption)
        return CaptionResult(f"A picture of {rgb.shape[1]} by {rgb.shape[0]} pixels, {request.length}.")

    def _objects(self, rgb: np.ndarray, name: str) -> list[DetectedObject]:
        if name not in COLORS:
            return []
        height, width = rgb.shape[:2]
        mask = (rgb == COLORS[name]).all(axis=2).astype(np.uint8)
        stats = cv2.connectedComponentsWithStats(mask)[2][1:]
        found = []
        for x, y, w, h, area in stats.tolist():
            confidence = area / (w * h) if self.has_scores else 1.0
            found.append(DetectedObject(x / width, y / height, (x + w) / width, (y + h) / height, confidence))
        return found


class ListModel(ColorModel):
    """Return the same objects for every request, to test unusual boxes and points."""

    def __init__(self, objects: Sequence[DetectedObject | DetectedPoint], has_scores: bool = True) -> None:
        super().__init__(has_scores)
        self.objects = tuple(objects)

    def _run_one(self, request: Request) -> Result:
        if isinstance(request, Detect):
            return DetectResult(tuple(o for o in self.objects if isinstance(o, DetectedObject)))
        return PointResult(tuple(o for o in self.objects if isinstance(o, DetectedPoint)))


def color_frame(*patches: tuple[str, tuple[int, int, int, int]], size_wh: tuple[int, int] = (80, 60)) -> np.ndarray:
    """Return a gray BGR frame with colored rectangles.

    Args:
        patches: Color name and xyxy box of each rectangle.
        size_wh: Width and height in pixels.
    """
    bgr = np.full((size_wh[1], size_wh[0], 3), 90, np.uint8)
    for name, (x0, y0, x1, y1) in patches:
        bgr[y0:y1, x0:x1] = (COLORS | {"magenta": MAGENTA})[name][::-1]
    return bgr
