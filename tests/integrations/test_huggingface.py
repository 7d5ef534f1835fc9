"""Hugging Face `datasets`: exports load with it, and its images can be labeled."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports import export_dataset
from moondream_cv.labeling.huggingface import from_huggingface, to_huggingface
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.records import ImageRecord, LabeledObject, read_records
from tests.helpers.labeled_folder import class_names_of, random_scenes, source_of, write_images, write_records

pytestmark = pytest.mark.integrations
datasets = pytest.importorskip("datasets", reason="needs datasets (make test-integrations)")

SCENES = random_scenes(8)
CLASSES = class_names_of(SCENES)
SPLIT = (0.5, 0.25, 0.25)
SPLIT_NAMES = {"train": "train", "valid": "validation", "test": "test"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def scene_records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    """Return the records of scenes, one without scores."""
    first, *others = write_images(tmp_path_factory.mktemp("scenes"), SCENES)
    given = tuple(replace(labeled, confidence=None, origin="given") for labeled in first.objects)
    return [replace(first, objects=given), *others]


def assert_equal_objects(loaded: Any, records: list[ImageRecord]) -> None:
    """Check the images and objects of all splits."""
    found = {Path(row["image"].filename).name: row for split in loaded.values() for row in split}
    assert found.keys() == {record.image for record in records}
    for split in loaded.values():
        assert split["image_id"] == list(range(len(split)))
        assert split.features["objects"]["category"].feature.names == CLASSES
    for record in records:
        row = found[record.image]
        assert row["image"].size == (record.width, record.height) == (row["width"], row["height"])
        objects = row["objects"]
        assert [CLASSES[index] for index in objects["category"]] == [one.class_name for one in record.objects]
        assert objects["area"] == pytest.approx([width * height for _, _, width, height in objects["bbox"]])
        assert objects["score"] == [labeled.confidence for labeled in record.objects]
        for (x, y, width, height), labeled in zip(objects["bbox"], record.objects, strict=True):
            assert (x, y, x + width, y + height) == pytest.approx(labeled.xyxy, abs=0.006)


def test_datasets_loads_an_imagefolder(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    write_records(tmp_path / "dataset", scene_records)
    summary = export_dataset(tmp_path / "dataset", "huggingface", CLASSES, source_of, split=SPLIT)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "dataset"))

    assert {name: len(split) for name, split in loaded.items()} == {
        SPLIT_NAMES[split]: count for split, count in summary.num_images.items()
    }
    assert_equal_objects(loaded, scene_records)


def test_datasets_loads_splits_without_objects(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    splits = ["train", "valid", "test"]
    records = [replace(record, split=split) for record, split in zip(scene_records[:3], splits, strict=True)]
    records[1] = replace(records[1], objects=())
    write_records(tmp_path / "dataset", records)
    export_dataset(tmp_path / "dataset", "huggingface", CLASSES, source_of)
    assert_equal_objects(datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "dataset")), records)


@pytest.mark.parametrize("format", ["yolo", "huggingface"])
def test_labeled_datasets_become_dataset_dicts(format: str, tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    write_records(tmp_path / "dataset", scene_records)
    with pytest.raises(LabelingError, match="has not been exported completely"):
        to_huggingface(tmp_path / "dataset")
    export_dataset(tmp_path / "dataset", format, CLASSES, source_of, split=SPLIT)
    converted = to_huggingface(tmp_path / "dataset")
    assert list(converted) == ["train", "validation", "test"]
    assert_equal_objects(converted, scene_records)

    changed = [replace(record, objects=record.objects[:1]) for record in scene_records]  # as a merge does
    write_records(tmp_path / "dataset", changed)
    assert_equal_objects(to_huggingface(tmp_path / "dataset"), changed)

    point = LabeledObject(CLASSES[0], (1, 1, 1, 1), is_point=True)
    write_records(tmp_path / "dataset", [replace(scene_records[0], objects=(point,))])
    with pytest.raises(LabelingError, match="objects are points"):
        to_huggingface(tmp_path / "dataset")


def test_images_of_a_dataset_become_files(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    sources = [source_of(record) for record in scene_records]
    contents = [path.read_bytes() for path in sources]
    webp = io.BytesIO()
    Image.new("RGB", (8, 8)).save(webp, "WEBP")
    rows = [{"bytes": content, "path": None} for content in (*contents, webp.getvalue())]
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"label": list(range(len(rows))), "photo": rows}, features=features)
    paths = from_huggingface(dataset, tmp_path / "images")

    assert [path.read_bytes() for path in paths] == [*contents, webp.getvalue()]
    assert [path.name for path in paths] == [*(f"{n:08}.png" for n in range(len(sources))), f"{len(sources):08}.webp"]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    assert from_huggingface(dataset, tmp_path / "images", "photo") == paths
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times[1:]
    assert paths[0].read_bytes() == contents[0]
    with pytest.raises(LabelingError, match="column must be one of photo, got 'image'"):
        from_huggingface(dataset, tmp_path / "images", "image")


def test_image_files_of_a_dataset_dict_are_not_copied(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    write_records(tmp_path / "dataset", scene_records)
    export_dataset(tmp_path / "dataset", "coco", CLASSES, source_of, split=SPLIT)
    paths = from_huggingface(to_huggingface(tmp_path / "dataset"), tmp_path / "images")

    assert [path.is_relative_to(tmp_path / "dataset") for path in paths] == [True] * len(SCENES)
    assert sorted(path.name for path in paths) == [
        record.image for record in read_records(tmp_path / "dataset" / LABELS)
    ]
