"""Datasets for fine-tuning: images with boxes, their split, and the examples of training steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moondream_cv.arguments import check_classes, check_integer, check_share
from moondream_cv.dataset_layouts import Box, DatasetError, LabeledImage, read_labels
from moondream_cv.errors import ImageError
from moondream_cv.images import check_image_file

NUM_ABSENT = 1
"""Number of examples per image and epoch of a class that the image does not contain, so that absence is learned."""

_MAX_WARNINGS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Images for training, and held-out images for the score.

    Attributes:
        folder: Folder of the dataset.
        layout: "COCO", "YOLO" or "VOC".
        classes: Class names, in the order of their number of boxes.
        train: Images for training.
        held_out: Images for the score.
    """

    folder: Path
    layout: str
    classes: tuple[str, ...]
    train: tuple[LabeledImage, ...]
    held_out: tuple[LabeledImage, ...]


@dataclass(frozen=True)
class Example:
    """A request with its target: the boxes of one class in one image.

    Attributes:
        image: Image.
        name: Class name.
        boxes: Boxes of the class; none if the image does not contain it.
    """

    image: LabeledImage
    name: str
    boxes: tuple[Box, ...]


def load_dataset(
    folder: str | os.PathLike[str],
    classes: str | Sequence[str] | None = None,
    held_out: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Load the labels of a COCO, YOLO or VOC folder. Images are read when they are used.

    Boxes are clipped to their image; boxes without area are dropped. Unreadable images are skipped with a warning. The
    images of a split `valid` or `val` are held out; `test` is not used.

    Args:
        folder: Folder of the dataset. Its content determines the layout.
        classes: Class names; None: all classes with boxes.
        held_out: Share of the images that is held out if there is no `valid` split, above 0 and below 1.
        seed: Seed of this random choice.

    Raises:
        DatasetError: The folder does not exist, its layout is unknown, labels cannot be read, or there are no boxes or
            too few readable images.
        ValueError: A class is unknown, or another argument is invalid.
    """
    # Check the arguments and read the labels
    share, path = check_share("held_out", held_out), Path(folder).expanduser()
    check_integer("seed", seed, 0)
    wanted = None if classes is None else check_classes(classes)
    labels = read_labels(path)
    if labels.num_dropped:
        logger.warning("%s: boxes without area in their image are skipped: %d", path, labels.num_dropped)

    # Choose the classes
    counts: dict[str, int] = {}
    for image in (image for images in labels.splits.values() for image in images):
        for name, boxes in image.boxes.items():
            counts[name] = counts.get(name, 0) + len(boxes)
    known = sorted(counts, key=lambda name: (-counts[name], name))
    if not known:
        raise DatasetError(f"{path} ({labels.layout}) has images, but no boxes")
    unknown = [name for name in wanted or () if name not in counts]
    if unknown:
        raise ValueError(f"{path} has no boxes of {', '.join(map(repr, unknown))}; its classes are {', '.join(known)}")
    chosen = tuple(known if wanted is None else wanted)

    # Split the images
    splits = {split: [_with_classes(image, chosen) for image in images] for split, images in labels.splits.items()}
    readable = _readable(splits)
    train, valid = readable["train"], readable.get("valid", [])
    if not valid:
        order = np.random.default_rng(seed).permutation(len(train))
        size = min(max(1, round(share * len(train))), len(train) - 1)
        picked = {int(i) for i in order[:size]}
        train, valid = (
            [image for i, image in enumerate(train) if i not in picked],
            [image for i, image in enumerate(train) if i in picked],
        )
    if not train or not valid:
        raise DatasetError(
            f"{path} must have at least 2 readable images, one to train and one to hold out; it has "
            f"{len(train) + len(valid)}"
        )
    if not any(image.boxes for image in train):
        raise DatasetError(f"the images of {path} for training have no boxes of {', '.join(chosen)}")
    return Dataset(path, labels.layout, chosen, tuple(train), tuple(valid))


def batches(images: Sequence[LabeledImage], classes: Sequence[str], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield the examples of one training step after another, without end.

    An epoch has one example per image and class in it, and `NUM_ABSENT` of other classes per image. Examples of an
    image follow each other, so that it is encoded once.

    Args:
        images: Images for training.
        classes: Class names.
        size: Number of examples per step.
        seed: Seed of the order and of the absent classes. Equal seeds yield equal batches.
    """
    batch: list[Example] = []
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        epoch += 1
        for index in rng.permutation(len(images)):
            for example in examples_of(images[index], classes, rng):
                batch.append(example)
                if len(batch) == size:
                    yield batch
                    batch = []


def examples_of(image: LabeledImage, classes: Sequence[str], rng: np.random.Generator) -> list[Example]:
    """Return one example per class in an image, and `NUM_ABSENT` of classes that it does not contain.

    Args:
        image: Image of a `Dataset`.
        classes: Class names.
        rng: Source of the absent classes.
    """
    examples = [Example(image, name, boxes) for name, boxes in image.boxes.items()]
    absent = [name for name in classes if name not in image.boxes and name not in image.crowds]
    picked = rng.permutation(len(absent))[:NUM_ABSENT]
    return examples + [Example(image, absent[i], ()) for i in picked]


def _with_classes(image: LabeledImage, classes: Sequence[str]) -> LabeledImage:
    """Return an image with boxes of some classes only, in the order of the classes, without incomplete ones."""
    kept = [name for name in classes if name in image.boxes and name not in image.crowds]
    return replace(image, boxes={name: image.boxes[name] for name in kept})


def _readable(splits: dict[str, list[LabeledImage]]) -> dict[str, list[LabeledImage]]:
    """Return the images with a readable header. The first others are named in warnings."""
    found: dict[str, list[LabeledImage]] = {split: [] for split in splits}
    num_unreadable = 0
    for split, images in splits.items():
        for image in images:
            try:
                check_image_file(image.path)
            except ImageError as error:
                num_unreadable += 1
                if num_unreadable <= _MAX_WARNINGS:
                    logger.warning("skipped: %s", error)
                continue
            found[split].append(image)
    if num_unreadable > _MAX_WARNINGS:
        logger.warning("skipped unreadable images in all: %d", num_unreadable)
    return found
