"""What `detect` and `point` have in common: every image, every class, then a table, JSON and annotated pictures."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import Picture, expand
from .models import opened_model
from .output import Report, shown
from .saving import plan_outputs, save

if TYPE_CHECKING:
    import supervision as sv
    from rich.table import Table

    from moondream_cv.detector import Detector, Pointer
    from moondream_cv.vision_model import VisionModel


def locate(
    command: str,
    make_finder: Callable[[VisionModel], Detector | Pointer],
    images: Sequence[str],
    classes: Sequence[str] | None,
    output: Path | None,
    model: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Run a detector or a pointer over images and report what it finds.

    Args:
        command: "detect" or "point".
        make_finder: Makes the detector or pointer from the loaded model, with `mark_truncated`.
        images: As `inputs.expand` takes them.
        classes: Names, also several in one separated by commas.
        output: As `saving.plan_outputs` takes it.
        model: What `moondream_cv.load` takes.
        device: Where to load it.
        as_json: Print JSON instead of tables.
    """
    names = split_classes(classes, images, command)
    pictures = expand(images)
    targets = plan_outputs(output, pictures)
    report = Report(command, as_json, model=model, classes=names)
    with opened_model(model, device, {command}, report) as vision_model:
        finder = make_finder(vision_model)
        report.put(has_scores=vision_model.has_scores)
        for number, (picture, target) in enumerate(zip(pictures, targets, strict=True), 1):
            with report.image(picture.name):
                _locate_one(report, finder, picture, names, target, f"{picture.name} ({number} of {len(pictures)})")
    report.finish()


def split_classes(classes: Sequence[str] | None, images: Sequence[str], command: str) -> list[str]:
    """Split names at commas and check them.

    Raises:
        ValueError: There are none, or they are blank or given twice.
    """
    if not classes:
        files = [image for image in images if Path(image).suffix or Path(image).exists()] or list(images[:1])
        others = [image for image in images if image not in files] or ["dog", "red circle"]
        line = shlex.join(["moondream-cv", command, *files, *(word for name in others for word in ("-c", name))])
        raise ValueError(f"nothing to look for; name it with -c, for example: {line}")
    from moondream_cv.detector import check_classes

    return check_classes([part.strip() for name in classes for part in name.split(",")])


def _locate_one(
    report: Report, finder: Detector | Pointer, picture: Picture, names: list[str], target: Path | None, progress: str
) -> None:
    from .pictures import annotate

    with report.working(progress):
        image = picture.open()
        found = finder(image, names)
    has_scores, points = finder.model.has_scores, report.command == "point"
    entry: dict[str, Any] = {"image": picture.name, "width": image.width, "height": image.height}
    entry["points" if points else "objects"] = _entries(found, points)
    what = "nothing" if not len(found) else f"{len(found)} {'point' if points else 'object'}{'s' * (len(found) > 1)}"
    report.print(f"{shown(picture.name)}  {image.width}×{image.height}  {what} found")
    if len(found):
        report.print(_table(found, points, has_scores))
    cut_off = _cut_off(found)
    if cut_off:
        entry["truncated"] = cut_off
        limit = f"--max-objects {finder.settings.max_objects}"
        report.notice(f"{shown(picture.name)}: there may be more of {', '.join(map(repr, cut_off))} than {limit}")
    if target is not None:
        save(annotate(image, found, has_scores=has_scores), target)
        entry["annotated"] = str(target)
        report.notice(f"Saved {shown(str(target))}")
    report.add(entry)


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
