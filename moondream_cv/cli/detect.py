"""`moondream-cv detect`: find objects by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as shared
from .detect_command import Export, run_detect_command
from .models import load_masks

if TYPE_CHECKING:
    import supervision as sv

    from moondream_cv.vision_model import VisionModel


@shared.image_command()
def detect(
    images: shared.Images,
    classes: shared.Classes = None,
    classes_file: shared.ClassesFile = None,
    confidence: shared.Confidence = 0.0,
    max_objects: shared.MaxObjects = 50,
    nms: shared.Nms = None,
    max_area: shared.MaxArea = None,
    min_size: shared.MinSize = 0.0,
    slice_size: shared.SliceSize = None,
    masks: shared.Masks = None,
    save_txt: Annotated[
        Path | None,
        typer.Option("--save-txt", metavar="FOLDER", help="Folder for labels in YOLO format.", show_default=False),
    ] = None,
    save_crop: Annotated[
        Path | None,
        typer.Option("--save-crop", metavar="FOLDER", help="Folder for a crop of every object.", show_default=False),
    ] = None,
    *,
    options: shared.ImageOptions,
) -> None:
    """Find objects by name: boxes, with confidences and optional masks.

    \b
    [bold]Examples[/]
    $ moondream-cv detect street.jpg -c person -c "red car" -o found.png
    $ moondream-cv detect "photos/*.jpg" -c dog,cat --json > found.jsonl
    $ moondream-cv detect photos/ -r --classes-file names.txt --save-txt labels/
    $ moondream-cv detect tray.jpg -c screw --slice 640 --nms 0.5 --max-area 0.95
    $ moondream-cv detect street.jpg -c dog --masks facebook/sam2.1-hiera-small -o dogs.png
    $ curl -s https://example.org/a.jpg | moondream-cv detect - -c face
    """

    def make_detector(model: VisionModel) -> Callable[[Any, list[str]], sv.Detections]:
        from moondream_cv.detector import Detector

        mask_function = None
        if masks is not None:
            mask_function = load_masks(masks, options.device, not options.quiet and sys.stderr.isatty())
        detector = Detector(
            model,
            confidence=confidence,
            max_objects=max_objects,
            nms=nms,
            max_area=max_area if slice_size is None else None,
            min_size=min_size,
            masks=mask_function if slice_size is None else None,
            mark_truncated=True,
        )
        if slice_size is None:
            return detector
        from moondream_cv.slicing import with_slices

        return with_slices(detector, slice_size, nms, max_area, mask_function)

    export = Export(save_txt, save_crop)
    run_detect_command("detect", make_detector, images, classes, classes_file, max_objects, options, export)
