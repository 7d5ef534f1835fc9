"""Folders with `labels.jsonl` and the images of rendered scenes, as a labeling run leaves them before the export."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.records import ImageRecord, LabeledObject
from moondream_cv.scenes import Scene, render_scene

OFFSETS = (0.37, 0.13, -0.29, -0.41)  # pixels


def class_names_of(scenes: Iterable[Scene]) -> list[str]:
    """Return the names of all objects in scenes, sorted."""
    return sorted({item.name for scene in scenes for item in scene.objects})


def random_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Render scenes with random objects."""
    rng = np.random.default_rng(seed)
    return [render_scene(rng) for _ in range(count)]


def record_of(scene: Scene, image: str, source: str, confidence: float | None = 0.75) -> ImageRecord:
    """Return the record of a scene with its true boxes, moved by fractions of a pixel."""
    height, width = scene.image.shape[:2]
    objects = []
    for item in scene.objects:
        moved = (round(float(value + offset), 2) for value, offset in zip(item.xyxy, OFFSETS, strict=True))
        x_min, y_min, x_max, y_max = moved
        objects.append(LabeledObject(item.name, (x_min, y_min, x_max, y_max), confidence))
    return ImageRecord(image, source, width, height, tuple(objects))


def write_records(folder: Path, records: Iterable[ImageRecord]) -> None:
    """Write `labels.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LABELS).write_text("".join(record.to_line() for record in records), encoding="utf-8")


def write_images(sources: Path, scenes: Sequence[Scene]) -> list[ImageRecord]:
    """Write scenes as PNG files into a folder, and return their records."""
    sources.mkdir(parents=True, exist_ok=True)
    records = []
    for number, scene in enumerate(scenes):
        path = sources / f"scene-{number:04}.png"
        Image.fromarray(scene.image).save(path)
        records.append(record_of(scene, path.name, str(path)))
    return records


def source_of(record: ImageRecord) -> Path:
    """Return the image file of a record, as `export_dataset` requires."""
    return Path(record.source)
