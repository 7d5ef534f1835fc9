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
    max_area: Annotated[
        float | None,
        typer.Option(
            "--max-area",
            min=0,
            max=1,
            metavar="0..1",
            help="Drop boxes that cover more of the picture, say 0.95.",
            show_default=False,
        ),
    ] = None,
    min_size: Annotated[
        float, typer.Option("--min-size", min=0, metavar="PIXELS", help="Drop boxes that are narrower or lower.")
    ] = 0.0,
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
    $ moondream-cv detect plate.jpg -c crumb --nms 0.5 --max-area 0.95
    $ curl -s https://example.org/a.jpg | moondream-cv detect - -c face
    """

    def make(vision_model: VisionModel) -> Detector:
        from moondream_cv.detector import Detector

        return Detector(
            vision_model,
            confidence=confidence,
            max_objects=max_objects,
            nms=nms,
            max_area=max_area,
            min_size=min_size,
            mark_truncated=True,
        )

    locate("detect", make, images, classes, output, model, device, as_json)
