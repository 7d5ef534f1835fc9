"""`moondream-cv point`: a point on each thing that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import options
from .locating import locate

if TYPE_CHECKING:
    from moondream_cv.detector import Pointer
    from moondream_cv.vision_model import VisionModel


def point(
    images: options.Images,
    classes: options.Classes = None,
    confidence: options.Confidence = 0.0,
    max_objects: options.MaxObjects = 50,
    output: options.Output = None,
    model: options.Model = "moondream2",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Point at objects by name; good for counting and for small things.

    \b
    [bold]Examples[/]
    $ moondream-cv point shelf.jpg -c bottle -o bottles.png
    $ moondream-cv point screenshot.png -c "close button,search field" --json
    """

    def make(vision_model: VisionModel) -> Pointer:
        from moondream_cv.detector import Pointer

        return Pointer(vision_model, confidence=confidence, max_objects=max_objects, mark_truncated=True)

    locate("point", make, images, classes, output, model, device, as_json)
