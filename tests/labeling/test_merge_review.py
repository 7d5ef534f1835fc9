"""Merges of reviewed labels, in the formats and with the file names of labeling tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports import export_dataset
from moondream_cv.labeling.image_names import ImageIndex
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.merge import merge_reviewed
from moondream_cv.labeling.records import ImageRecord, LabeledObject, read_records
from moondream_cv.labeling.reviewed import read_label_studio
from tests.helpers.labeled_folder import class_names_of, random_scenes, source_of, write_images, write_records

SCENES = [scene for scene in random_scenes(24) if len(scene.objects) > 3][:4]
CLASSES = [*class_names_of(SCENES), "new class"]

LABEL_FILES = {  # path in the folder of the export, by format
    "yolo": "",
    "coco": "train/_annotations.coco.json",
    "voc": "",
    "labelme": "train",
    "label-studio": "tasks.json",
}


@pytest.fixture(scope="module")
def scene_records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    """Return the records of scenes with objects."""
    return write_images(tmp_path_factory.mktemp("scenes"), SCENES)


def export(folder: Path, records: list[ImageRecord], format: str) -> Path:
    """Export records as a labeling tool does after a review, and return the path of its labels."""
    write_records(folder, records)
    export_dataset(folder, format, CLASSES, source_of, split=(1, 0, 0))
    (folder / LABELS).unlink()
    shutil.rmtree(folder / ".labeling")
    return folder / LABEL_FILES[format]


def edited(records: list[ImageRecord]) -> list[ImageRecord]:
    """Return records after a review: an object moved, one deleted, one added; an image without objects."""
    moved, _, *kept = records[0].objects
    moved = replace(moved, xyxy=tuple(value + offset for value, offset in zip(moved.xyxy, (3, 2, 5, 4), strict=True)))
    added = LabeledObject("new class", (4.0, 5.0, 25.0, 36.0))
    objects = (*kept, moved, added)
    reviewed = [replace(records[0], objects=objects), replace(records[1], objects=()), *records[2:]]
    return [replace(record, reviewed=True) for record in reviewed]


@pytest.mark.parametrize("format", LABEL_FILES)
def test_reviewed_objects_replace_those_of_the_model(
    format: str, tmp_path: Path, scene_records: list[ImageRecord]
) -> None:
    review = export(tmp_path / "review", edited(scene_records), format)
    write_records(tmp_path / "dataset", scene_records)
    summary = merge_reviewed(tmp_path / "dataset", review)

    assert (summary.num_reviewed, summary.num_changed) == (4, 2)
    assert summary.new_classes == ("new class",)
    assert summary.unknown == ()
    first, second, *others = read_records(tmp_path / "dataset" / LABELS)
    expected = {  # box and origin by class
        (labeled.class_name, tuple(map(round, labeled.xyxy)), labeled.origin, labeled.confidence)
        for labeled in scene_records[0].objects[2:]
    }
    for labeled in edited(scene_records)[0].objects[-2:]:
        expected.add((labeled.class_name, tuple(map(round, labeled.xyxy)), "human", None))
    found = {
        (labeled.class_name, tuple(map(round, labeled.xyxy)), labeled.origin, labeled.confidence)
        for labeled in first.objects
    }
    assert found == expected
    assert set(first.objects) >= set(scene_records[0].objects[2:])  # without rounding
    assert second.objects == ()
    assert others == [replace(record, reviewed=True) for record in scene_records[2:]]
    assert first.reviewed
    assert second.reviewed


@pytest.mark.parametrize("format", LABEL_FILES)
def test_a_second_merge_changes_nothing(format: str, tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    review = export(tmp_path / "review", edited(scene_records), format)
    write_records(tmp_path / "dataset", scene_records)
    merge_reviewed(tmp_path / "dataset", review)
    before = (tmp_path / "dataset" / LABELS).read_bytes()
    summary = merge_reviewed(tmp_path / "dataset", review)

    assert (summary.num_reviewed, summary.num_changed, summary.new_classes) == (4, 0, ())
    assert (tmp_path / "dataset" / LABELS).read_bytes() == before
    assert list((tmp_path / "dataset").iterdir()) == [tmp_path / "dataset" / LABELS]


def test_images_outside_the_review_and_failed_ones_are_kept(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    failed = ImageRecord("broken.png", "broken.png", error="truncated")
    double = ImageRecord("double.png", "double.png", duplicate_of="scene-0000.png")
    records = [failed, *scene_records, double]
    write_records(tmp_path / "dataset", records)
    review = export(tmp_path / "review", [replace(scene_records[3], objects=())], "labelme")
    shutil.copy(review / "scene-0003.json", review / "other.json")
    other = json.loads((review / "other.json").read_text(encoding="utf-8"))
    (review / "other.json").write_text(json.dumps({**other, "imagePath": "other.png"}), encoding="utf-8")
    summary = merge_reviewed(tmp_path / "dataset", review)

    assert (summary.num_reviewed, summary.num_changed) == (1, 1)
    assert [Path(name).name for name in summary.unknown] == ["other.png"]
    expected = [failed, *scene_records[:3], replace(scene_records[3], objects=(), reviewed=True), double]
    assert list(read_records(tmp_path / "dataset" / LABELS)) == expected


def test_points_are_merged_and_survive_formats_without_points(tmp_path: Path) -> None:
    tip = LabeledObject("tip", (12.5, 7.25, 12.5, 7.25), 0.5, is_point=True)
    box = LabeledObject("box", (10.0, 10.0, 20.0, 20.0), 0.5)
    write_records(tmp_path, [ImageRecord("a.png", "a.png", 64, 48, (box, tip))])
    shapes = [
        {"label": "tip", "shape_type": "point", "points": [[12.5, 7.25]]},
        {"label": "tip", "shape_type": "point", "points": [[32, 24]]},
        {"label": "box", "shape_type": "rotation", "points": [[30, 10], [40, 20], [30, 30], [20, 20]]},
        {"label": "disk", "shape_type": "circle", "points": [[30, 20], [33, 24]]},
    ]
    labels = {"shapes": shapes, "imagePath": "..\\photos\\a.png", "imageWidth": 64, "imageHeight": 48}
    (tmp_path / "review").mkdir()
    (tmp_path / "review" / "a.json").write_text(json.dumps(labels))
    merge_reviewed(tmp_path, tmp_path / "review")

    (record,) = read_records(tmp_path / LABELS)
    assert record.objects == (
        LabeledObject("box", (20.0, 10.0, 40.0, 30.0), None, "human"),
        tip,
        LabeledObject("tip", (32.0, 24.0, 32.0, 24.0), None, "human", is_point=True),
        LabeledObject("disk", (25.0, 15.0, 35.0, 25.0), None, "human"),
    )
    coco = {"images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}], "annotations": [], "categories": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    merge_reviewed(tmp_path, tmp_path / "coco.json")
    (record,) = read_records(tmp_path / LABELS)
    assert [labeled.class_name for labeled in record.objects] == ["tip", "tip"]


# --- Label Studio -----------------------------------------------------------------------------------------------------


def region(class_name: str, x: float, **value: Any) -> dict[str, Any]:
    """Return a region of Label Studio, 10 % wide and 20 % high."""
    box = {"x": x, "y": 30, "width": 10, "height": 20, "rotation": 0, "rectanglelabels": [class_name], **value}
    return {"type": "rectanglelabels", "original_width": 200, "original_height": 100, "value": box}


def task(image: str, *annotations: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a task of Label Studio."""
    return {"id": 7, "data": {"image": image}, "annotations": list(annotations), **more}


def test_label_studio_latest_submitted_annotation_counts(tmp_path: Path) -> None:
    old = {"id": 1, "updated_at": "2026-11-01T10:00:00Z", "result": [region("old", 0)]}
    new = {"id": 2, "updated_at": "2026-11-02T10:00:00Z", "result": [region("new", 50)]}
    cancelled = {"id": 3, "updated_at": "2026-11-03T10:00:00Z", "was_cancelled": True, "result": [region("x", 0)]}
    other_kinds = [{"type": "choices", "value": {"choices": ["blurred"]}}, {"type": "relation"}]
    tasks = [
        task("/data/local-files/?d=images/a%20b.png", new, old, cancelled),
        task("/data/upload/3/0a1b2c3d-b.png", {"id": 4, "result": other_kinds}),
        task("s3://bucket/c.png", cancelled),
        task("https://host/d.png", predictions=[{"result": [region("predicted", 0)]}]),
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    found = read_label_studio(tmp_path / "export.json")

    assert [image.name for image in found] == ["images/a b.png", "/data/upload/3/0a1b2c3d-b.png"]
    (labeled,) = found[0].objects
    assert (labeled.class_name, labeled.is_point) == ("new", False)
    assert labeled.xyxy == pytest.approx((0.5, 0.3, 0.6, 0.5))
    assert found[1].objects == ()


def test_label_studio_rotated_rectangles_points_and_polygons(tmp_path: Path) -> None:
    regions = [
        region("rotated", 50, rotation=90),  # 20x20 pixels: from (100, 30) down and to the left
        {"type": "keypointlabels", "value": {"x": 25, "y": 50, "width": 0.5, "keypointlabels": ["tip"]}},
        {"type": "polygonlabels", "value": {"points": [[10, 20], [30, 25], [15, 60]], "polygonlabels": ["area", "b"]}},
    ]
    (tmp_path / "export.json").write_text(json.dumps([task("a.png", {"id": 1, "result": regions})]))
    (image,) = read_label_studio(tmp_path / "export.json")

    assert [(labeled.class_name, labeled.is_point) for labeled in image.objects] == [
        ("rotated", False),
        ("tip", True),
        ("area", False),
        ("b", False),
    ]
    assert image.objects[0].xyxy == pytest.approx((0.4, 0.3, 0.5, 0.5))
    assert image.objects[1].xyxy == pytest.approx((0.25, 0.5, 0.25, 0.5))
    assert image.objects[2].xyxy == pytest.approx((0.1, 0.2, 0.3, 0.6))


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("street__001.jpg", "street__001.jpg"),
        ("/home/me/photos/street/001.jpg", "street__001.jpg"),
        ("images/0a1b2c3d-street__001.jpg", "street__001.jpg"),
        ("train/street__001_jpg.rf.0123456789abcdef0123456789abcdef.jpg", "street__001.jpg"),
        ("labels/street__001.txt", "street__001.jpg"),
        ("My%20photo%20%281%29.PNG", "My photo (1).PNG"),
        ("9f8e7d6c-My_photo_1.PNG", "My photo (1).PNG"),  # as Django stores it
        ("My-photo-1-_png.rf.XyZ.jpg", "My photo (1).PNG"),  # as Roboflow stores it
        ("phone.jpg", "phone.heic"),  # as it is exported
        ("phone.heic", "phone.heic"),
        ("deadbeef-cat.jpg", "deadbeef-cat.jpg"),
        ("0a1b2c3d-cat.jpg", "cat.jpg"),
        ("a_b.jpg", "a_b.jpg"),
        ("a b.jpg", None),  # "a_b.jpg" or "a-b.jpg"
        ("dog.jpg", None),
        ("", None),
    ],
)
def test_names_of_labeling_tools_match(name: str, expected: str | None) -> None:
    names = ["street__001.jpg", "My photo (1).PNG", "phone.heic", "deadbeef-cat.jpg", "cat.jpg", "a_b.jpg", "a-b.jpg"]
    assert ImageIndex(names).find(name) == expected


# --- Unsuitable reviews -----------------------------------------------------------------------------------------------


def write_tasks(*tasks: dict[str, Any]) -> Callable[[Path], Path]:
    """Return a function that writes tasks of Label Studio into a folder."""

    def write(folder: Path) -> Path:
        (folder / "tasks.json").write_text(json.dumps(list(tasks)))
        return folder / "tasks.json"

    return write


def write_text(name: str, text: str) -> Callable[[Path], Path]:
    """Return a function that writes a file, and returns its folder."""

    def write(folder: Path) -> Path:
        (folder / "review").mkdir()
        (folder / "review" / name).write_text(text)
        return folder / "review"

    return write


ANNOTATION = {"id": 1, "result": []}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder / "missing", "missing' does not exist"),
        (write_text("notes.txt", "x"), "no reviewed labels in a known format; give a JSON export of Label Studio"),
        (write_text("a.json", "{"), "a.json cannot be read"),
        (
            write_text("a.json", '{"shapes": [{"shape_type": "line"}], "imageWidth": 1, "imageHeight": 1}'),
            "a.json is not a valid LabelMe file: .*'line' is not a box or a point",
        ),
        (write_tasks({"image": "a.png"}), "export the project as JSON, not as JSON-MIN"),
        (write_tasks(task("scene-0000.png")), "contains no reviewed image; submit annotations"),
        (
            write_tasks(task("x.png", ANNOTATION)),
            "has x.png, the dataset has scene-0000.png, scene-0001.png",
        ),
        (
            write_tasks(task("0a1b2c3d-scene-0000.png", ANNOTATION), task("scene-0000.png", ANNOTATION)),
            "two reviewed images have the name of the image scene-0000.png: 0a1b2c3d-scene-0000.png and scene-0000.png",
        ),
        (
            write_tasks(task("a", {"result": [{"type": "brushlabels", "value": {"brushlabels": ["x"]}}]})),
            "regions of the type brushlabels are not boxes or points",
        ),
        (write_tasks({"data": {}, "annotations": [ANNOTATION]}), "a task must have the URL of an image, got {}"),
        (write_tasks(task("a", {"result": [region("x", 0, rectanglelabels="x")]})), "a list of texts, got 'x'"),
        (
            write_tasks(task("a", {"result": [region("x", 0, rectanglelabels=[None])]})),
            r"a list of texts, got \[None\]",
        ),
        (write_tasks(task("a", {"result": [region("x", float("nan"))]})), "coordinates must be finite"),
        (write_text("a.json", '{"shapes": [], "imageWidth": -1, "imageHeight": 1}'), "must be positive, got -1 x 1"),
        (
            write_text(
                "a.json",
                '{"shapes": [{"shape_type": "circle", "points": [[1, 1]]}], "imageWidth": 1e3, "imageHeight": 1}',
            ),
            "a.json is not a valid LabelMe file: IndexError",
        ),
        (write_text("a.json", '{"shapes": [7], "imageWidth": 1, "imageHeight": 1}'), "is not a valid LabelMe file"),
        (
            write_text(
                "a.json", '{"shapes": [{"label": null, "points": [[1, 1]]}], "imageWidth": 9, "imageHeight": 9}'
            ),
            "the label of a shape must be a text, got None",
        ),
        (write_text("a.json", "[" * 200_000), "a.json cannot be read"),
    ],
)
def test_unsuitable_reviews_are_errors_and_change_nothing(
    write: Callable[[Path], Path], message: str, tmp_path: Path, scene_records: list[ImageRecord]
) -> None:
    write_records(tmp_path / "dataset", scene_records)
    before = (tmp_path / "dataset" / LABELS).read_bytes()
    with pytest.raises(LabelingError, match=message):
        merge_reviewed(tmp_path / "dataset", write(tmp_path))
    assert (tmp_path / "dataset" / LABELS).read_bytes() == before
