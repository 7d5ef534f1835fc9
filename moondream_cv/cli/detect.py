"""`moondream-cv detect`: boxes around objects that are named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .detect_command import Export, locate
from .images_command import ImageOptions
from .models import ModelOptions

if TYPE_CHECKING:
    import supervision as sv

    from moondream_cv.detector import Detector
    from moondream_cv.vision_model import VisionModel

_SLICER_IOU = 0.5  # supervision's default for boxes of neighboring slices
_SLICES_AT_ONCE = 8


def detect(
    images: options.Images,
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    confidence: options.Confidence = 0.0,
    max_objects: options.MaxObjects = 50,
    nms: options.Nms = None,
    max_area: options.MaxArea = None,
    min_size: options.MinSize = 0.0,
    slice_size: Annotated[
        int | None,
        typer.Option(
            "--slice",
            min=32,
            metavar="PIXELS",
            help="Detect in overlapping slices of this size, for small objects in large images.",
            show_default=False,
        ),
    ] = None,
    output: options.Output = None,
    save_txt: Annotated[
        Path | None,
        typer.Option("--save-txt", metavar="FOLDER", help="Save labels in the YOLO format.", show_default=False),
    ] = None,
    save_crop: Annotated[
        Path | None,
        typer.Option("--save-crop", metavar="FOLDER", help="Save a crop of every object.", show_default=False),
    ] = None,
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
    """Find objects by name: boxes, with confidences.

    \b
    [bold]Examples[/]
    $ moondream-cv detect street.jpg -c person -c "red car" -o found.png
    $ moondream-cv detect "photos/*.jpg" -c dog,cat --json > found.jsonl
    $ moondream-cv detect photos/ -r --classes-file names.txt --save-txt labels/
    $ moondream-cv detect tray.jpg -c screw --slice 640 --nms 0.5 --max-area 0.95
    $ curl -s https://example.org/a.jpg | moondream-cv detect - -c face
    """

    def make(vision_model: VisionModel) -> Callable[[Any, list[str]], sv.Detections]:
        from moondream_cv.detector import Detector

        detector = Detector(
            vision_model,
            confidence=confidence,
            max_objects=max_objects,
            nms=nms,
            max_area=max_area if slice_size is None else None,
            min_size=min_size,
            mark_truncated=True,
        )
        return detector if slice_size is None else sliced(detector, slice_size, nms, max_area)

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
    locate("detect", make, classes, classes_file, max_objects, shared, Export(save_txt, save_crop))


def sliced(
    detector: Detector, size: int, nms: float | None, max_area: float | None
) -> Callable[[Any, list[str]], sv.Detections]:
    """Return a function that detects in overlapping slices of an RGB image, with supervision's slicer.

    Args:
        detector: Runs on each slice.
        size: Width and height of a slice in pixels; slices overlap by a fifth of it.
        nms: Maximum overlap of boxes of a class, as a fraction of the smaller one; None is supervision's default, 0.5.
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
