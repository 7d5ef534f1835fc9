"""A `VisionModel` that returns the ground truth of given scenes, or wrong results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moondream_cv.images import to_rgb
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectedObject,
    DetectedPoint,
    DetectResult,
    Gaze,
    GazeResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Request,
    Result,
)
from moondream_cv.scenes import Scene, plural
from moondream_cv.scenes.world import short_caption
from moondream_cv.vision_model import PublishedMethods


class SceneModel(PublishedMethods):
    """Return the ground truth of the scene with the request's image.

    Args:
        scenes: Scenes to recognize.
        wrong: Return wrong results.
    """

    skills = frozenset({"detect", "point", "query", "caption", "gaze"})
    has_scores = True

    def __init__(self, scenes: Sequence[Scene], wrong: bool = False) -> None:
        self.scenes = scenes
        self.wrong = wrong

    def close(self) -> None:
        pass

    def run(self, requests: Sequence[Request]) -> list[Result]:
        return [self._run_one(request) for request in requests]

    def _run_one(self, request: Request) -> Result:
        rgb = to_rgb(request.image)
        (scene,) = [scene for scene in self.scenes if np.array_equal(scene.image, rgb)]
        width, height = scene.resolution_wh
        if isinstance(request, (Detect, Point)):
            boxes = [item.xyxy for item in scene.objects if request.object == "object" or item.matches(request.object)]
            if self.wrong:
                boxes = [(x0 / 2, y0 / 2, x1 / 2, y1 / 2) for x0, y0, x1, y1 in boxes[:1]]
            scores = [0.97 - 0.03 * index for index in range(len(boxes))]
            if isinstance(request, Detect):
                return DetectResult(
                    tuple(
                        DetectedObject(x0 / width, y0 / height, x1 / width, y1 / height, score)
                        for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True)
                    )
                )
            return PointResult(
                tuple(
                    DetectedPoint((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, score)
                    for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True)
                )
            )
        if isinstance(request, Gaze):
            return GazeResult(None)
        if self.wrong:
            return CaptionResult("Wrong.") if isinstance(request, Caption) else QueryResult("no idea")
        if isinstance(request, Caption):
            return CaptionResult(short_caption([o.name for o in sorted(scene.objects, key=lambda o: o.center[0])]))
        return QueryResult(self._answer(scene, request))

    def _answer(self, scene: Scene, request: Query) -> str:
        if request.spatial_refs:
            x, y = request.spatial_refs[0][0] * scene.image.shape[1], request.spatial_refs[0][1] * scene.image.shape[0]
            return next(o.name for o in scene.objects if o.xyxy[0] < x < o.xyxy[2] and o.xyxy[1] < y < o.xyxy[3])
        if request.question.startswith("How many"):
            return str(sum(plural(item.name) in request.question for item in scene.objects))
        if request.question.startswith("Is there"):
            name = request.question.removesuffix("?").split(" ", 3)[3]
            return "yes" if any(item.matches(name) for item in scene.objects) else "no"
        return next(str(item.color) for item in scene.objects if f"the {item.shape}?" in request.question)
