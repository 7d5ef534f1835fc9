"""Records of labeled images: the lines of `labels.jsonl`, from which every export is made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moondream_cv.labeling.errors import LabelingError

Origin = Literal["model", "given", "human"]
"""Source of an object: the model, the labels of the input dataset, or a review."""


@dataclass(frozen=True)
class LabeledObject:
    """An object in an image.

    Attributes:
        class_name: Class name.
        xyxy: Box in pixels of the upright image, with 2 decimals. A point has `x_min == x_max` and `y_min == y_max`.
        confidence: Confidence of the model, 0..1, with 4 decimals; None if it has no scores, or for another origin.
        origin: Source of the object.
        prompt: Prompt that found the object, if it is not the class name.
        is_point: Whether the object is a point.
    """

    class_name: str
    xyxy: tuple[float, float, float, float]
    confidence: float | None = None
    origin: Origin = "model"
    prompt: str | None = None
    is_point: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the object as in a line of `labels.jsonl`."""
        place = {"point": list(self.xyxy[:2])} if self.is_point else {"box": list(self.xyxy)}
        entry = {"class_name": self.class_name, **place, "confidence": self.confidence, "origin": self.origin}
        return entry if self.prompt is None else {**entry, "prompt": self.prompt}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LabeledObject:
        """Return the object of an entry that `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: The entry is invalid.
        """
        is_point = "point" in entry
        place = entry["point"] * 2 if is_point else entry["box"]
        x_min, y_min, x_max, y_max = map(float, place)
        return cls(
            str(entry["class_name"]),
            (x_min, y_min, x_max, y_max),
            None if entry["confidence"] is None else float(entry["confidence"]),
            entry["origin"],
            entry.get("prompt"),
            is_point,
        )


@dataclass(frozen=True)
class ImageRecord:
    """An image with its objects.

    Attributes:
        image: File name of the image in exports, which is unique in the dataset.
        source: Path or URL of the image.
        width: Width of the upright image in pixels; 0 if the image was not read.
        height: Height of the upright image in pixels; 0 if the image was not read.
        objects: Objects, ordered by class and in the order of the model.
        split: Split in the input dataset; None: exports choose it.
        group: Name that images share which must be in the same split, such as neighboring frames of a video.
        duplicate_of: File name of the earlier image that this one nearly equals. It has no objects and is not exported.
        error: Message of the error if the image or the model failed. The image is not exported.
        reviewed: Whether a person has reviewed the objects.
    """

    image: str
    source: str
    width: int = 0
    height: int = 0
    objects: tuple[LabeledObject, ...] = ()
    split: str | None = None
    group: str | None = None
    duplicate_of: str | None = None
    error: str | None = None
    reviewed: bool = False

    @property
    def is_exported(self) -> bool:
        """Whether exports contain the image."""
        return self.error is None and self.duplicate_of is None

    def to_line(self) -> str:
        """Return the record as a line of JSON, with the line break."""
        entry: dict[str, Any] = {"image": self.image, "source": self.source}
        if self.is_exported:
            objects = [labeled.to_dict() for labeled in self.objects]
            entry |= {"width": self.width, "height": self.height, "objects": objects}
        optional = {name: getattr(self, name) for name in ("split", "group", "duplicate_of", "error")}
        entry |= {name: value for name, value in optional.items() if value is not None}
        if self.reviewed:
            entry["reviewed"] = True
        return json.dumps(entry, ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> ImageRecord:
        """Return the record of a line.

        Raises:
            KeyError, TypeError, ValueError: The line is invalid.
        """
        entry = json.loads(line)
        return cls(
            image=str(entry["image"]),
            source=str(entry["source"]),
            width=int(entry.get("width", 0)),
            height=int(entry.get("height", 0)),
            objects=tuple(LabeledObject.from_dict(labeled) for labeled in entry.get("objects", ())),
            split=entry.get("split"),
            group=entry.get("group"),
            duplicate_of=entry.get("duplicate_of"),
            error=entry.get("error"),
            reviewed=bool(entry.get("reviewed", False)),
        )


def read_records(path: Path) -> Iterator[ImageRecord]:
    """Yield the records of a file, one at a time.

    Args:
        path: `labels.jsonl`.

    Raises:
        LabelingError: The file cannot be read, or a line is invalid.
    """
    number = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):  # noqa: B007
                yield ImageRecord.from_line(line)
    except OSError as error:
        raise LabelingError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabelingError(f"{path}, line {number} is not a labeled image: {error}; label again") from error
