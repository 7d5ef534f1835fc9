"""Labels that people have reviewed in a labeling tool, in the formats in which these tools export them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from moondream_cv.dataset_layouts import DatasetError, Labels, UnknownLayoutError, read_coco_file, read_labels
from moondream_cv.labeling.errors import LabelingError

_SUPPORTED = "a JSON export of Label Studio, a COCO file, or a folder with COCO, YOLO, VOC or LabelMe labels"
_LABELME_SHAPES = ("rectangle", "polygon", "rotation", "circle", "point")
_INVALID = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # errors of reading invalid content
_LABELS = "labels"  # end of the types of labeled regions in Label Studio


@dataclass(frozen=True)
class ReviewedObject:
    """An object that a person has drawn or kept.

    Attributes:
        class_name: Class name.
        xyxy: Box as fractions of the image. A point has `x_min == x_max` and `y_min == y_max`.
        is_point: Whether the object is a point.
    """

    class_name: str
    xyxy: tuple[float, float, float, float]
    is_point: bool = False


@dataclass(frozen=True)
class ReviewedImage:
    """An image that a person has reviewed.

    Attributes:
        name: Name, path or URL of the image, with "/".
        objects: All its objects.
    """

    name: str
    objects: tuple[ReviewedObject, ...]


@dataclass(frozen=True)
class Review:
    """Reviewed images.

    Attributes:
        images: Images, including those without objects.
        has_points: Whether the format has points.
        rounding: Largest change of an edge in pixels by the rounding of the format and of the tools that write it.
        relative_rounding: The same as a fraction of the image, which is added.
    """

    images: Sequence[ReviewedImage]
    has_points: bool
    rounding: float
    relative_rounding: float = 0.0


def read_review(path: Path) -> Review:
    """Read reviewed labels. The content determines the format.

    Args:
        path: JSON export of Label Studio, COCO file, or folder with COCO, YOLO, VOC or LabelMe labels.

    Raises:
        LabelingError: The path does not exist, or its labels have another format or cannot be read.
    """
    try:
        if path.is_file():
            return _read_file(path)
        try:
            return _from_layout(read_labels(path, for_training=False))
        except UnknownLayoutError:
            images = [image for file in _json_files(path) if (image := _labelme_image(file)) is not None]
    except DatasetError as error:
        raise LabelingError(str(error)) from error
    if not images:
        raise LabelingError(f"{path} has no reviewed labels in a known format; give {_SUPPORTED}")
    return Review(images, has_points=True, rounding=0.01)


def read_label_studio(path: Path) -> list[ReviewedImage]:
    """Read a JSON export of Label Studio.

    The latest annotation of a task counts. Tasks that nobody has annotated and cancelled annotations are left out.

    Args:
        path: JSON file.

    Raises:
        LabelingError: The file cannot be read, or is not such an export.
    """
    tasks = _read_json(path)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
        raise LabelingError(f"{path} is not an export of Label Studio; export the project as JSON, not as JSON-MIN")
    images = []
    try:
        for task in tasks:
            done = [one for one in task.get("annotations", ()) if not one.get("was_cancelled")]
            if done:
                latest = max(done, key=lambda one: (one.get("updated_at") or one.get("created_at") or "", _id_of(one)))
                objects = [found for region in latest["result"] for found in _region_objects(region)]
                images.append(ReviewedImage(_task_image(task["data"]), tuple(objects)))
    except _INVALID as error:
        raise LabelingError(f"{path} is not a valid export of Label Studio: {error!r}") from error
    return images


# --- Label Studio -----------------------------------------------------------------------------------------------------


def _id_of(annotation: dict[str, Any]) -> int:
    identifier = annotation.get("id")
    return identifier if isinstance(identifier, int) else 0


def _task_image(data: dict[str, Any]) -> str:
    """Return the path in the URL of the image of a task."""
    url = data.get("image") or next((value for value in data.values() if isinstance(value, str)), None)
    if not isinstance(url, str):
        raise ValueError(f"a task must have the URL of an image, got {data!r:.100}")
    parts = urlsplit(url)
    local = parse_qs(parts.query).get("d")  # URLs of local files
    return local[0] if local else unquote(parts.path or parts.netloc)


def _region_objects(region: dict[str, Any]) -> Iterator[ReviewedObject]:
    """Yield the objects of a region: one for each of its labels."""
    kind, value = str(region.get("type")), region.get("value", {})
    labels = value.get(kind, ()) if kind.endswith(_LABELS) else ()
    if not labels:
        return
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"the labels of a region must be a list of texts, got {labels!r:.100}")
    is_point = False
    xs: Sequence[float]
    ys: Sequence[float]
    if "points" in value:  # a polygon
        xs, ys = zip(*value["points"], strict=True)
    elif "radiusX" in value:  # an ellipse
        xs = value["x"] - value["radiusX"], value["x"] + value["radiusX"]
        ys = value["y"] - value["radiusY"], value["y"] + value["radiusY"]
    elif "height" in value:
        xs, ys = _rotated_corners(value, region.get("original_width", 1), region.get("original_height", 1))
    elif "x" in value:
        is_point, xs, ys = True, (value["x"],), (value["y"],)
    else:
        raise LabelingError(f"regions of the type {kind} are not boxes or points; convert them to rectangles")
    box = _finite(min(xs) / 100, min(ys) / 100, max(xs) / 100, max(ys) / 100)
    for name in labels:
        yield ReviewedObject(name, box, is_point)


def _rotated_corners(value: dict[str, Any], width: float, height: float) -> tuple[Sequence[float], Sequence[float]]:
    """Return the corners of a rectangle in percent of the image; it is rotated about its upper left corner."""
    angle = math.radians(value.get("rotation") or 0)
    right = (value["width"] * math.cos(angle), value["width"] * math.sin(angle) * width / height)
    down = (-value["height"] * math.sin(angle) * height / width, value["height"] * math.cos(angle))
    corners = [(i * right[0] + j * down[0], i * right[1] + j * down[1]) for i in (0, 1) for j in (0, 1)]
    return [value["x"] + x for x, _ in corners], [value["y"] + y for _, y in corners]


# --- COCO, YOLO and VOC -----------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Review:
    content = _read_json(path)
    if isinstance(content, list):
        return Review(read_label_studio(path), has_points=True, rounding=0.01)
    if isinstance(content, dict) and "annotations" in content and "images" in content:
        return _from_layout(read_coco_file(path))
    image = _labelme_image(path)
    if image is None:
        raise LabelingError(f"{path} has no reviewed labels in a known format; give {_SUPPORTED}")
    return Review([image], has_points=True, rounding=0.01)


def _from_layout(labels: Labels) -> Review:
    """Return the labels of a COCO, YOLO or VOC dataset."""
    images = [
        ReviewedImage(
            image.path.as_posix(),
            tuple(ReviewedObject(name, box) for name, boxes in image.boxes.items() for box in boxes),
        )
        for images in labels.splits.values()
        for image in images
    ]
    if labels.layout == "YOLO":
        return Review(images, has_points=False, rounding=0.01, relative_rounding=1e-5)
    return Review(images, has_points=False, rounding=1.0 if labels.layout == "VOC" else 0.5)


# --- LabelMe ----------------------------------------------------------------------------------------------------------


def _json_files(folder: Path) -> list[Path]:
    """Return the JSON files in a folder and its subfolders, without hidden ones."""
    files = sorted(folder.rglob("*.json"))
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _labelme_image(path: Path) -> ReviewedImage | None:
    """Return the labels of a LabelMe file; None for another JSON file."""
    content = _read_json(path)
    if not isinstance(content, dict) or "shapes" not in content:
        return None
    try:
        name = PurePosixPath(str(content.get("imagePath") or path.stem).replace("\\", "/")).name
        size = float(content["imageWidth"]), float(content["imageHeight"])
        if not all(math.isfinite(side) and side > 0 for side in size):
            raise ValueError(f"the size of the image must be positive, got {size[0]:g} x {size[1]:g}")
        objects = tuple(_shape_object(shape, *size) for shape in content["shapes"])
    except _INVALID as error:
        raise LabelingError(f"{path} is not a valid LabelMe file: {error!r}") from error
    return ReviewedImage((path.parent / name).as_posix(), objects)


def _shape_object(shape: dict[str, Any], width: float, height: float) -> ReviewedObject:
    kind = shape.get("shape_type") or "polygon"
    if kind not in _LABELME_SHAPES:
        raise ValueError(f"the shape {kind!r} is not a box or a point; convert it to a rectangle")
    xs, ys = zip(*((float(x), float(y)) for x, y in shape["points"]), strict=True)
    if kind == "circle":  # its center and a point on it
        radius = math.dist((xs[0], ys[0]), (xs[1], ys[1]))
        xs, ys = (xs[0] - radius, xs[0] + radius), (ys[0] - radius, ys[0] + radius)
    box = _finite(min(xs) / width, min(ys) / height, max(xs) / width, max(ys) / height)
    if not isinstance(shape["label"], str):
        raise ValueError(f"the label of a shape must be a text, got {shape['label']!r:.100}")
    return ReviewedObject(shape["label"], box, kind == "point")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise LabelingError(f"{path} cannot be read: {error}; give {_SUPPORTED}") from error


def _finite(*box: float) -> tuple[float, float, float, float]:
    """Return a box whose coordinates are numbers."""
    if not all(map(math.isfinite, box)):
        raise ValueError(f"coordinates must be finite, got {', '.join(f'{value:g}' for value in box)}")
    x_min, y_min, x_max, y_max = box
    return x_min, y_min, x_max, y_max
