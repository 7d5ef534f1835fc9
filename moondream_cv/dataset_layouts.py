"""Labels of COCO, YOLO and VOC folders.

supervision's loaders read the same layouts, but they raise if one image of thousands is unreadable, decode every image
of a VOC folder, and keep a mask in image size for each polygon. These readers only read labels. Boxes are converted as
in supervision 0.31; tests compare both.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moondream_cv.errors import MoondreamError
from moondream_cv.images import IMAGE_SUFFIXES

Box = tuple[float, float, float, float]
"""x_min, y_min, x_max, y_max as fractions of the image."""

SPLITS = {"train": ("train", "training"), "valid": ("valid", "val", "validation"), "test": ("test", "testing")}
"""Names of the folders and files of each split."""

_Splits = Mapping[str, tuple[str, ...]]

_SPLIT_WORD = re.compile(r"(?:^|[^a-z])(train|val|test)")
_COCO_KEYS = {"images", "annotations", "categories"}
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    SyntaxError,
    ArithmeticError,
    RecursionError,
)
_SUPPORTED = (
    "COCO (train/*.json, annotations/*.json or *.json with images, annotations and categories), "
    "YOLO (*.yaml with names, and images in train/images, images/train or images), "
    "VOC (*.xml with an annotation in train, Annotations or the folder)"
)


class DatasetError(MoondreamError):
    """A dataset does not exist, has an unknown layout, or contains labels that cannot be read."""


class UnknownLayoutError(DatasetError):
    """A folder has none of the supported layouts."""


@dataclass(frozen=True)
class LabeledImage:
    """An image file with its labels.

    Attributes:
        path: Image file.
        boxes: Boxes by class, without empty classes.
        crowds: Classes with a region that holds an uncounted number of objects (`iscrowd` of COCO). The boxes of these
            classes are incomplete.
    """

    path: Path
    boxes: Mapping[str, tuple[Box, ...]]
    crowds: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Labels:
    """All labels of a folder.

    Attributes:
        layout: "COCO", "YOLO" or "VOC".
        splits: Images by split, "train", "valid" and "test". A folder without splits has "train" only.
        num_dropped: Number of boxes without area inside their image.
    """

    layout: str
    splits: Mapping[str, Sequence[LabeledImage]]
    num_dropped: int


def read_labels(folder: Path, *, for_training: bool = True) -> Labels:
    """Read the labels of a folder. Its content determines the layout.

    Args:
        folder: Folder of the dataset.
        for_training: Require a split `train`, and ignore the split `test`. False reads all splits that exist.

    Raises:
        UnknownLayoutError: The layout of the folder is unknown.
        DatasetError: There is no such folder, it has no images for training, or a file with labels cannot be read.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise DatasetError(f"the dataset {str(folder)!r} {problem}; give a COCO, YOLO or VOC folder")
    names = {split: aliases for split, aliases in SPLITS.items() if split != "test" or not for_training}
    readers: tuple[tuple[str, Callable[[Path, _Boxes, _Splits], dict[str, list[LabeledImage]]]], ...]
    readers = (("COCO", _read_coco), ("YOLO", _read_yolo), ("VOC", _read_voc))
    for layout, read in readers:
        boxes = _Boxes()
        splits = read(folder, boxes, names)
        if splits:
            if for_training and "train" not in splits:
                raise DatasetError(
                    f"{folder} has the {layout} layout, but no images for training; supported layouts: {_SUPPORTED}"
                )
            return Labels(layout, splits, boxes.num_dropped)
    raise UnknownLayoutError(f"{folder} has an unknown layout; supported layouts: {_SUPPORTED}")


def read_coco_file(path: Path) -> Labels:
    """Read the labels of one COCO file, as the split `train`.

    Args:
        path: JSON file with images, annotations and categories. The image files may be absent.

    Raises:
        DatasetError: The file cannot be read, or is not a COCO file.
    """
    content = _coco_content(path)
    if content is None:
        raise DatasetError(f"{path} is not a COCO file; it must have images, annotations and categories")
    boxes = _Boxes()
    with _reading(path):
        images = _coco_images(path.parent, path, content, boxes)
    return Labels("COCO", {"train": images}, boxes.num_dropped)


class _Boxes:
    """Collects boxes by class, clips them to the image, and counts those without area."""

    def __init__(self) -> None:
        self.num_dropped = 0

    def collect(self, labeled: Iterable[tuple[str, Sequence[float]]]) -> dict[str, tuple[Box, ...]]:
        found: dict[str, list[Box]] = {}
        for name, values in labeled:
            x_min, y_min, x_max, y_max = (min(max(value, 0.0), 1.0) for value in values)
            if not all(map(math.isfinite, values)) or x_min >= x_max or y_min >= y_max:
                self.num_dropped += 1
                continue
            found.setdefault(name, []).append((x_min, y_min, x_max, y_max))
        return {name: tuple(boxes) for name, boxes in found.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert errors of reading a file with labels."""
    try:
        yield
    except _UNREADABLE as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DatasetError(f"the labels in {path} cannot be read: {reason}") from error


# --- COCO -------------------------------------------------------------------------------------------------------------


def _read_coco(root: Path, boxes: _Boxes, names: _Splits) -> dict[str, list[LabeledImage]]:
    splits = {}
    for split, (path, content) in _coco_files(root, names).items():
        with _reading(path):
            splits[split] = _coco_images(root, path, content, boxes)
    return splits


def _coco_files(root: Path, names: _Splits) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the file with the boxes of each split, and its content."""
    candidates = {
        split: [path for name in aliases for path in _sorted(root / name, ".json")] for split, aliases in names.items()
    }
    for path in (*_sorted(root, ".json"), *_sorted(root / "annotations", ".json")):
        word = _SPLIT_WORD.search(path.stem.lower())
        split = "train" if word is None else {"val": "valid"}.get(word[1], word[1])
        if split in candidates:
            candidates[split].append(path)
    found = {}
    for split, paths in candidates.items():
        instances = [path for path in paths if path.stem.startswith("instances")]  # next to captions and keypoints
        contents = [(path, content) for path in instances or paths if (content := _coco_content(path)) is not None]
        if len(contents) > 1:
            listed = ", ".join(str(path.relative_to(root)) for path, _ in contents)
            raise DatasetError(f"{root} has several files with the labels of its {split} images: {listed}; keep one")
        if contents:
            found[split] = contents[0]
    return found


def _coco_content(path: Path) -> dict[str, Any] | None:
    """Return the content of a COCO file; None for another JSON file."""
    with _reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) and content.keys() >= _COCO_KEYS else None


def _coco_images(root: Path, path: Path, content: dict[str, Any], boxes: _Boxes) -> list[LabeledImage]:
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    labels: dict[Any, list[tuple[str, Sequence[float]]]] = {}
    crowds: dict[Any, set[str]] = {}
    for annotation in content["annotations"]:
        image_id, category = annotation["image_id"], annotation["category_id"]
        if category not in names:
            raise ValueError(f"an annotation has the category {category!r}, which is not in categories")
        name = names[category]
        if annotation.get("iscrowd"):
            crowds.setdefault(image_id, set()).add(name)
            continue
        x, y, width, height = map(float, annotation["bbox"])
        labels.setdefault(image_id, []).append((name, (x, y, x + width, y + height)))
    stem = path.stem.removeprefix("instances_").removeprefix("_annotations")
    folders = [path.parent, path.parent / "images", root / stem, root / "images" / stem, root / "images", root]
    images = []
    for image in content["images"]:
        width, height = _positive(image["width"], image["height"])
        scaled = [(name, _scaled(box, width, height)) for name, box in labels.get(image["id"], ())]
        found = frozenset(crowds.get(image["id"], ()))
        images.append(LabeledImage(_coco_image(folders, image["file_name"]), boxes.collect(scaled), found))
    return images


def _coco_image(folders: Sequence[Path], name: str) -> Path:
    """Return the file of an image, in the first folder that contains it."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or Path(name).is_absolute():
        raise ValueError(f"file_name must be a path inside the dataset, got {name!r}")
    paths = [folder / parts for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


# --- YOLO -------------------------------------------------------------------------------------------------------------


def _read_yolo(root: Path, boxes: _Boxes, split_names: _Splits) -> dict[str, list[LabeledImage]]:
    found = [(path, content) for path in _sorted(root, ".yaml", ".yml") if (content := _yolo_content(path)) is not None]
    if not found:
        return {}
    path, content = found[0]
    with _reading(path):
        given = content["names"]
        items = given.items() if isinstance(given, dict) else enumerate(given)
        names = {int(key): _class_name(name) for key, name in items}
        keypoints = math.prod(content["kpt_shape"]) if "kpt_shape" in content else None
    splits: dict[str, list[LabeledImage]] = {}
    for split, aliases in split_names.items():
        folders = [folder for name in aliases for folder in (root / name / "images", root / "images" / name)]
        if split == "train" and not any(folder.is_dir() for folder in folders):
            folders = [root / "images"]
        images = [path for folder in folders for path in _sorted(folder, *IMAGE_SUFFIXES)]
        if images:
            splits[split] = [LabeledImage(path, boxes.collect(_yolo_boxes(path, names, keypoints))) for path in images]
    return splits


def _class_name(value: Any) -> str:
    if isinstance(value, (list, dict)):  # with aliases of YAML, its text may have terabytes
        raise ValueError(f"a class name must be a text, got a {type(value).__name__}")
    return str(value)


def _yolo_content(path: Path) -> dict[str, Any] | None:
    """Return the content of a file with class names; None for another YAML file."""
    import yaml

    with _reading(path):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    return content if isinstance(content, dict) and isinstance(content.get("names"), dict | list) else None


def _yolo_boxes(image: Path, names: Mapping[int, str], keypoints: int | None) -> list[tuple[str, Sequence[float]]]:
    """Return the boxes of an image: "class x y width height", or the boxes around "class x y x y ..."."""
    folders = [*image.parent.parts]
    place = max(i for i, part in enumerate(folders) if part == "images")
    path = Path(*folders[:place], "labels", *folders[place + 1 :], f"{image.stem}.txt")
    if not path.is_file():
        return []
    found: list[tuple[str, Sequence[float]]] = []
    with _reading(path):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            class_id, *values = map(float, line.split())
            if class_id not in names:
                raise ValueError(
                    f"line {number} has the class {class_id:g}, and there are classes {min(names)} to {max(names)}"
                )
            if len(values) in (4, 5) or (keypoints is not None and len(values) == 4 + keypoints):
                x, y, width, height = values[:4]
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            elif len(values) >= 6:
                xs, ys = values[: len(values) // 2 * 2 : 2], values[1::2]
                box = (min(xs), min(ys), max(xs), max(ys))
            else:
                raise ValueError(
                    f"line {number} must have a class and 4 numbers, or a class and a polygon, got {line!r:.60}"
                )
            found.append((names[int(class_id)], box))
    return found


# --- VOC --------------------------------------------------------------------------------------------------------------


def _read_voc(root: Path, boxes: _Boxes, names: _Splits) -> dict[str, list[LabeledImage]]:
    splits = {}
    for split, aliases in names.items():
        folders = [folder for name in aliases for folder in (root / name, root / name / "Annotations")]
        if split == "train" and not any(_sorted(folder, ".xml") for folder in folders):
            folders = [root, root / "Annotations", root / "annotations"]
        images = [_voc_image(root, path, boxes) for folder in folders for path in _sorted(folder, ".xml")]
        found = [image for image in images if image is not None]
        if found:
            splits[split] = found
    return splits


def _voc_image(root: Path, path: Path, boxes: _Boxes) -> LabeledImage | None:
    """Return the image of an annotation; None for another XML file."""
    with _reading(path):
        annotation = ElementTree.parse(path).getroot()
        if annotation.tag != "annotation":
            return None
        width, height = _positive(_text(annotation, "size/width"), _text(annotation, "size/height"))
        labeled = []
        for item in annotation.iterfind("object"):
            x1, y1, x2, y2 = (float(_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            box = min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2), max(y1, y2)  # the pixels of a box, counted from 1
            labeled.append((_text(item, "name"), _scaled(box, width, height)))
        name = PurePosixPath((annotation.findtext("filename") or "").replace("\\", "/")).name
        parent = root if path.parent == root else path.parent.parent
        folders = [path.parent, parent / "JPEGImages", parent / "images", root]
        paths = [folder / file for folder in folders for file in _image_names(folder, path.stem, name)]
    return LabeledImage(paths[0] if paths else path.parent / (name or path.stem), boxes.collect(labeled))


def _image_names(folder: Path, stem: str, name: str) -> list[str]:
    """Return the names of existing image files: that of the annotation's stem first."""
    names = [f"{stem}{suffix}" for suffix in sorted(IMAGE_SUFFIXES)]
    names += [f"{stem}{suffix.upper()}" for suffix in sorted(IMAGE_SUFFIXES)]
    return [one for one in (*names, name) if one and (folder / one).is_file()]


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"the element {path} is missing")
    return text


# --- Shared -----------------------------------------------------------------------------------------------------------


def _sorted(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files of a folder with one of several suffixes; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )


def _positive(width: Any, height: Any) -> tuple[float, float]:
    """Return the size of an image in pixels."""
    if not (float(width) > 0 and float(height) > 0):
        raise ValueError(f"the size of the image must be positive, got {width} x {height}")
    return float(width), float(height)


def _scaled(box: Sequence[float], width: float, height: float) -> Box:
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height
