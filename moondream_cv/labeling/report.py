"""Report of a labeled dataset: one HTML file with statistics and thumbnails, which makes no network requests.

The images are a random sample and those with the most doubtful labels: low confidences, no objects, or many objects.
The file depends on the labels and the arguments only.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

import jinja2
import numpy as np
import supervision as sv
from markupsafe import Markup
from PIL import Image

from moondream_cv.drawing import annotate, class_color
from moondream_cv.durable_files import write_file
from moondream_cv.escaping import escaped
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.label_statistics import NUM_BINS, ORIGINS, LabelStatistics
from moondream_cv.labeling.layout import LABELS, REPORT
from moondream_cv.labeling.records import ImageRecord, LabeledObject, read_records
from moondream_cv.urls import is_url, shown_url

NUM_UNCERTAIN, NUM_EMPTY, NUM_CROWDED, NUM_RANDOM = 24, 8, 8, 24
"""Number of images of each kind in a report."""

NUM_LISTED = 200
"""Number of unreadable images and of near-duplicates that a report lists."""

_TEMPLATE = "report_template.html"
_SIDE = 320  # longer side of a thumbnail in pixels
_MAX_BYTES = 44_000  # per thumbnail; all thumbnails need less than 4 MB in Base64
_JPEG_QUALITIES = (85, 70, 50, 30)
_MAX_LABELS = 8  # more labels hide the objects of a thumbnail
_CONTEXT, _MIN_CROP = 3.0, 96.0  # side of a crop in sides of the box, and in pixels

T = TypeVar("T")
OpenImage = Callable[[ImageRecord], Image.Image]


def write_report(
    folder: Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    open_image: OpenImage,
    splits: Mapping[str, int] | None,
    seconds: float | None = None,
) -> Path:
    """Write `report.html`; an existing file is replaced when the new one is complete.

    Args:
        folder: Labeled dataset.
        title: Name of the dataset.
        settings: Settings of the run, which the report shows. `class_names`, if present, is the order of the classes
            and their colors.
        open_image: Function that returns the upright image of a record. If it fails, the report shows the error.
        splits: Number of images per split; None if the dataset has no splits.
        seconds: Duration of the run; None to omit it.

    Returns:
        The file `report.html`.

    Raises:
        LabelingError: The labels cannot be read, or the report cannot be written.
    """
    selection = _Selection(settings.get("class_names", ()))
    for record in read_records(folder / LABELS):
        selection.add(record)
    html = _render(selection, title, settings, open_image, splits, seconds)
    try:
        write_file(folder / REPORT, html.encode())
    except OSError as error:
        raise LabelingError(f"{folder / REPORT} cannot be written: {error.strerror or error}") from error
    return folder / REPORT


# --- Selection --------------------------------------------------------------------------------------------------------


class _Largest(Generic[T]):
    """The items with the largest keys, largest first. Ties keep the order of the items."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, T]] = []
        self._added = 0

    def add(self, key: float, item: T) -> None:
        self._added += 1
        entry = (key, -self._added, item)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    @property
    def items(self) -> list[T]:
        return [item for _, _, item in sorted(self._heap, reverse=True)]


class _Selection:
    """Statistics and the records that a report shows.

    Attributes:
        statistics: Statistics of all records.
        uncertain: Images that nobody has reviewed, with the object of the lowest confidence, lowest first.
        empty: Random images without objects.
        crowded: Images with the most objects.
        random: Random images.
        failed: First images that failed.
        duplicates: First near-duplicates.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.statistics = LabelStatistics(class_names)
        self.uncertain = _Largest[tuple[ImageRecord, LabeledObject]](NUM_UNCERTAIN)
        self.empty = _Largest[ImageRecord](NUM_EMPTY)
        self.crowded = _Largest[ImageRecord](NUM_CROWDED)
        self.random = _Largest[ImageRecord](NUM_RANDOM)
        self.failed: list[ImageRecord] = []
        self.duplicates: list[ImageRecord] = []

    def add(self, record: ImageRecord) -> None:
        self.statistics.add(record)
        if not record.is_exported:
            dropped = self.failed if record.error is not None else self.duplicates
            if len(dropped) < NUM_LISTED:
                dropped.append(record)
            return
        # The order of hashes is random, and new images change little of the sample.
        position = float(int.from_bytes(hashlib.sha256(record.image.encode(errors="replace")).digest()[:6], "big"))
        self.random.add(position, record)
        if not record.objects:
            self.empty.add(position, record)
            return
        if len(record.objects) > 1:
            self.crowded.add(len(record.objects), record)
        scored = [(labeled.confidence, labeled) for labeled in record.objects if labeled.confidence is not None]
        if scored and not record.reviewed:
            confidence, labeled = min(scored, key=lambda pair: pair[0])
            self.uncertain.add(-confidence, (record, labeled))


# --- Thumbnails -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Card:
    """A thumbnail with a caption.

    Attributes:
        record: The image.
        objects: Class, color and number of the objects, most frequent first.
        labeled: The object with a confidence that the thumbnail shows; None for a whole image.
        uri: Data URI of the thumbnail; None if the image cannot be opened.
        size_wh: Width and height of the thumbnail in pixels.
        error: Message of the error if the image cannot be opened.
    """

    record: ImageRecord
    objects: list[tuple[str, str, int]]
    labeled: LabeledObject | None = None
    uri: str | None = None
    size_wh: tuple[int, int] = (0, 0)
    error: str | None = None


class _Thumbnails:
    """Draws the cards of a report."""

    def __init__(self, statistics: LabelStatistics, open_image: OpenImage) -> None:
        self._ids = {one.name: one.class_id for one in statistics.classes}
        self._open = open_image

    def of_image(self, record: ImageRecord) -> _Card:
        """Return a card of a whole image with all objects."""
        return self._draw(record, (0, 0, record.width, record.height))

    def of_object(self, record: ImageRecord, labeled: LabeledObject) -> _Card:
        """Return a card of an object and its surroundings."""
        return self._draw(record, _crop_around(labeled, record.width, record.height), labeled)

    def _draw(
        self, record: ImageRecord, area: tuple[float, float, float, float], labeled: LabeledObject | None = None
    ) -> _Card:
        """Return a card of an area of an image, with one object or all objects."""
        # Count the objects
        objects = record.objects if labeled is None else (labeled,)
        counts = Counter(one.class_name for one in objects)
        legend = [(name, _hex_color(self._ids[name]), number) for name, number in counts.most_common()]

        try:
            image = self._open(record).convert("RGB")
        except Exception as error:  # an image that was removed or damaged since must not prevent the report
            return _Card(record, legend, labeled, error=str(error) or type(error).__name__)

        # Cut and scale the area. The image may be smaller than the record if it was decoded at a reduced size.
        x_min, y_min, x_max, y_max = area
        scale = _SIDE / max(x_max - x_min, y_max - y_min)
        size_wh = (max(1, round((x_max - x_min) * scale)), max(1, round((y_max - y_min) * scale)))
        ratio = np.array(image.size) / (record.width, record.height)
        box = np.minimum(np.reshape(area, (2, 2)) * ratio, image.size)
        thumbnail = image.resize(size_wh, Image.Resampling.LANCZOS, box=tuple(box.ravel().tolist()), reducing_gap=3.0)

        # Draw the objects
        if objects:
            xyxy = np.array([one.xyxy for one in objects], np.float64)
            scaled = (xyxy - [x_min, y_min] * 2) * ([size_wh[0] / (x_max - x_min), size_wh[1] / (y_max - y_min)] * 2)
            has_labels = labeled is None and len(objects) <= _MAX_LABELS
            detections = sv.Detections(
                scaled.astype(np.float32),
                class_id=np.array([self._ids[one.class_name] for one in objects], np.int64),
                data={"class_name": np.array([escaped(one.class_name) if has_labels else "" for one in objects])},
            )
            thumbnail = annotate(thumbnail, detections)
        return _Card(record, legend, labeled, _data_uri(thumbnail), size_wh)


def _crop_around(labeled: LabeledObject, width: int, height: int) -> tuple[float, float, float, float]:
    """Return an area of the image, 4:3 if it fits, with an object near its center."""
    x_min, y_min, x_max, y_max = labeled.xyxy
    side = max(width, height) / 4 if labeled.is_point else _CONTEXT * max(x_max - x_min, y_max - y_min)
    crop_height = max(side, _MIN_CROP)
    crop_wh = (min(crop_height * 4 / 3, width), min(crop_height, height))
    left = min(max((x_min + x_max - crop_wh[0]) / 2, 0.0), width - crop_wh[0])
    top = min(max((y_min + y_max - crop_wh[1]) / 2, 0.0), height - crop_wh[1])
    return left, top, left + crop_wh[0], top + crop_wh[1]


def _hex_color(class_id: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*class_color(class_id))


def _data_uri(image: Image.Image) -> str:
    """Return an image as a data URI, with the best quality within the size limit."""
    content = b""
    for quality in _JPEG_QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= _MAX_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


# --- HTML -------------------------------------------------------------------------------------------------------------


def _render(
    selection: _Selection,
    title: str,
    settings: Mapping[str, Any],
    open_image: OpenImage,
    splits: Mapping[str, int] | None,
    seconds: float | None,
) -> str:
    statistics = selection.statistics
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        count="{:,}".format, percent=_percent, path=_histogram_path, color=_hex_color, location=_location
    )
    template = environment.from_string(resources.files("moondream_cv.labeling").joinpath(_TEMPLATE).read_text("utf-8"))
    return template.render(
        title=title,
        duration=None if seconds is None else str(timedelta(seconds=round(seconds))),
        rate=statistics.num_images / seconds if seconds else None,
        tiles=_tiles(statistics),
        splits=splits,
        statistics=statistics,
        classes=sorted(statistics.classes, key=lambda one: (-one.num_objects, one.class_id)),
        origins=[origin for origin in ORIGINS if any(one.origins[origin] for one in statistics.classes)],
        bins=NUM_BINS,
        galleries=_galleries(selection, _Thumbnails(statistics, open_image)),
        failed=selection.failed,
        duplicates=selection.duplicates,
        settings={name: value for name, value in settings.items() if name != "class_names"},
    )


def _tiles(statistics: LabelStatistics) -> list[tuple[str, int, str]]:
    """Return the name, the number and the CSS class of the main counts."""
    tiles = [
        ("Images", statistics.num_images, ""),
        ("With objects", statistics.num_labeled, ""),
        ("Without objects", statistics.num_empty, ""),
        ("Near-duplicates dropped", statistics.num_duplicates, ""),
        ("Failed", statistics.num_failed, "bad" if statistics.num_failed else ""),
        ("Objects", statistics.num_objects, ""),
    ]
    return [*tiles, ("Reviewed images", statistics.num_reviewed, "")] if statistics.num_reviewed else tiles


def _galleries(selection: _Selection, thumbnails: _Thumbnails) -> list[tuple[str, str, str, list[_Card]]]:
    """Return the ID, the title, the description and the cards of each group of images."""
    return [
        (
            "uncertain",
            "Least certain first",
            "Objects with the lowest confidences, at most one per image, without reviewed images.",
            [thumbnails.of_object(*one) for one in selection.uncertain.items],
        ),
        (
            "empty",
            "Without objects",
            "Random images in which no object was found.",
            [thumbnails.of_image(one) for one in selection.empty.items],
        ),
        (
            "crowded",
            "Most objects",
            "Images with the most objects.",
            [thumbnails.of_image(one) for one in selection.crowded.items],
        ),
        (
            "random",
            "Random images",
            "A random sample of the dataset.",
            [thumbnails.of_image(one) for one in selection.random.items],
        ),
    ]


def _finalize(value: object) -> object:
    """Return a value of the template with control characters escaped. Jinja escapes the characters of HTML."""
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _location(source: str) -> str:
    return shown_url(source) if is_url(source) else source


def _histogram_path(counts: Sequence[int], width: float, height: float) -> str:
    """Return the path of an SVG with one bar per count; the highest bar has the full height."""
    step, highest = width / len(counts), max(*counts, 1)
    bars = [(i * step, count / highest * height) for i, count in enumerate(counts) if count]
    return "".join(f"M{x:.1f} {height:g}v{-max(bar, 1):.1f}h{step - 1:.1f}V{height:g}z" for x, bar in bars)
