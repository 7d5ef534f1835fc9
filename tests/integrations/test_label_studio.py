"""Tasks and annotations of Label Studio: its SDK accepts and converts what exports write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moondream_cv.integrations.label_studio import label_config, read_annotations, write_tasks
from moondream_cv.labeling.exports import export_dataset
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.merge import merge_reviewed
from moondream_cv.labeling.records import ImageRecord, LabeledObject, read_records
from tests.helpers.labeled_folder import class_names_of, random_scenes, source_of, write_images, write_records

pytestmark = pytest.mark.integrations
pytest.importorskip("label_studio_sdk", reason="needs label-studio-sdk (make test-integrations)")

SCENES = random_scenes(4)
CLASSES = [*class_names_of(SCENES), "<tip> & \"base\" 'of' café"]
TIP = LabeledObject(CLASSES[-1], (10.25, 20.5, 10.25, 20.5), 0.25, is_point=True)


@pytest.fixture(scope="module")
def scene_records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    return write_images(tmp_path_factory.mktemp("my scenes"), SCENES)


def test_label_studio_accepts_the_configuration_and_the_predictions(
    tmp_path: Path, scene_records: list[ImageRecord]
) -> None:
    from label_studio_sdk.label_interface import LabelInterface

    first, *others = scene_records
    write_records(tmp_path, [replace(first, objects=(*first.objects, TIP)), *others])
    export_dataset(tmp_path, "label-studio", CLASSES, source_of)
    interface = LabelInterface((tmp_path / "label_config.xml").read_text(encoding="utf-8"))
    interface.validate()
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))

    assert {control.tag: sorted(control.labels) for control in interface.controls} == {
        "RectangleLabels": sorted(CLASSES),
        "KeyPointLabels": sorted(CLASSES),
    }
    assert len(tasks) == len(scene_records)
    for task in tasks:
        (prediction,) = task["predictions"]
        assert interface.validate_prediction(prediction, return_errors=True) == []
        assert (tmp_path / task["data"]["image"].removeprefix("/data/local-files/?d=")).is_file()
    assert tasks[0]["predictions"][0]["score"] == 0.25
    wrong = json.loads(json.dumps(tasks[0]["predictions"][0]).replace("rectanglelabels", "polygonlabels"))
    assert interface.validate_prediction(wrong, return_errors=True) != []


@pytest.mark.parametrize("format", ["COCO", "YOLO"])
def test_label_studios_converter_returns_the_same_boxes(
    format: str, tmp_path: Path, scene_records: list[ImageRecord]
) -> None:
    from label_studio_sdk.converter import Converter

    write_records(tmp_path / "dataset", [replace(record, reviewed=True) for record in scene_records])
    export_dataset(tmp_path / "dataset", "label-studio", CLASSES, source_of)
    config = (tmp_path / "dataset" / "label_config.xml").read_text(encoding="utf-8")
    tasks = json.loads((tmp_path / "dataset" / "tasks.json").read_text(encoding="utf-8"))
    for number, task in enumerate(tasks, 1):  # IDs that Label Studio adds
        task["id"] = task["annotations"][0]["id"] = number
    (tmp_path / "project.json").write_text(json.dumps(tasks), encoding="utf-8")
    converter = Converter(config, project_dir=str(tmp_path), download_resources=False)
    convert = converter.convert_to_coco if format == "COCO" else converter.convert_to_yolo
    convert(str(tmp_path / "project.json"), str(tmp_path / "converted"), is_dir=False)

    expected = {Path(record.image).stem: record for record in scene_records}
    found: dict[str, list[tuple[str, list[float]]]] = {name: [] for name in expected}
    if format == "COCO":
        content = json.loads((tmp_path / "converted" / "result.json").read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            labeled = names[annotation["category_id"]], [x, y, x + width, y + height]
            found[images[annotation["image_id"]]].append(labeled)
    else:
        class_names = (tmp_path / "converted" / "classes.txt").read_text(encoding="utf-8").splitlines()
        for name, record in expected.items():
            (path,) = (tmp_path / "converted" / "labels").glob(f"*{name}.txt")
            for line in path.read_text().splitlines():
                class_id, x, y, width, height = map(float, line.split())
                box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
                scaled = box * [record.width, record.height, record.width, record.height]
                found[name].append((class_names[int(class_id)], scaled.tolist()))

    for name, record in expected.items():
        assert sorted(class_name for class_name, _ in found[name]) == sorted(one.class_name for one in record.objects)
        boxes = sorted((labeled.class_name, list(labeled.xyxy)) for labeled in record.objects)
        for (_, box), (_, other) in zip(sorted(found[name]), boxes, strict=True):
            assert box == pytest.approx(other, abs=0.01)


def test_merging_unchanged_annotations_changes_no_object(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    records = [replace(record, objects=(*record.objects, TIP)) for record in scene_records]
    write_records(tmp_path, records)
    export_dataset(tmp_path, "label-studio", CLASSES, source_of)
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    for number, task in enumerate(tasks):  # submitted as they are
        task["annotations"] = [{"id": number, "result": task["predictions"][0]["result"]}]
        task["data"]["image"] = f"/data/upload/1/0a1b2c3d-{Path(task['data']['image']).name}"
    (tmp_path / "project.json").write_text(json.dumps(tasks), encoding="utf-8")
    summary = merge_reviewed(tmp_path, tmp_path / "project.json")

    assert (summary.num_reviewed, summary.num_changed) == (len(records), 0)
    assert list(read_records(tmp_path / LABELS)) == [replace(record, reviewed=True) for record in records]


def test_tasks_with_other_image_urls(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "ä b.png")
    records = [*scene_records, ImageRecord("ä b.png", str(tmp_path / "ä b.png"), 8, 8, reviewed=True)]
    write_records(tmp_path / "dataset", records)
    assert write_tasks(tmp_path / "dataset", tmp_path / "tasks.json", lambda record: f"s3://bucket/{record.image}") == 5
    urls = [task["data"]["image"] for task in json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))]
    assert urls == [f"s3://bucket/{record.image}" for record in records]

    export_dataset(tmp_path / "dataset", "yolo", CLASSES, source_of, split=(1, 0, 0))
    write_tasks(tmp_path / "dataset", tmp_path / "tasks.json", "https://host/")
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert tasks[-1]["data"]["image"] == "https://host/train/images/%C3%A4%20b.png"
    (image,) = read_annotations(tmp_path / "tasks.json")
    assert image.name == "/train/images/ä b.png"
    assert label_config(["a"]).count("Label value") == 1
