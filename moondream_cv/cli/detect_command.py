"""The common part of `detect` and `point`: all classes on every image, then a table, JSON and annotated images."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moondream_cv.urls import is_url

from .exports import CropFolder, LabelFolder
from .images_command import ImageOptions, ImagesCommand, Item
from .inputs import Picture
from .output import Report, shown

if TYPE_CHECKING:
    import supervision as sv
    from PIL import Image
    from rich.table import Table

    from moondream_cv.vision_model import VisionModel

Find = Callable[[Any, "list[str]"], Any]
"""Finds objects of the named classes in an RGB image; returns `sv.Detections` with `data["truncated"]`."""


@dataclass(frozen=True)
class Export:
    """Files to write in addition to annotated images.

    Attributes:
        labels: Folder for labels in the YOLO format.
        crops: Folder for the parts of the images in the boxes.
    """

    labels: Path | None = None
    crops: Path | None = None


def locate(
    command: str,
    make_finder: Callable[[VisionModel], Find],
    classes: Sequence[str] | None,
    classes_file: Path | None,
    max_objects: int,
    options: ImageOptions,
    export: Export | None = None,
) -> None:
    """Run a detector or a pointer over images, and report and save the objects.

    Everything that can be wrong with the arguments is found before the model is loaded.

    Args:
        command: "detect" or "point".
        make_finder: Makes the detector or pointer from the loaded model.
        classes: Class names, also several in one separated by commas.
        classes_file: A text file with more of them.
        max_objects: Limit of the finder, for messages.
        options: Images, model and outputs.
        export: Labels and crops to write.
    """
    export = export or Export()
    names = class_names(classes, classes_file, options.images, command)
    run = ImagesCommand(command, options, classes=names)
    overwrite = options.overwrite
    labels = LabelFolder(export.labels, names, run.pictures, overwrite) if export.labels else None
    crops = CropFolder(export.crops, names, run.pictures, overwrite) if export.crops else None
    with run.opened_model() as model:
        find = make_finder(model)

        def locate_one(item: Item) -> None:
            with run.report.working(item.progress):
                image = item.picture.open()
                found = find(image, names)
            entry = _report_one(run.report, item.picture, image, found, model.has_scores, max_objects)
            if item.target is not None or options.show:
                run.show_and_save(annotated(image, found, model.has_scores), item, entry)
            if labels is not None:
                entry["labels"] = str(labels.write(item.index, found, image.size))
            if crops is not None:
                entry["crops"] = [str(path) for path in crops.write(item.index, image, found)]
            run.report.add(entry)

        run.for_each(locate_one)
    for folder in (export.labels, export.crops):
        if folder is not None:
            run.report.notice(f"Saved {'labels' if folder == export.labels else 'crops'} in {shown(str(folder))}")
    run.report.finish()


def annotated(image: Image.Image, found: sv.Detections, has_scores: bool) -> Image.Image:
    """Draw detections into a copy of an RGB image."""
    from .images import annotate

    return annotate(image, found, has_scores=has_scores)


def class_names(
    classes: Sequence[str] | None, classes_file: Path | None, images: Sequence[str], command: str
) -> list[str]:
    """Return the class names of `--class` and `--classes-file`, in this order.

    Raises:
        ValueError: There are none, one is empty or given twice, or the file cannot be read.
    """
    if not classes and classes_file is None:
        raise ValueError(f"no class names are given; add -c NAME, for example: {_example(images, command)}")
    names = [name for text in classes or () for name in split_class(text)]
    return check_unique([*names, *([] if classes_file is None else read_classes(classes_file))])


def _example(images: Sequence[str], command: str) -> str:
    """Return a command line with class names, made of the arguments of one without."""
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
            raise ValueError(f"the class names {text!r} contain an empty name; write {kept!r}")
        raise ValueError(f"a class name must not be empty, got {text!r}")
    return names


def read_classes(path: Path) -> list[str]:
    """Read class names from a UTF-8 text file, one per line; blank lines are skipped.

    Raises:
        ValueError: The file cannot be read, is not text, or has no names.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes-file {path} is not UTF-8 text; save it as UTF-8, one name per line") from error
    except (OSError, RuntimeError, ValueError) as error:  # "~nobody", a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--classes-file {path} cannot be read: {reason}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ValueError(f"--classes-file {path} contains no names; write one per line")
    return names


def check_unique(names: Sequence[str]) -> list[str]:
    """Return the names as a list.

    Raises:
        ValueError: A name is given twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class names must be unique; duplicates: {', '.join(map(repr, twice))}")
    return list(names)


def _report_one(
    report: Report, picture: Picture, image: Image.Image, found: sv.Detections, has_scores: bool, max_objects: int
) -> dict[str, Any]:
    """Print the table of one image, and return its JSON."""
    points = report.command == "point"
    entry: dict[str, Any] = {"image": picture.name, "width": image.width, "height": image.height}
    entry["points" if points else "objects"] = _entries(found, points)
    title = shown(picture.title)
    what = "nothing" if not len(found) else f"{len(found)} {'point' if points else 'object'}{'s' * (len(found) > 1)}"
    report.print(f"{title}  {image.width}×{image.height}  {what} found")
    if len(found):
        report.print(_table(found, points, has_scores))
    cut_off = _cut_off(found)
    if cut_off:
        entry["truncated"] = cut_off
        report.notice(f"{title}: there may be more of {', '.join(map(repr, cut_off))} than --max-objects {max_objects}")
    return entry


def _cut_off(found: sv.Detections) -> list[str]:
    """Names of the classes of which there may be more than were asked for."""
    rows = zip(found.data["class_name"], found.data["truncated"], strict=True)
    return list(dict.fromkeys(str(name) for name, truncated in rows if truncated))


def _rows(found: sv.Detections, points: bool) -> list[tuple[str, int, float, list[float]]]:
    """Class name, class id, confidence and coordinates in pixels of every object."""
    assert found.confidence is not None
    assert found.class_id is not None
    coordinates = found.xyxy[:, :2] if points else found.xyxy
    names = [str(name) for name in found.data["class_name"]]
    return list(zip(names, found.class_id.tolist(), found.confidence.tolist(), coordinates.tolist(), strict=True))


def _entries(found: sv.Detections, points: bool) -> list[dict[str, Any]]:
    return [
        {
            "class_name": name,
            "class_id": class_id,
            "confidence": round(confidence, 4),
            "xy" if points else "xyxy": [round(value, 2) for value in numbers],
        }
        for name, class_id, confidence, numbers in _rows(found, points)
    ]


def _table(found: sv.Detections, points: bool, has_scores: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    table.add_column("confidence", justify="right")
    for name in ("x", "y") if points else ("left", "top", "right", "bottom"):
        table.add_column(name, justify="right")
    for name, _, confidence, numbers in _rows(found, points):
        table.add_row(Text(shown(name)), f"{confidence:.2f}" if has_scores else "-", *(f"{n:.0f}" for n in numbers))
    return table
