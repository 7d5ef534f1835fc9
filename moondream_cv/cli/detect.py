"""`moondream-cv detect`: boxes around what is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .locating import locate

if TYPE_CHECKING:
    from moondream_cv.detector import Detector
    from moondream_cv.vision_model import VisionModel


def detect(
    images: options.Images,
    classes: options.Classes = None,
    confidence: options.Confidence = 0.0,
    max_objects: options.MaxObjects = 50,
    nms: Annotated[
        float | None,
        typer.Option(
            "--nms", min=0, max=1, metavar="0..1", help="Drop boxes of a class that overlap more.", show_default=False
        ),
    ] = None,
    output: options.Output = None,
    model: options.Model = "moondream2",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Find objects by name: boxes, with confidences.

    \b
    [bold]Examples[/]
    $ moondream-cv detect street.jpg -c person -c "red car" -o found.png
    $ moondream-cv detect "photos/*.jpg" -c dog,cat --json > found.json
    $ curl -s https://example.org/a.jpg | moondream-cv detect - -c face
    """

    def make(vision_model: VisionModel) -> Detector:
        from moondream_cv.detector import Detector

        return Detector(vision_model, confidence=confidence, max_objects=max_objects, nms=nms)

    locate("detect", make, images, classes, output, model, device, as_json)
