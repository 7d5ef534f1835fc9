"""FiftyOne model: `dataset.apply_model(MoondreamModel(["person", "red car"]), label_field="moondream")`.

The folder `fiftyone_zoo` is a source of the FiftyOne model zoo with the same model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image

from moondream_cv.arguments import check_choice, check_classes
from moondream_cv.detector import Detector, Pointer
from moondream_cv.postprocessing import filter_by_confidence
from moondream_cv.vision_model import VisionModel

try:
    import fiftyone as fo
    from fiftyone.core.models import Model
except ImportError as error:
    raise ImportError(
        f"{error}; moondream_cv.integrations.fiftyone requires fiftyone; run: pip install fiftyone"
    ) from error

Skill = Literal["detect", "point"]


@dataclass
class MoondreamModelConfig:
    """Settings of a `MoondreamModel` that FiftyOne changes during a call of `apply_model`.

    Attributes:
        confidence_thresh: Minimum confidence, between 0 and 1; None keeps all objects.
    """

    confidence_thresh: float | None = None


class MoondreamModel(Model):
    """FiftyOne model that returns boxes or points of the given classes.

    Attributes:
        config: Settings that FiftyOne changes.
        detector: Detector that runs the classes.
    """

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
            classes: Class name, or sequence of different class names.
            model: Model as for `Detector`: name, folder, server URL or a loaded model.
            skill: "detect" returns `fo.Detections`, "point" returns `fo.Keypoints`.
            options: Keyword arguments of `Detector`, or of `Pointer` for the skill "point", such as `confidence`.

        Raises:
            ValueError: A class name is blank or repeated, or an argument is out of range.
            MoondreamError: The model cannot be loaded.
        """
        self.classes = classes
        self.config = MoondreamModelConfig()
        self._is_pointer = check_choice("skill", skill, get_args(Skill)) == "point"
        self.detector = (Pointer if self._is_pointer else Detector)(model, **options)

    @property
    def classes(self) -> list[str]:
        """Class names of the next predictions."""
        return self._classes

    @classes.setter
    def classes(self, classes: str | Sequence[str]) -> None:
        self._classes = check_classes(classes)

    @property
    def media_type(self) -> str:
        """The media type, "image". FiftyOne applies image models to each frame of a video."""
        return "image"

    @property
    def ragged_batches(self) -> bool:
        """False: images of a batch may have different sizes."""
        return False

    @property
    def transforms(self) -> None:
        """None: the model preprocesses images itself."""
        return

    @property
    def preprocess(self) -> bool:
        """False: FiftyOne does not preprocess images."""
        return False

    def predict(self, arg: npt.NDArray[np.uint8]) -> fo.Detections | fo.Keypoints:
        """Detect the classes in an image.

        Args:
            arg: RGB image [H, W, 3], or gray image [H, W].

        Returns:
            Labels with coordinates as fractions of the image, and confidences.

        Raises:
            MoondreamError: The model failed.
        """
        return self.predict_all([arg])[0]

    def predict_all(self, args: Iterable[npt.NDArray[np.uint8]]) -> list[fo.Detections | fo.Keypoints]:
        """Detect the classes in a batch of images, which may have different sizes.

        Args:
            args: Images as for `predict`.

        Returns:
            Labels of each image, as those of `predict`.

        Raises:
            MoondreamError: The model failed.
        """
        images = [Image.fromarray(arg) for arg in args]
        convert = _to_keypoints if self._is_pointer else _to_detections
        threshold = self.config.confidence_thresh or 0
        return [
            convert(filter_by_confidence(detections, threshold), image.size)
            for image, detections in zip(images, self.detector(images, self.classes), strict=True)
        ]


def _to_detections(detections: sv.Detections, resolution_wh: tuple[int, int]) -> fo.Detections:
    """Return boxes with coordinates as fractions of the image."""
    boxes = sv.xyxy_to_xywh(detections.xyxy) / np.array(resolution_wh * 2)
    return fo.Detections(
        detections=[
            fo.Detection(label=name, bounding_box=box, confidence=confidence)
            for box, (name, confidence) in zip(boxes.tolist(), _labels(detections), strict=True)
        ]
    )


def _to_keypoints(detections: sv.Detections, resolution_wh: tuple[int, int]) -> fo.Keypoints:
    """Return points with coordinates as fractions of the image."""
    points = detections.xyxy[:, :2] / np.array(resolution_wh)
    return fo.Keypoints(
        keypoints=[
            fo.Keypoint(label=name, points=[point], confidence=[confidence])
            for point, (name, confidence) in zip(points.tolist(), _labels(detections), strict=True)
        ]
    )


def _labels(detections: sv.Detections) -> list[tuple[str, float]]:
    """Return the class name and the confidence of each object, as Python objects, which MongoDB requires."""
    assert detections.confidence is not None  # set by the detector
    names = np.asarray(detections.data["class_name"])
    return list(zip(names.tolist(), detections.confidence.tolist(), strict=True))
