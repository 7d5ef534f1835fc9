"""Statistics of a labeled dataset, computed one image at a time in memory that does not depend on their number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from moondream_cv.labeling.records import ImageRecord, LabeledObject, Origin

NUM_BINS = 20
"""Number of bins of a histogram over 0..1."""

ORIGINS: tuple[Origin, ...] = ("model", "given", "human")
"""Origins of objects, in the order of a report."""

_SIZES = (("small", 32**2), ("medium", 96**2), ("large", math.inf))  # upper limits of the area in pixels, as in COCO


@dataclass
class ClassStatistics:
    """Statistics of the objects of a class.

    Attributes:
        name: Class name.
        class_id: Index of the class, which determines its color.
        num_objects: Number of objects.
        num_images: Number of images with at least one object of the class.
        origins: Number of objects by origin.
        num_scores: Number of objects with a confidence.
        score_sum: Sum of the confidences.
        scores: Histogram of the confidences, with `NUM_BINS` bins over 0..1.
    """

    name: str
    class_id: int
    num_objects: int = 0
    num_images: int = 0
    origins: Counter[Origin] = field(default_factory=Counter)
    num_scores: int = 0
    score_sum: float = 0.0
    scores: list[int] = field(default_factory=lambda: [0] * NUM_BINS)

    @property
    def mean_score(self) -> float | None:
        """Mean confidence; None without confidences."""
        return self.score_sum / self.num_scores if self.num_scores else None

    def add(self, labeled: LabeledObject) -> None:
        """Count an object."""
        self.num_objects += 1
        self.origins[labeled.origin] += 1
        if labeled.confidence is not None:
            self.num_scores += 1
            self.score_sum += labeled.confidence
            self.scores[_bin(labeled.confidence)] += 1


class LabelStatistics:
    """Statistics of a labeled dataset.

    Attributes:
        num_images: Number of input images.
        num_labeled: Number of exported images with objects.
        num_empty: Number of exported images without objects.
        num_duplicates: Number of images that were dropped as near-duplicates.
        num_failed: Number of images that failed.
        num_reviewed: Number of images that a person has reviewed.
        num_points: Number of objects that are points.
        sizes: Number of boxes by size: small, medium and large, as in COCO.
        relative_sizes: Histogram of the square root of the share of the image that a box covers, with `NUM_BINS` bins
            over 0..1.
    """

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        """Create statistics without images.

        Args:
            class_names: Classes in the order of their ids. Further classes of objects get the next ids.
        """
        self.num_images = 0
        self.num_labeled = 0
        self.num_empty = 0
        self.num_duplicates = 0
        self.num_failed = 0
        self.num_reviewed = 0
        self.num_points = 0
        self.sizes = {size: 0 for size, _ in _SIZES}
        self.relative_sizes = [0] * NUM_BINS
        self._classes: dict[str, ClassStatistics] = {}
        for name in class_names:
            self.of_class(name)

    @property
    def classes(self) -> list[ClassStatistics]:
        """Classes in the order of their ids."""
        return list(self._classes.values())

    @property
    def num_objects(self) -> int:
        """Number of objects."""
        return sum(one.num_objects for one in self._classes.values())

    @property
    def num_scores(self) -> int:
        """Number of objects with a confidence."""
        return sum(one.num_scores for one in self._classes.values())

    @property
    def scores(self) -> list[int]:
        """Histogram of the confidences of all classes, with `NUM_BINS` bins over 0..1."""
        return [sum(one.scores[i] for one in self._classes.values()) for i in range(NUM_BINS)]

    def of_class(self, name: str) -> ClassStatistics:
        """Return the statistics of a class, which are empty for a new one."""
        if name not in self._classes:
            self._classes[name] = ClassStatistics(name, len(self._classes))
        return self._classes[name]

    def add(self, record: ImageRecord) -> None:
        """Count an image and its objects."""
        self.num_images += 1
        self.num_reviewed += record.reviewed
        if record.error is not None:
            self.num_failed += 1
        elif record.duplicate_of is not None:
            self.num_duplicates += 1
        elif record.objects:
            self.num_labeled += 1
        else:
            self.num_empty += 1
        for labeled in record.objects:
            self.of_class(labeled.class_name).add(labeled)
            self._add_size(labeled, record.width * record.height)
        for name in {labeled.class_name for labeled in record.objects}:
            self.of_class(name).num_images += 1

    def _add_size(self, labeled: LabeledObject, image_area: int) -> None:
        if labeled.is_point:
            self.num_points += 1
            return
        x_min, y_min, x_max, y_max = labeled.xyxy
        area = max(x_max - x_min, 0.0) * max(y_max - y_min, 0.0)
        self.sizes[next(size for size, limit in _SIZES if area < limit)] += 1
        if image_area:
            self.relative_sizes[_bin(math.sqrt(area / image_area))] += 1


def _bin(value: float) -> int:
    """Return the bin of a value in 0..1; the last bin includes 1."""
    return min(max(int(value * NUM_BINS), 0), NUM_BINS - 1)
