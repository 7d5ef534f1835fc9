"""Implementation of `detect` and `point`: run the model on every image; print a table or JSON; save images."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moondream_cv.arguments import check_unique
from moondream_cv.urls import is_url

from .exports import CropFolder, LabelFolder
from .image_command import ImageCommand, Item
from .inputs import InputImage
from .options import ImageOptions
from .report import Report, shown

if TYPE_CHECKING:
    import supervision as sv
    from PIL import Image
    from rich.table import Table

    from moondream_cv.vision_model import VisionModel

Find = Callable[[Any, "list[str]"], Any]
"""Function of an RGB image and class names, which returns `sv.Detections` with `data["truncated"]`."""


@dataclass(frozen=True)
class Export:
    """Files to write in addition to annotated images.

    Attributes:
        labels: Folder for labels in YOLO format; None writes none.
        crops: Folder for the crops of the boxes; None writes none.
    """

    labels: Path | None = None
    crops: Path | None = None


def run_detect_command(
    command: str,
    make_detector: Callable[[VisionModel], Find],
    images: Sequence[str],
    classes: Sequence[str] | None,
    classes_file: Path | None,
    max_objects: int,
    options: ImageOptions,
    export: Export | None = None,
) -> None:
    """Run a detector or a pointer on images, and print and save the objects.

    All arguments are checked before the model is loaded.

    Args:
        command: "detect" or "point".
        make_detector: Function that creates the detector or pointer from the loaded model.
        images: Image arguments of the command line.
        classes: Class names; each may contain several, separated by commas.
        classes_file: Text file with further class names.
        max_objects: Maximum number of objects per class, for messages.
        options: Model and outputs.
        export: Labels and crops to write.

    Raises:
        ValueError: An argument is invalid.
        typer.Exit: With status 1 if an image failed.
    """
    export = export or Export()
    # Check the arguments
    names = class_names(classes, classes_file, images, command)
    run = ImageCommand(command, images, options, classes=names)
    overwrite = options.overwrite
    labels = LabelFolder(export.labels, names, run.images, overwrite) if export.labels else None
    crops = CropFolder(export.crops, names, run.images, overwrite) if export.crops else None

    # Run the model on each image
    with run.opened_model() as model:
        find = make_detector(model)

        def process(item: Item) -> None:
            with run.report.working(item.progress):
                image = item.source.open()
                found = find(image, names)
            entry = _report_image(run.report, item.source, image, found, model.has_scores, max_objects)
            if item.target is not None or options.show:
                run.show_and_save(annotated(image, found, model.has_scores), item, entry)
            if labels is not None:
                entry["labels"] = str(labels.write(item.index, found, image.size))
            if crops is not None:
                entry["crops"] = [str(path) for path in crops.write(item.index, image, found)]
            run.report.add(entry)

        run.for_each(process)

    # Report the written files
    for folder in (export.labels, export.crops):
        if folder is not None:
            run.report.notice(f"Saved {'labels' if folder == export.labels else 'crops'} in {shown(str(folder))}")
    run.report.finish()


def annotated(image: Image.Image, found: sv.Detections, has_scores: bool) -> Image.Image:
    """Return a copy of an RGB image with its detections drawn."""
    from moondream_cv.drawing import annotate

    return annotate(image, found, has_scores=has_scores)


def class_names(
    classes: Sequence[str] | None, classes_file: Path | None, images: Sequence[str], command: str
) -> list[str]:
    """Return the class names of `--class` and `--classes-file`, in this order.

    Args:
        classes: Values of `--class`.
        classes_file: Value of `--classes-file`.
        images: Image arguments, for the example in the error message.
        command: Name of the command, for the example in the error message.

    Raises:
        ValueError: There are no class names, one is empty or repeated, or the file cannot be read.
    """
    if not classes and classes_file is None:
        raise ValueError(f"class names are missing; add -c NAME, for example: {_example(images, command)}")
    names = [name for text in classes or () for name in split_class(text)]
    return check_unique("class names", [*names, *([] if classes_file is None else read_classes(classes_file))])


def _example(images: Sequence[str], command: str) -> str:
    """Return an example of a command line with class names, made from the arguments."""
    files = [image for image in images if Path(image).suffix or os.path.exists(image) or is_url(image)]
    files = files or list(images[:1])
    others = [image for image in images if image not in files] or ["dog", "red circle"]
    return shlex.join(["moondream-cv", command, *files, *(word for name in others for word in ("-c", name))])


def split_class(text: str) -> list[str]:
    """Split the value of one `--class` at commas.

    Raises:
        ValueError: A name is empty.
    """
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        if any(names):
            kept = ",".join(filter(None, names))
            raise ValueError(f"class names must not be empty, got {text!r}; write {kept!r}")
        raise ValueError(f"class names must not be empty, got {text!r}")
    return names


def read_classes(path: Path) -> list[str]:
    """Read class names from a UTF-8 text file, one per line; blank lines are skipped.

    Raises:
        ValueError: The file cannot be read, is not text, or has no names.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes-file {path} must be UTF-8 text; save it as UTF-8, one name per line") from error
    except (OSError, RuntimeError, ValueError) as error:  # "~nobody", a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--classes-file {path} cannot be read: {reason}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ValueError(f"--classes-file {path} contains no names; write one per line")
    return names


def _report_image(
    report: Report, source: InputImage, image: Image.Image, found: sv.Detections, has_scores: bool, max_objects: int
) -> dict[str, Any]:
    """Print the table of one image, and return its JSON entry."""
    points = report.command == "point"
    entry: dict[str, Any] = {"image": source.name, "width": image.width, "height": image.height}
    entry["points" if points else "objects"] = _entries(found, points)
    title = shown(source.title)
    count = "nothing" if not len(found) else f"{len(found)} {'point' if points else 'object'}{'s' * (len(found) > 1)}"
    report.print(f"{title}  {image.width}×{image.height}  {count} found")
    if len(found):
        report.print(_table(found, points, has_scores))
    truncated = _truncated_classes(found)
    if truncated:
        entry["truncated"] = truncated
        report.notice(
            f"{title}: there may be more of {', '.join(map(repr, truncated))} than --max-objects {max_objects}"
        )
    return entry


def _truncated_classes(found: sv.Detections) -> list[str]:
    """Return the class names that `max_objects` truncated."""
    pairs = zip(found.data["class_name"], found.data["truncated"], strict=True)
    return list(dict.fromkeys(str(name) for name, truncated in pairs if truncated))


def _objects(found: sv.Detections, points: bool) -> list[tuple[str, int, float, list[float]]]:
    """Return class name, class id, confidence and coordinates in pixels of every object."""
    assert found.confidence is not None
    assert found.class_id is not None
    coordinates = found.xyxy[:, :2] if points else found.xyxy
    names = [str(name) for name in found.data["class_name"]]
    return list(zip(names, found.class_id.tolist(), found.confidence.tolist(), coordinates.tolist(), strict=True))


def _entries(found: sv.Detections, points: bool) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {
            "class_name": name,
            "class_id": class_id,
            "confidence": round(confidence, 4),
            "xy" if points else "xyxy": [round(value, 2) for value in numbers],
        }
        for name, class_id, confidence, numbers in _objects(found, points)
    ]
    if found.mask is not None:
        from supervision import mask_to_rle

        for entry, mask in zip(entries, found.mask, strict=True):  # as in COCO results
            entry["segmentation"] = {"size": list(mask.shape), "counts": mask_to_rle(mask, compressed=True)}
    return entries


def _table(found: sv.Detections, points: bool, has_scores: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    table.add_column("confidence", justify="right")
    for name in ("x", "y") if points else ("left", "top", "right", "bottom"):
        table.add_column(name, justify="right")
    for name, _, confidence, numbers in _objects(found, points):
        table.add_row(Text(shown(name)), f"{confidence:.2f}" if has_scores else "-", *(f"{n:.0f}" for n in numbers))
    return table
