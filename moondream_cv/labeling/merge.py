"""Merge reviewed labels into `labels.jsonl`: the objects of a reviewed image become those of the reviewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moondream_cv.durable_files import open_replacement
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports.files import accept_edited
from moondream_cv.labeling.image_names import ImageIndex
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.records import ImageRecord, LabeledObject, read_records
from moondream_cv.labeling.reviewed import Review, ReviewedImage, ReviewedObject, read_review

_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class MergeSummary:
    """Result of a merge.

    Attributes:
        num_reviewed: Number of reviewed images.
        num_changed: Number of images whose objects changed.
        new_classes: Classes of reviewed objects that no object of the dataset had before.
        unknown: Names of reviewed images that the dataset does not contain.
    """

    num_reviewed: int
    num_changed: int
    new_classes: tuple[str, ...]
    unknown: tuple[str, ...]


def merge_reviewed(
    folder: Path, reviewed: Path, *, on_classes: Callable[[Sequence[str], bool], None] | None = None
) -> MergeSummary:
    """Replace the objects of reviewed images in `labels.jsonl`.

    Objects that the reviewer has not changed keep their confidence and origin. All others have the origin "human". An
    image without objects has been reviewed as empty. Merging the same labels again changes nothing.

    Args:
        folder: Folder with `labels.jsonl`.
        reviewed: JSON export of Label Studio, COCO file, or folder with COCO, YOLO, VOC or LabelMe labels. Tasks of
            Label Studio without an annotation have not been reviewed.
        on_classes: Function of the class names of the reviewed objects, and whether they include points. It is called
            before `labels.jsonl` changes, so it can reject them.

    Raises:
        LabelingError: The reviewed labels cannot be read, no reviewed image is in the dataset, or several have the name
            of the same image. `labels.jsonl` has not changed.
        OSError: `labels.jsonl` cannot be written. It has not changed.
    """
    # Match the images
    review = read_review(reviewed)
    path = folder / LABELS
    images: list[str] = []
    classes: set[str] = set()
    for record in read_records(path):
        if record.is_exported:
            images.append(record.image)
            classes.update(labeled.class_name for labeled in record.objects)
    matched, unknown = _match(review, images, reviewed)

    names = dict.fromkeys(labeled.class_name for image in matched.values() for labeled in image.objects)
    if on_classes is not None:
        has_points = any(labeled.is_point for image in matched.values() for labeled in image.objects)
        on_classes(list(names), has_points)

    # Replace their objects
    num_changed = 0
    with open_replacement(path) as file:
        for before, after in _merged(path, matched, review):
            num_changed += after.objects != before.objects
            file.write(after.to_line())
    accept_edited(folder, reviewed)
    return MergeSummary(len(matched), num_changed, tuple(name for name in names if name not in classes), unknown)


def _match(review: Review, images: list[str], reviewed: Path) -> tuple[dict[str, ReviewedImage], tuple[str, ...]]:
    """Return the reviewed images by the name in the dataset, and the names of the others."""
    index = ImageIndex(images)
    matched: dict[str, ReviewedImage] = {}
    unknown = []
    for image in review.images:
        name = index.find(image.name)
        if name is None:
            unknown.append(image.name)
        elif name in matched:
            raise LabelingError(
                f"two reviewed images have the name of the image {name}: {matched[name].name} and {image.name}; export "
                "them without augmentation, and each once"
            )
        else:
            matched[name] = image
    if not matched:
        if not unknown:
            raise LabelingError(f"{reviewed} contains no reviewed image; submit annotations before the export")
        raise LabelingError(
            f"no reviewed image is in the dataset: {reviewed} has {', '.join(unknown[:_NUM_EXAMPLES])}, the dataset "
            f"has {', '.join(images[:_NUM_EXAMPLES])}; give the review of this dataset"
        )
    return matched, tuple(unknown)


def _merged(
    path: Path, matched: Mapping[str, ReviewedImage], review: Review
) -> Iterator[tuple[ImageRecord, ImageRecord]]:
    """Yield each record before and after the merge."""
    for record in read_records(path):
        image = matched.get(record.image) if record.is_exported else None
        if image is None:
            yield record, record
        else:
            yield record, replace(record, objects=_merged_objects(record, image, review), reviewed=True)


def _merged_objects(record: ImageRecord, image: ReviewedImage, review: Review) -> tuple[LabeledObject, ...]:
    """Return the reviewed objects of an image, ordered by class. Unchanged ones are those of the record."""
    rounding = review.rounding + review.relative_rounding * max(record.width, record.height)
    kept = {i for i, labeled in enumerate(record.objects) if labeled.is_point and not review.has_points}
    free = set(range(len(record.objects))) - kept
    added = []
    for item in image.objects:
        labeled = _in_pixels(item, record)
        distances = {i: distance for i in free if (distance := _distance(record.objects[i], labeled)) <= rounding}
        if distances:
            nearest = min(distances, key=lambda i: (distances[i], i))
            kept.add(nearest)
            free.remove(nearest)
        elif labeled.is_point or (labeled.xyxy[0] < labeled.xyxy[2] and labeled.xyxy[1] < labeled.xyxy[3]):
            added.append(labeled)
    objects = [*(record.objects[i] for i in sorted(kept)), *added]
    order = list(dict.fromkeys(labeled.class_name for labeled in (*record.objects, *added)))
    return tuple(sorted(objects, key=lambda labeled: order.index(labeled.class_name)))


def _in_pixels(item: ReviewedObject, record: ImageRecord) -> LabeledObject:
    size = (record.width, record.height, record.width, record.height)
    x_min, y_min, x_max, y_max = (
        round(min(max(value, 0.0), 1.0) * side, 2) for value, side in zip(item.xyxy, size, strict=True)
    )
    return LabeledObject(item.class_name, (x_min, y_min, x_max, y_max), None, "human", None, item.is_point)


def _distance(labeled: LabeledObject, other: LabeledObject) -> float:
    """Return the largest distance of an edge in pixels; infinity for objects of different classes."""
    if (labeled.class_name, labeled.is_point) != (other.class_name, other.is_point):
        return float("inf")
    return max(abs(value - changed) for value, changed in zip(labeled.xyxy, other.xyxy, strict=True))
