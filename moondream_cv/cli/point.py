"""`moondream-cv point`: a point on each object that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import options
from .detect_command import locate
from .images_command import ImageOptions
from .models import ModelOptions

if TYPE_CHECKING:
    from moondream_cv.detector import Pointer
    from moondream_cv.vision_model import VisionModel


def point(
    images: options.Images,
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    confidence: options.Confidence = 0.0,
    max_objects: options.MaxObjects = 50,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    recursive: options.Recursive = False,
    model: options.Model = "moondream2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    adapter: options.Adapter = None,
    show: options.Show = False,
    as_json: options.AsJson = False,
    as_lines: options.AsLines = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Point at objects by name; good for counting and for small objects.

    \b
    [bold]Examples[/]
    $ moondream-cv point shelf.jpg -c bottle -o bottles.png
    $ moondream-cv point screenshot.png -c "close button,search field" --json
    """

    def make(vision_model: VisionModel) -> Pointer:
        from moondream_cv.detector import Pointer

        return Pointer(vision_model, confidence=confidence, max_objects=max_objects, mark_truncated=True)

    shared = ImageOptions(
        images,
        ModelOptions(model, device, dtype, adapter),
        recursive=recursive,
        output=output,
        overwrite=overwrite,
        as_json=as_json,
        as_lines=as_lines,
        show=show,
        verbose=verbose,
        quiet=quiet,
    )
    locate("point", make, classes, classes_file, max_objects, shared)
