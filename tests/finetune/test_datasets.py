"""`load_dataset`: COCO, YOLO and VOC folders, their splits, errors, and the examples of training steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv

from moondream_cv.dataset_layouts import DatasetError, LabeledImage
from moondream_cv.finetune.datasets import Dataset, batches, load_dataset
from tests.helpers.labeled_scenes import LAYOUTS, arrow_scenes, write_dataset

READERS: dict[str, Callable[[Path], sv.DetectionDataset]] = {
    "coco": lambda folder: sv.DetectionDataset.from_coco(
        str(folder / "train"), str(folder / "train" / "_annotations.coco.json")
    ),
    "yolo": lambda folder: sv.DetectionDataset.from_yolo(
        str(folder / "train" / "images"), str(folder / "train" / "labels"), str(folder / "data.yaml")
    ),
    "voc": lambda folder: sv.DetectionDataset.from_pascal_voc(str(folder / "train"), str(folder / "train")),
}


def all_images(dataset: Dataset) -> list[LabeledImage]:
    return sorted((*dataset.train, *dataset.held_out), key=lambda image: image.path.name)


def write_image(path: Path, width: int = 100, height: int = 50) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    return path


def write_coco(folder: Path, annotations: list[dict[str, Any]], num_images: int = 2, **changed: Any) -> Path:
    """Write images of 100 x 50 pixels with annotations of the classes "bolt" (1) and "nut" (2)."""
    for i in range(num_images):
        write_image(folder / f"{i}.png")
    entries = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 50} for i in range(num_images)]
    categories = [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}]
    content = {"images": entries, "annotations": annotations, "categories": categories, **changed}
    (folder / "labels.json").write_text(json.dumps(content))
    return folder


def annotation(
    image: int, category: int = 1, bbox: tuple[float, ...] = (10, 10, 20, 20), **more: Any
) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(bbox), **more}


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_equal_those_that_supervision_loads(layout: str, tmp_path: Path) -> None:
    scenes = arrow_scenes(12)
    folder = write_dataset(tmp_path / "parts", scenes, layout)
    dataset, expected = load_dataset(folder), READERS[layout](folder)
    assert dataset.layout == layout.upper()
    assert [image.path.name for image in all_images(dataset)] == sorted(Path(p).name for p in expected.image_paths)
    by_name = {Path(path).name: found for path, found in expected.annotations.items()}
    for image, scene in zip(all_images(dataset), scenes, strict=True):
        detections = by_name[image.path.name]
        if layout == "voc" and version("supervision") < "0.31":  # it subtracts 1 from the last pixels of boxes
            detections.xyxy[:, 2:] = (detections.xyxy[:, 2:] + 1).clip(0, scene.resolution_wh)
        scale = np.array([*scene.resolution_wh, *scene.resolution_wh])
        for name, boxes in image.boxes.items():
            mask = detections.class_id == expected.classes.index(name)
            assert np.abs(np.array(boxes) * scale - detections.xyxy[mask].clip(0)).max() < 1e-3
        assert sum(map(len, image.boxes.values())) == len(detections)
    used = {expected.classes[i] for detections in by_name.values() for i in detections.class_id}
    assert set(dataset.classes) == used


def test_layouts_agree_about_the_boxes(tmp_path: Path) -> None:
    scenes = arrow_scenes(6)
    found = [all_images(load_dataset(write_dataset(tmp_path / layout, scenes, layout))) for layout in LAYOUTS]
    for coco, yolo, voc in zip(*found, strict=True):
        assert {*coco.boxes} == {*yolo.boxes} == {*voc.boxes}
        for name, boxes in coco.boxes.items():
            assert np.abs(np.array(boxes) - np.array(yolo.boxes[name])).max() < 1e-4
            assert np.abs(np.array(boxes) - np.array(voc.boxes[name])).max() < 0.01  # VOC rounds to pixels


@pytest.mark.parametrize("name", ["valid", "val"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_valid_split_is_held_out(layout: str, name: str, tmp_path: Path) -> None:
    write_dataset(tmp_path, arrow_scenes(4, seed=2), layout, "test")
    write_dataset(tmp_path, arrow_scenes(3, seed=1), layout, name)
    write_dataset(tmp_path, arrow_scenes(5, seed=0), layout, "train")  # last, for the class names of data.yaml
    dataset = load_dataset(tmp_path)
    assert [image.path.name[:5] for image in dataset.train] == ["train"] * 5
    assert [image.path.name.split("-")[0] for image in dataset.held_out] == [name] * 3


def test_published_coco_folders_are_read(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        content = {
            "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": 100, "height": 50} for i in range(count)],
            "annotations": [annotation(i) for i in range(count)],
            "categories": [{"id": 1, "name": "bolt"}],
        }
        for i in range(count):
            write_image(tmp_path / f"{split}2017" / f"{i:012}.jpg")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))
    dataset = load_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.held_out)) == (3, 2)
    assert dataset.train[0].boxes == {"bolt": ((0.1, 0.2, 0.3, 0.6),)}


def test_ultralytics_folders_polygons_and_keypoints_are_read(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i in range(2):
            write_image(tmp_path / "images" / split / f"{i}.jpg")
        (tmp_path / "labels" / split).mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("path: .\nnames: {0: bolt, 1: nut}\nkpt_shape: [2, 3]\n")
    lines = ["1 0.5 0.5 0.2 0.4 0.1 0.1 2 0.2 0.2 1", "0 0.1 0.2 0.3 0.2 0.3 0.6", "", "0 0.5 0.5 0.5 0.5 0.9"]
    (tmp_path / "labels" / "train" / "0.txt").write_text("\n".join(lines))
    dataset = load_dataset(tmp_path)
    assert dataset.train[0].boxes["nut"][0] == pytest.approx((0.4, 0.3, 0.6, 0.7))
    assert dataset.train[0].boxes["bolt"] == ((0.1, 0.2, 0.3, 0.6), (0.25, 0.25, 0.75, 0.75))
    assert dataset.train[1].boxes == {}


def test_published_voc_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    for i in range(2):
        write_image(tmp_path / "JPEGImages" / f"{i}.JPG")
        (tmp_path / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.JPG</filename><size><width>100</width><height>50</height></size>"
            "<object><name>bolt</name><bndbox><xmin>11</xmin><ymin>11</ymin><xmax>30</xmax><ymax>30</ymax></bndbox>"
            "</object></annotation>"
        )
    dataset = load_dataset(tmp_path)
    assert [image.path.name for image in all_images(dataset)] == ["0.JPG", "1.JPG"]
    assert dataset.train[0].boxes == {"bolt": ((0.1, 0.2, 0.3, 0.6),)}


# --- Splits, classes and boxes ----------------------------------------------------------------------------------------


def test_random_share_is_held_out_by_seed(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [annotation(i) for i in range(20)], num_images=20)
    first, again, other = (load_dataset(folder, held_out=0.25, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.held_out)) == (15, 5)
    assert first == again
    assert first.held_out != other.held_out
    assert not {image.path for image in first.train} & {image.path for image in first.held_out}
    assert len(load_dataset(folder, held_out=0.999).train) == 1
    assert len(load_dataset(folder, held_out=0.001).held_out) == 1


def test_boxes_are_clipped_and_boxes_without_area_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    boxes = [(-10, -10, 30, 30), (90, 40, 50, 50), (5, 5, 0, 10), (200, 10, 20, 20), (20, 20, float("nan"), 5)]
    folder = write_coco(tmp_path, [annotation(i, bbox=box) for i in range(2) for box in boxes])
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(folder)
    assert dataset.train[0].boxes["bolt"] == ((0, 0, 0.2, 0.4), (0.9, 0.8, 1, 1))
    assert "boxes without area in their image are skipped: 6" in caplog.text


def test_classes_select_boxes_and_keep_the_other_images(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [annotation(0), annotation(1), annotation(0, 2), annotation(2, 2)], num_images=3)
    assert load_dataset(folder).classes == ("bolt", "nut")
    dataset = load_dataset(folder, classes="nut")
    assert dataset.classes == ("nut",)
    assert len(all_images(dataset)) == 3
    assert {name for image in all_images(dataset) for name in image.boxes} == {"nut"}


def test_classes_with_crowds_give_no_example_of_their_image(tmp_path: Path) -> None:
    labels = [annotation(i) for i in range(2)] + [annotation(i, 2) for i in range(2)]
    dataset = load_dataset(write_coco(tmp_path, [*labels, *(annotation(i, iscrowd=1) for i in range(2))]))
    (batch,) = islice(batches(dataset.train, ("bolt", "nut"), 4, 0), 1)
    assert {example.name for example in batch} == {"nut"}


# --- Examples ---------------------------------------------------------------------------------------------------------


def test_epoch_has_each_class_of_each_image_and_one_absent_class(tmp_path: Path) -> None:
    labels = [annotation(0), annotation(0, 2), annotation(1), annotation(2, 2)]
    dataset = load_dataset(write_coco(tmp_path, labels, num_images=6), held_out=0.01)
    classes = ("bolt", "nut", "gear")
    size = sum(len(image.boxes) + 1 for image in dataset.train)
    (epoch,) = islice(batches(dataset.train, classes, size, 3), 1)
    for image in dataset.train:
        examples = [example for example in epoch if example.image is image]
        present = {example.name: example.boxes for example in examples if example.boxes}
        absent = [example.name for example in examples if not example.boxes]
        assert present == image.boxes
        assert len(absent) == 1
        assert absent[0] not in image.boxes


def test_batches_depend_on_the_seed_only(tmp_path: Path) -> None:
    dataset = load_dataset(write_coco(tmp_path, [annotation(i, 1 + i % 2) for i in range(9)], num_images=9))
    first, again, other = (list(islice(batches(dataset.train, dataset.classes, 5, seed), 8)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert {len(batch) for batch in first} == {5}


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_missing_folders_and_files_raise(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere' does not exist; give a COCO, YOLO or VOC folder"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"file\.zip' is not a folder"):
        load_dataset(tmp_path / "file.zip")


def test_unknown_layout_lists_the_supported_layouts(tmp_path: Path) -> None:
    write_image(tmp_path / "photo.jpg")
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "compose.yaml").write_text("services: []")
    with pytest.raises(DatasetError) as raised:
        load_dataset(tmp_path)
    assert all(text in str(raised.value) for text in ("COCO (train/*.json, ", "YOLO (*.yaml with names", "VOC (*.xml "))
    assert "\n" not in str(raised.value)  # commands print errors on one line


def test_datasets_without_boxes_or_with_one_image_raise(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"\(COCO\) has images, but no boxes"):
        load_dataset(write_coco(tmp_path / "empty", []))
    with pytest.raises(DatasetError, match=r"must have at least 2 readable images, .*; it has 1"):
        load_dataset(write_coco(tmp_path / "single", [annotation(0)], num_images=1))


def test_unknown_classes_are_listed(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [annotation(0), annotation(1, 2)])
    with pytest.raises(ValueError, match="has no boxes of 'gear'; its classes are bolt, nut"):
        load_dataset(folder, classes=["bolt", "gear"])


@pytest.mark.parametrize("share", [0, 1.5, -0.1, "half"])
def test_invalid_held_out_share_raises(share: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held_out must be above 0 and at most 1"):
        load_dataset(tmp_path, held_out=share)


def test_unreadable_images_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_coco(tmp_path, [annotation(i) for i in range(8)], num_images=8)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"junk")
    (folder / "4.png").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(folder)
    assert sorted(image.path.name for image in all_images(dataset)) == ["5.png", "6.png", "7.png"]
    assert "0.png" in caplog.text
    assert "skipped unreadable images in all: 5" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"annotations": [{"image_id": 0, "category_id": 1}]}, "the key 'bbox' is missing"),
        ({"annotations": [annotation(0, 9)]}, "an annotation has the category 9, which is not in categories"),
        ({"annotations": [annotation(0, bbox=(1, 2, 3))]}, "not enough values"),
        ({"images": [{"id": 0, "file_name": "../../0.png", "width": 9, "height": 9}]}, "path inside the dataset"),
        ({"images": [{"id": 0, "file_name": "0.png", "width": 0, "height": 9}]}, "the size of the image"),
    ],
)
def test_damaged_coco_files_raise(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    changed = dict(changed)
    labels = changed.pop("annotations", [annotation(0), annotation(1)])
    folder = write_coco(tmp_path, labels, **changed)
    with pytest.raises(DatasetError, match=rf"the labels in .*labels\.json cannot be read: .*{message}"):
        load_dataset(folder)


def test_damaged_json_and_two_coco_files_raise(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [annotation(0), annotation(1)])
    (folder / "other.json").write_bytes((folder / "labels.json").read_bytes())
    with pytest.raises(DatasetError, match=r"several files .* train images: labels\.json, other\.json; keep one"):
        load_dataset(folder)
    (folder / "other.json").write_text("{")
    with pytest.raises(DatasetError, match=r"the labels in .*other\.json cannot be read"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "line 1 has the class 2, and there are classes 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "line 1 has the class 0.5"),
        ("0 0.5 0.5", "line 1 must have a class and 4 numbers"),
        ("0 a b c d", "could not convert string to float"),
    ],
)
def test_damaged_yolo_files_raise(line: str, message: str, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "0.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text(line)
    (tmp_path / "data.yaml").write_text("names: [bolt, nut]")
    with pytest.raises(DatasetError, match=rf"the labels in .*0\.txt cannot be read: {message}"):
        load_dataset(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [bolt")
    with pytest.raises(DatasetError, match=r"the labels in .*data\.yaml cannot be read"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "no element found"),
        ("<annotation></annotation>", "the element size/width is missing"),
        ("<annotation><size><width>0</width><height>5</height></size></annotation>", "must be positive"),
        (
            "<annotation><size><width>9</width><height>5</height></size><object><name>bolt</name></object></annotation>",
            "the element bndbox/xmin is missing",
        ),
    ],
)
def test_damaged_voc_files_raise(content: str, message: str, tmp_path: Path) -> None:
    write_image(tmp_path / "0.jpg")
    (tmp_path / "0.xml").write_text(content)
    with pytest.raises(DatasetError, match=rf"the labels in .*0\.xml cannot be read: .*{message}"):
        load_dataset(tmp_path)


def test_dataset_with_a_valid_split_only_raises(tmp_path: Path) -> None:
    write_dataset(tmp_path, arrow_scenes(2), "voc", "valid")
    with pytest.raises(DatasetError, match="VOC layout, but no images for training"):
        load_dataset(tmp_path)
