"""`moondream-cv point`: point at objects by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import options as shared
from .detect_command import run_detect_command

if TYPE_CHECKING:
    from moondream_cv.detector import Pointer
    from moondream_cv.vision_model import VisionModel


@shared.image_command()
def point(
    images: shared.Images,
    classes: shared.Classes = None,
    classes_file: shared.ClassesFile = None,
    confidence: shared.Confidence = 0.0,
    max_objects: shared.MaxObjects = 50,
    *,
    options: shared.ImageOptions,
) -> None:
    """Point at objects by name, for counting and for small objects.

    \b
    [bold]Examples[/]
    $ moondream-cv point shelf.jpg -c bottle -o bottles.png
    $ moondream-cv point screenshot.png -c "close button,search field" --json
    """

    def make_pointer(model: VisionModel) -> Pointer:
        from moondream_cv.detector import Pointer

        return Pointer(model, confidence=confidence, max_objects=max_objects, mark_truncated=True)

    run_detect_command("point", make_pointer, images, classes, classes_file, max_objects, options)
