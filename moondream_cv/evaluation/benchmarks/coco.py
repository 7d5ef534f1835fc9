"""COCO ground truth: `instances_*.json` next to folders of images, and `_annotations.coco.json` in split folders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moondream_cv.arguments import check_unique
from moondream_cv.dataset_layouts import DatasetError
from moondream_cv.evaluation.benchmarks.dataset import Example
from moondream_cv.evaluation.benchmarks.files import find_image, reading_labels

_KEYS = {"images", "annotations", "categories"}


def is_coco(content: Any) -> bool:
    """Return whether the content of a JSON file is COCO ground truth.

    Args:
        content: Content of the file.
    """
    return isinstance(content, Mapping) and content.keys() >= _KEYS


def image_folders(path: Path, root: Path) -> list[Path]:
    """Return the folders to search for the images of a file.

    Args:
        path: JSON file.
        root: Folder of the benchmark.
    """
    stem = path.stem.removeprefix("instances_").removeprefix("_annotations")
    parents = [path.parent, path.parent.parent] if path.parent == root else [path.parent, root]
    inner = [folder / name for folder in parents for name in (stem, f"images/{stem}", "images")]
    return [path.parent, *inner, *parents[1:]]


def read_coco(path: Path, root: Path, content: Mapping[str, Any]) -> tuple[list[Example], dict[str, Any]]:
    """Return the images of a file, and its ground truth with the keys that mAP needs.

    Categories without annotations are left out, because their average precision is not defined: the first category of
    Roboflow's exports is the name of the dataset. Annotations are numbered from 1, because pycocotools takes the ID 0
    for "no match".

    Args:
        path: JSON file.
        root: Folder of the benchmark.
        content: Content of the file.

    Raises:
        DatasetError: The content is invalid, or there are no annotations.
    """
    with reading_labels(path):
        images = [{"id": one["id"], **_size(one)} for one in content["images"]]
        image_ids = {one["id"] for one in images}
        if len(image_ids) < len(images):
            raise ValueError("the IDs of images must be unique")
        names = {one["id"]: str(one["name"]) for one in content["categories"]}
        annotations = [_annotation(number, one) for number, one in enumerate(content["annotations"], 1)]
        for annotation in annotations:
            if annotation["category_id"] not in names or annotation["image_id"] not in image_ids:
                raise ValueError(f"annotation {annotation['id']} has an unknown category or image")
        used = {annotation["category_id"] for annotation in annotations}
        categories = [{"id": key, "name": name} for key, name in names.items() if key in used]
        if not all(one["name"].strip() for one in categories):
            raise ValueError("the names of categories must not be empty")
        check_unique("the names of categories", [one["name"] for one in categories])
        folders = image_folders(path, root)
        examples = [
            Example(name, find_image(folders, name)) for name in (str(one["file_name"]) for one in content["images"])
        ]
        if len({example.name for example in examples}) < len(examples):
            raise ValueError("the file names of images must be unique")
    if not annotations:
        raise DatasetError(f"{path} has no annotations; mAP needs ground truth")
    return examples, {"images": images, "annotations": annotations, "categories": categories}


def first_images(coco: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the ground truth of the first images.

    Args:
        coco: Ground truth from `read_coco`.
        count: Number of images.
    """
    images = coco["images"][:count]
    kept = {image["id"] for image in images}
    annotations = [one for one in coco["annotations"] if one["image_id"] in kept]
    return {**coco, "images": images, "annotations": annotations}


def _size(image: Mapping[str, Any]) -> dict[str, float]:
    width, height = float(image["width"]), float(image["height"])
    if not (width > 0 and height > 0):
        raise ValueError(f"the size of an image must be positive, got {width:g} x {height:g}")
    return {"width": width, "height": height}


def _annotation(number: int, annotation: Mapping[str, Any]) -> dict[str, Any]:
    x, y, width, height = map(float, annotation["bbox"])
    area = float(annotation.get("area", width * height))
    if not all(map(math.isfinite, (x, y, width, height, area))):
        raise ValueError(f"annotation {number} must have a finite box and area, got {annotation['bbox']} and {area:g}")
    return {
        "id": number,
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": [x, y, width, height],
        "area": area,
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
