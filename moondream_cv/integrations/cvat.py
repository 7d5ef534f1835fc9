"""Auto-annotation function for CVAT: detects classes in the images of a task.

Run it with CVAT's command line, which passes parameters to `create`:

    cvat-cli task auto-annotate 42 --function-module moondream_cv.integrations.cvat \
        -p classes=str:"person,red car" --conf-threshold 0.3

The class names must be labels of the task.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

from PIL import Image

from moondream_cv.arguments import check_choice, check_classes
from moondream_cv.detector import Detector, Pointer
from moondream_cv.postprocessing import filter_by_confidence
from moondream_cv.vision_model import VisionModel

try:
    import cvat_sdk.auto_annotation as cvataa
    from cvat_sdk import models
except ImportError as error:
    raise ImportError(
        f"{error}; moondream_cv.integrations.cvat requires cvat-sdk; run: pip install cvat-cli"
    ) from error

Skill = Literal["detect", "point"]


class MoondreamFunction:
    """Detection function of CVAT's auto-annotation interface. `create` returns it."""

    def __init__(
        self,
        classes: str | Sequence[str],
        model: str | os.PathLike[str] | VisionModel = "moondream2",
        *,
        skill: Skill = "detect",
        **options: Any,
    ) -> None:
        """Load a model, or use a loaded one.

        Args:
            classes: Class names, in a sequence or separated by commas. They are the labels of the function.
            model: Model as for `Detector`: name, folder, server URL or a loaded model.
            skill: "detect" returns rectangles, "point" returns points.
            options: Keyword arguments of `Detector`, or of `Pointer` for the skill "point", such as `confidence`.

        Raises:
            ValueError: A class name is blank or repeated, or an argument is out of range.
            MoondreamError: The model cannot be loaded.
        """
        names = [name.strip() for name in classes.split(",")] if isinstance(classes, str) else classes
        self._classes = check_classes(names)
        self._is_pointer = check_choice("skill", skill, get_args(Skill)) == "point"
        self._shape_type = "points" if self._is_pointer else "rectangle"
        self._detector = (Pointer if self._is_pointer else Detector)(model, **options)
        labels = [cvataa.label_spec(name, i, type=self._shape_type) for i, name in enumerate(self._classes)]
        self._spec = cvataa.DetectionFunctionSpec(labels=labels)

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """The labels of the function; their IDs are the indices of the class names."""
        return self._spec

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: Image.Image
    ) -> Sequence[models.LabeledShapeRequest]:
        """Detect the classes in an image.

        Args:
            context: Context of the call. Shapes below its `conf_threshold` are dropped.
            image: Image of the task.

        Returns:
            One shape per object, in pixels, with the confidence as its `score`.

        Raises:
            MoondreamError: The model failed.
        """
        detections = filter_by_confidence(self._detector(image, self._classes), context.conf_threshold or 0)
        assert detections.class_id is not None
        assert detections.confidence is not None
        points = detections.xyxy[:, :2] if self._is_pointer else detections.xyxy
        return [
            cvataa.shape(class_id, type=self._shape_type, points=coordinates, score=score)
            for class_id, coordinates, score in zip(
                detections.class_id.tolist(), points.tolist(), detections.confidence.tolist(), strict=True
            )
        ]


create = MoondreamFunction
"""Factory that `cvat-cli` calls with the parameters of its command line."""
