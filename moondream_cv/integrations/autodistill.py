"""Base model for autodistill: detects the prompts of an ontology, so that `.label(folder)` writes a YOLO dataset.

Example:
    >>> from autodistill.detection import CaptionOntology
    >>> from moondream_cv.integrations.autodistill import MoondreamDetector
    >>> base_model = MoondreamDetector(CaptionOntology({"delivery van": "van"}))  # doctest: +SKIP
    >>> base_model.label("photos", extension=".jpg", output_folder="dataset")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image

from moondream_cv.detector import Detector
from moondream_cv.vision_model import VisionModel

try:
    from autodistill.detection import DetectionBaseModel, DetectionOntology
except ImportError as error:
    raise ImportError(
        f"{error}; moondream_cv.integrations.autodistill requires autodistill and roboflow, which autodistill imports; "
        "run: pip install autodistill roboflow"
    ) from error


class MoondreamDetector(DetectionBaseModel):
    """Autodistill base model that detects all prompts of an ontology in one pass over the image.

    Attributes:
        ontology: Prompts and their class names. It can be replaced.
        detector: Detector that runs the prompts.
    """

    def __init__(
        self,
        ontology: DetectionOntology,
        model: str | os.PathLike[str] | VisionModel = "moondream2",
        **options: Any,
    ) -> None:
        """Load a model, or use a loaded one.

        Args:
            ontology: Prompts and their class names, such as `CaptionOntology({"delivery van": "van"})`.
            model: Model as for `Detector`: name, folder, server URL or a loaded model.
            options: Keyword arguments of `Detector`, such as `confidence` and `nms`.

        Raises:
            ValueError: An option is out of range.
            MoondreamError: The model cannot be loaded.
        """
        self.ontology = ontology
        self.detector = Detector(model, **options)

    def predict(self, input: str | os.PathLike[str] | npt.NDArray[Any] | Image.Image) -> sv.Detections:
        """Detect the prompts of the ontology in an image.

        Args:
            input: Path, BGR array or PIL image.

        Returns:
            Detections as those of `Detector`, except that `class_id` is the index into `ontology.classes()`, and
            `data["class_name"]` the class name. Prompts of the same class have the same `class_id`, the first one.

        Raises:
            ValueError: A prompt is blank or not a string, or there are no prompts.
            MoondreamError: The image cannot be read, or the model failed.
        """
        classes = self.ontology.classes()
        detections = self.detector(input, self.ontology.prompts())
        class_ids = np.array([classes.index(name) for name in classes], dtype=int)
        assert detections.class_id is not None
        detections.class_id = class_ids[detections.class_id]
        detections.data["class_name"] = np.array(classes, dtype=np.str_)[detections.class_id]
        return detections
