"""`moondream-cv detect`: find objects by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as shared
from .detect_command import Export, run_detect_command

if TYPE_CHECKING:
    import supervision as sv

    from moondream_cv.detector import Detector
    from moondream_cv.vision_model import VisionModel

_SLICER_IOU = 0.5  # supervision's default for boxes of neighboring slices
_SLICES_AT_ONCE = 8


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
    slice_size: Annotated[
        int | None,
        typer.Option(
            "--slice",
            min=32,
            metavar="PIXELS",
            help="Size of overlapping slices in pixels, for small objects in large images. [dim]\\[default: off][/]",
            show_default=False,
        ),
    ] = None,
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
    """Find objects by name: boxes, with confidences.

    \b
    [bold]Examples[/]
    $ moondream-cv detect street.jpg -c person -c "red car" -o found.png
    $ moondream-cv detect "photos/*.jpg" -c dog,cat --json > found.jsonl
    $ moondream-cv detect photos/ -r --classes-file names.txt --save-txt labels/
    $ moondream-cv detect tray.jpg -c screw --slice 640 --nms 0.5 --max-area 0.95
    $ curl -s https://example.org/a.jpg | moondream-cv detect - -c face
    """

    def make_detector(model: VisionModel) -> Callable[[Any, list[str]], sv.Detections]:
        from moondream_cv.detector import Detector

        detector = Detector(
            model,
            confidence=confidence,
            max_objects=max_objects,
            nms=nms,
            max_area=max_area if slice_size is None else None,
            min_size=min_size,
            mark_truncated=True,
        )
        return detector if slice_size is None else with_slices(detector, slice_size, nms, max_area)

    export = Export(save_txt, save_crop)
    run_detect_command("detect", make_detector, images, classes, classes_file, max_objects, options, export)


def with_slices(
    detector: Detector, size: int, nms: float | None, max_area: float | None
) -> Callable[[Any, list[str]], sv.Detections]:
    """Return a function that detects in overlapping slices of an RGB image, with supervision's slicer.

    Args:
        detector: Detector to run on each slice.
        size: Width and height of a slice in pixels; slices overlap by a fifth of it.
        nms: Maximum overlap of boxes of a class, as a fraction of the smaller box; None for supervision's default, 0.5.
        max_area: Maximum fraction of the whole image that a box may cover.
    """
    import numpy as np
    import supervision as sv

    from moondream_cv import postprocessing

    def find(image: Any, names: list[str]) -> sv.Detections:
        slicer = sv.InferenceSlicer(
            partial(detector, classes=names),
            slice_wh=size,
            overlap_wh=size // 5,
            overlap_metric=sv.OverlapMetric.IOS,  # a slice may contain only a part of an object
            iou_threshold=_SLICER_IOU if nms is None else nms,
            batch_size=_SLICES_AT_ONCE,
        )
        found = slicer(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
        if not len(found):  # the slicer drops the keys of `data`
            found.data = {"class_name": np.array([], dtype=np.str_), "truncated": np.array([], dtype=np.bool_)}
        return found if max_area is None else postprocessing.filter_by_area(found, max_area, image.size)

    return find
