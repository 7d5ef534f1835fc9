"""Exports of labeled images: other readers find the same objects, and files of other origin are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from PIL import Image
from pycocotools.coco import COCO

import moondream_cv
from moondream_cv.dataset_layouts import read_labels
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.exports import FORMATS, check_format, export_dataset
from moondream_cv.labeling.layout import LABELS
from moondream_cv.labeling.merge import merge_reviewed
from moondream_cv.labeling.records import ImageRecord, LabeledObject, read_records
from tests.helpers.labeled_folder import (
    class_names_of,
    random_scenes,
    source_of,
    write_images,
    write_records,
)

SCENES = random_scenes(12)
CLASSES = class_names_of(SCENES)
SPLIT = (0.5, 0.25, 0.25)

Boxes = dict[str, list[tuple[str, tuple[float, ...]]]]  # class and box in pixels, by stem of the image

# Largest distance of an edge in pixels
TOLERANCES = {"yolo": 0.01, "coco": 0.006, "voc": 0.5, "labelme": 0.001, "createml": 0.002}


@pytest.fixture(scope="module")
def scene_records(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRecord]:
    """Return the records of scenes, the last without objects."""
    records = write_images(tmp_path_factory.mktemp("scenes"), SCENES)
    return [*records[:-1], replace(records[-1], objects=())]


@pytest.fixture
def dataset(tmp_path: Path, scene_records: list[ImageRecord]) -> Path:
    """Return a folder with `labels.jsonl` only."""
    write_records(tmp_path / "dataset", scene_records)
    return tmp_path / "dataset"


def expected_boxes(dataset: Path) -> Boxes:
    """Return the boxes of `labels.jsonl`."""
    return {
        Path(record.image).stem: [(labeled.class_name, labeled.xyxy) for labeled in record.objects]
        for record in read_records(dataset / LABELS)
    }


def assert_equal_boxes(found: Boxes, expected: Boxes, tolerance: float) -> None:
    """Check that images have the same objects, in any order."""
    assert found.keys() == expected.keys()
    for image, objects in expected.items():
        assert [name for name, _ in sorted(found[image])] == [name for name, _ in sorted(objects)]
        for (_, box), (_, other) in zip(sorted(found[image]), sorted(objects), strict=True):
            np.testing.assert_allclose(box, other, rtol=1e-6, atol=tolerance)


def read_with_supervision(folder: Path, format: str, split: str) -> sv.DetectionDataset:
    """Read a split with supervision's loader."""
    images = str(folder / split)
    if format == "yolo":
        labels = str(folder / split / "labels")
        return sv.DetectionDataset.from_yolo(str(folder / split / "images"), labels, str(folder / "data.yaml"))
    if format == "coco":
        return sv.DetectionDataset.from_coco(images, str(folder / split / "_annotations.coco.json"))
    if format == "voc":
        read = sv.DetectionDataset.from_pascal_voc(images, images)
        if version("supervision") < "0.31":  # it subtracts 1 from the last pixels of boxes
            for detections in read.annotations.values():
                detections.xyxy[:, 2:] += 1
        return read
    if format == "labelme":
        return sv.DetectionDataset.from_labelme(images, images)
    return sv.DetectionDataset.from_createml(images, str(folder / split / "_annotations.createml.json"))


def boxes_of(read: sv.DetectionDataset) -> Boxes:
    """Return the boxes of a dataset of supervision."""
    found: Boxes = {}
    for path, detections in read.annotations.items():
        ids = [] if detections.class_id is None else detections.class_id
        found[Path(path).stem] = [(read.classes[i], tuple(box)) for i, box in zip(ids, detections.xyxy, strict=True)]
    return found


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return the content of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.compat
@pytest.mark.parametrize("format", TOLERANCES)
def test_supervision_reads_the_same_boxes(format: str, dataset: Path) -> None:
    summary = export_dataset(dataset, format, CLASSES, source_of, split=SPLIT)

    assert summary.num_images == {"train": 6, "valid": 3, "test": 3}
    assert sum(summary.num_objects.values()) == sum(len(boxes) for boxes in expected_boxes(dataset).values())
    found: Boxes = {}
    for split, count in summary.num_images.items():
        read = read_with_supervision(dataset, format, split)
        assert len(read) == count
        for path, image, _ in read:
            assert image.shape == np.asarray(Image.open(path)).shape
        found.update(boxes_of(read))
    assert_equal_boxes(found, expected_boxes(dataset), TOLERANCES[format])


@pytest.mark.parametrize("format", ["yolo", "coco", "voc"])
def test_finetune_reads_the_same_boxes(format: str, dataset: Path) -> None:
    export_dataset(dataset, format, CLASSES, source_of, split=SPLIT)
    found: Boxes = {}
    for images in read_labels(dataset).splits.values():
        for image in images:
            width, height = Image.open(image.path).size
            found[image.path.stem] = [
                (name, tuple(np.multiply(box, [width, height, width, height])))
                for name, boxes in image.boxes.items()
                for box in boxes
            ]
    expected = {name: boxes for name, boxes in expected_boxes(dataset).items() if name in found}

    assert len(found) >= 9
    assert_equal_boxes(found, expected, TOLERANCES[format])


def test_pycocotools_reads_boxes_scores_and_areas(dataset: Path) -> None:
    export_dataset(dataset, "coco", CLASSES, source_of, split=SPLIT)
    found: Boxes = {}
    for split in ("train", "valid", "test"):
        coco = COCO(str(dataset / split / "_annotations.coco.json"))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == CLASSES
        for image in coco.loadImgs(coco.getImgIds()):
            assert Image.open(dataset / split / image["file_name"]).size == (image["width"], image["height"])
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
            assert [annotation["score"] for annotation in annotations] == [0.75] * len(annotations)
            boxes = [(coco.cats[one["category_id"]]["name"], one["bbox"], one["area"]) for one in annotations]
            assert all(area == pytest.approx(w * h, abs=0.01) for _, (_, _, w, h), area in boxes)
            found[Path(image["file_name"]).stem] = [(name, (x, y, x + w, y + h)) for name, (x, y, w, h), _ in boxes]

    assert_equal_boxes(found, expected_boxes(dataset), TOLERANCES["coco"])


def test_labelme_has_points_and_scores(dataset: Path) -> None:
    (record, *_) = read_records(dataset / LABELS)
    point = LabeledObject("tip", (10.25, 20.5, 10.25, 20.5), 0.5, is_point=True)
    write_records(dataset, [replace(record, objects=(*record.objects, point))])

    export_dataset(dataset, "labelme", [*CLASSES, "tip"], source_of, split=(1, 0, 0))
    shapes = json.loads((dataset / "train" / "scene-0000.json").read_text(encoding="utf-8"))["shapes"]

    assert [shape["shape_type"] for shape in shapes] == ["rectangle"] * len(record.objects) + ["point"]
    assert shapes[-1]["label"] == "tip"
    assert shapes[-1]["points"] == [[10.25, 20.5]]
    assert shapes[-1]["score"] == 0.5
    with pytest.raises(LabelingError, match="the format yolo has no points; choose one of labelme, label-studio"):
        export_dataset(dataset, "yolo", [*CLASSES, "tip"], source_of)


def test_tiny_boxes_keep_an_area_in_voc(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    boxes = [(10.1, 20.1, 10.4, 20.3), (63.8, 47.7, 64.0, 48.0), (0.0, 0.0, 0.2, 0.3)]
    objects = tuple(LabeledObject("dot", box) for box in boxes)
    record = ImageRecord("image.png", str(tmp_path / "image.png"), 64, 48, objects)
    write_records(tmp_path / "dataset", [record])
    export_dataset(tmp_path / "dataset", "voc", ["dot"], source_of, split=(1, 0, 0))
    labels = read_labels(tmp_path / "dataset")

    assert labels.num_dropped == 0
    assert len(labels.splits["train"][0].boxes["dot"]) == 3


def test_names_survive_yaml_xml_and_json(dataset: Path) -> None:
    names = ["no", "1.5", "a: b", "<cat> & \"dog\" 'x'", "café №1 🐈", "null", "- item", "#comment"]
    (first, *_) = read_records(dataset / LABELS)
    objects = tuple(LabeledObject(name, (1 + i, 2, 20 + i, 30)) for i, name in enumerate(names))
    write_records(dataset, [replace(first, objects=objects)])
    for name, tolerance in TOLERANCES.items():
        export_dataset(dataset, name, names, source_of, split=(1, 0, 0))
        found = boxes_of(read_with_supervision(dataset, name, "train"))
        assert_equal_boxes(found, expected_boxes(dataset), tolerance)


# --- Images -----------------------------------------------------------------------------------------------------------


def image_records(folder: Path, images: dict[str, Image.Image], **options: object) -> list[ImageRecord]:
    """Write images, and records with the size of the upright images and a box around the left half."""
    folder.mkdir()
    records = []
    for name, image in images.items():
        image.save(folder / name, **options)
        width, height = image.size
        if "exif" in options:
            width, height = height, width
        records.append(
            ImageRecord(name, str(folder / name), width, height, (LabeledObject("x", (0, 0, width / 2, height)),))
        )
    return records


def gradient(width: int, height: int) -> Image.Image:
    """Return an image that is dark on the left and at the top."""
    values = np.add.outer(np.linspace(0, 60, height), np.linspace(0, 190, width))
    return Image.fromarray(np.repeat(values[..., None], 3, axis=2).astype(np.uint8))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_rotated_images_are_upright_for_every_reader(suffix: str, tmp_path: Path) -> None:
    import cv2

    exif = Image.Exif()
    exif[0x0112] = 6  # rotated clockwise: shown with the left side on top
    stored = gradient(96, 64)
    records = image_records(tmp_path / "images", {f"photo{suffix}": stored}, exif=exif)
    write_records(tmp_path / "dataset", records)
    export_dataset(tmp_path / "dataset", "yolo", ["x"], source_of, split=(1, 0, 0))

    path = tmp_path / "dataset" / "train" / "images" / f"photo{suffix}"
    expected = np.asarray(stored.transpose(Image.Transpose.ROTATE_270), np.float64)
    with Image.open(path) as image:
        pillow = np.asarray(image.convert("RGB"), np.float64)
    assert pillow.shape == (96, 64, 3)
    assert abs(pillow - expected).mean() < 3
    assert abs(cv2.imread(str(path)).astype(float) - expected).mean() < 3


def test_formats_that_trainers_do_not_read_are_converted(tmp_path: Path) -> None:
    wide, square = gradient(64, 48), gradient(32, 32)
    records = image_records(tmp_path / "images", {"a.gif": wide, "b.ico": square, "c.ppm": wide, "d.avif": wide})
    (tmp_path / "images" / "e.jpg").write_bytes((tmp_path / "images" / "d.avif").read_bytes())  # as phones name them
    records.append(replace(records[-1], image="e.jpg", source=str(tmp_path / "images" / "e.jpg")))
    write_records(tmp_path / "dataset", records)
    export_dataset(tmp_path / "dataset", "voc", ["x"], source_of, split=(1, 0, 0))

    read = read_with_supervision(tmp_path / "dataset", "voc", "train")
    assert [Path(path).name for path in read.image_paths] == ["a.png", "b.png", "c.png", "d.jpg", "e.jpg"]
    for (_, pixels, detections), source in zip(read, (wide, square, wide, wide, wide), strict=True):
        assert abs(pixels.astype(float) - np.asarray(source)).mean() < 3
        assert len(detections) == 1


@pytest.mark.parametrize("link", [False, True])
def test_other_images_are_copied_or_linked_byte_for_byte(
    link: bool, dataset: Path, scene_records: list[ImageRecord]
) -> None:
    export_dataset(dataset, "coco", CLASSES, source_of, split=(1, 0, 0), link=link)
    for record in scene_records:
        exported = dataset / "train" / record.image
        assert exported.read_bytes() == source_of(record).read_bytes()
        assert exported.samefile(source_of(record)) == link


def test_changed_and_missing_images_are_errors_with_their_source(tmp_path: Path) -> None:
    write_records(tmp_path / "dataset", image_records(tmp_path / "images", {"a.png": gradient(32, 24)}))
    path = tmp_path / "images" / "a.png"
    Image.new("RGB", (7, 5)).save(path)
    with pytest.raises(LabelingError, match=r"a.png' has 7x5 pixels, and its labels are for 32x24; it has changed"):
        export_dataset(tmp_path / "dataset", "yolo", ["x"], source_of)
    path.unlink()
    with pytest.raises(LabelingError, match=r"a.png' cannot be exported: .*No such file.*; restore it"):
        export_dataset(tmp_path / "dataset", "yolo", ["x"], source_of)


# --- Files that exist -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_export_changes_nothing_and_opens_no_image(format: str, dataset: Path) -> None:
    first = export_dataset(dataset, format, CLASSES, source_of)
    before = tree_of(dataset)

    def fail(record: ImageRecord) -> Path:
        raise AssertionError(f"{record.image} was opened")

    progress: list[tuple[int, int]] = []
    second = export_dataset(dataset, format, CLASSES, fail, progress=lambda *done: progress.append(done))
    assert tree_of(dataset) == before
    assert second == first
    assert second.num_removed == 0
    assert progress == [(done, len(SCENES)) for done in range(1, len(SCENES) + 1)]


def test_files_that_no_longer_belong_to_the_dataset_are_removed(dataset: Path) -> None:
    records = list(read_records(dataset / LABELS))
    export_dataset(dataset, "coco", CLASSES, source_of)
    export_dataset(dataset, "yolo", CLASSES, source_of, split=(0, 1, 0))
    write_records(dataset, [*records[:4], replace(records[4], objects=(), error="unreadable"), *records[6:]])
    summary = export_dataset(dataset, "yolo", CLASSES, source_of, split=(1, 0, 0))

    assert summary.num_removed == len(records) + 2  # all labels and two images
    names = {Path(record.image).stem for record in [*records[:4], *records[6:]]}
    assert {path.name for path in dataset.iterdir()} == {".labeling", "data.yaml", "labels.jsonl", "train"}
    assert {path.stem for path in (dataset / "train" / "images").iterdir()} == names
    assert {path.stem for path in (dataset / "train" / "labels").iterdir()} == names


def test_folders_that_lose_all_their_files_receive_others(tmp_path: Path, scene_records: list[ImageRecord]) -> None:
    write_records(tmp_path / "a", scene_records[:3])
    write_records(tmp_path / "b", scene_records[:3])
    for seed in range(6):  # one image per split, in another order
        export_dataset(tmp_path / "a", "yolo", CLASSES, source_of, split=(0.34, 0.33, 0.33), seed=seed)
    export_dataset(tmp_path / "b", "yolo", CLASSES, source_of, split=(0.34, 0.33, 0.33), seed=5)
    files = [sorted(path.relative_to(folder) for path in folder.glob("*/*/*")) for folder in tmp_path.iterdir()]
    assert files[0] == files[1]


def test_images_move_when_their_sources_are_gone(tmp_path: Path) -> None:
    records = image_records(tmp_path / "images", {"a.png": gradient(32, 24), "b.gif": gradient(32, 24)})
    write_records(tmp_path / "dataset", records)
    export_dataset(tmp_path / "dataset", "yolo", ["x"], source_of, split=(1, 0, 0))
    exported = {path.name: path.read_bytes() for path in (tmp_path / "dataset" / "train" / "images").iterdir()}
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    export_dataset(tmp_path / "dataset", "coco", ["x"], source_of, split=(0, 0.5, 0.5))

    assert exported.keys() == {"a.png", "b.png"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "dataset").rglob("*.png")} == exported
    assert not (tmp_path / "dataset" / "train").exists()


@pytest.mark.parametrize("name", ["data.yaml", "valid/labels/scene-0001.txt"])
def test_files_of_other_origin_are_never_overwritten(name: str, dataset: Path) -> None:
    export_dataset(dataset, "coco", CLASSES, source_of)
    path = dataset / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = tree_of(dataset)
    with pytest.raises(LabelingError, match=f"{name} exists and no export has written it; move it away"):
        export_dataset(dataset, "yolo", CLASSES, source_of, split=(0, 1, 0))
    assert tree_of(dataset) == before
    (dataset / "train").rename(dataset / "moved")
    (dataset / "train").write_text("mine")
    with pytest.raises(LabelingError, match=r"the dataset needs the folder .*train.*, which is a file; move it away"):
        export_dataset(dataset, "yolo", CLASSES, source_of, split=(1, 0, 0))


@pytest.mark.parametrize(
    ("format", "name"), [("labelme", "scene-0002.json"), ("coco", "_annotations.coco.json"), ("yolo", "scene-0001.txt")]
)
def test_edited_labels_are_only_replaced_after_a_merge(format: str, name: str, dataset: Path) -> None:
    export_dataset(dataset, format, CLASSES, source_of, split=(1, 0, 0))
    (path,) = (dataset / "train").rglob(name)
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    edited = tree_of(dataset)
    for split in ((1, 0, 0), (0, 1, 0)):
        with pytest.raises(LabelingError, match=f"{name} was edited after the export; merge the review"):
            export_dataset(dataset, format, CLASSES, source_of, split=split)
    assert tree_of(dataset) == edited

    merge_reviewed(dataset, path if format == "coco" else dataset if format == "yolo" else path.parent)
    export_dataset(dataset, format, CLASSES, source_of, split=(1, 0, 0))
    assert tree_of(dataset) != edited
    path.write_text("")
    with pytest.raises(LabelingError, match="was edited"):
        export_dataset(dataset, format, CLASSES, source_of, split=(1, 0, 0))


KILLED_EXPORTS = """
import importlib, os, random, signal, sys
from pathlib import Path
from moondream_cv.labeling.exports import export_dataset

folder, format, classes = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
export = lambda: export_dataset(Path(folder), format, classes, lambda record: Path(record.source), seed=2)
importlib.import_module(f"supervision.dataset.formats.{format}")  # once for all children
kills = 0
while True:
    pid = os.fork()
    if pid == 0:
        left = random.Random(kills).randrange(1, 80)
        def kill(event, arguments):  # before an operation on a file of the dataset, or before the first byte of a file
            global left
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and folder in str(arguments[0]):
                left -= 1
                if left == 0:
                    if event == "open" and arguments[2] & os.O_TRUNC:
                        os.open(arguments[0], arguments[2])
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        export()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
print(kills)
"""


@pytest.mark.parametrize("format", ["yolo", "coco"])
def test_a_killed_export_continues_with_the_same_result(
    format: str, tmp_path: Path, scene_records: list[ImageRecord]
) -> None:
    trees = []
    for name in ("killed", "complete"):
        folder = tmp_path / name / "dataset"
        write_records(folder, scene_records[3:])
        export_dataset(folder, "voc", CLASSES, source_of, seed=1)  # leaves images to move and labels to remove
        write_records(folder, scene_records[:9])
        if name == "killed":
            command = [sys.executable, "-c", KILLED_EXPORTS, str(folder), format, ",".join(CLASSES)]
            root = str(Path(moondream_cv.__file__).parents[1])
            result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
            assert result.returncode == 0, result.stderr
            assert int(result.stdout) >= 3
        export_dataset(folder, format, CLASSES, source_of, seed=2)
        trees.append(tree_of(folder))

    assert trees[0].keys() == trees[1].keys()
    assert trees[0] == trees[1]


# --- Unsuitable input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "names", "has_points", "message"),
    [
        ("yolov8", ["a"], False, "format must be one of yolo, coco, .*, got 'yolov8'"),
        ("coco", ["a"], True, "coco has no points; choose one of labelme, label-studio"),
        ("coco", [], False, "at least one class"),
        ("voc", ["a", "b "], False, "start or end with a blank, got 'b '"),
        ("yolo", ["a", ""], False, "must not be empty"),
        ("voc", ["a\x0bb"], False, r"control characters, got 'a\\x0bb'"),
        ("createml", ["a\ud800"], False, r"control characters, got 'a\\ud800'"),
        ("labelme", ["a", "b", "a"], True, "must be unique; duplicates: 'a'"),
    ],
)
def test_unsuitable_formats_and_names_are_errors(format: str, names: list[str], has_points: bool, message: str) -> None:
    with pytest.raises(LabelingError, match=message):
        check_format(format, names, has_points)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda first: [replace(first, error="unreadable")], "has no labeled images"),
        (lambda first: [first, replace(first, image="scene-0000.jpg")], "two images need the same label file"),
        (lambda first: [replace(first, objects=(LabeledObject("z", (1, 1, 2, 2)),))], "classes .* not have: 'z'"),
        (lambda first: [replace(first, split="training")], "must be train, valid or test, got 'training'"),
    ],
)
def test_unsuitable_records_are_errors_before_any_file(
    change: Callable[[ImageRecord], list[ImageRecord]], message: str, dataset: Path
) -> None:
    write_records(dataset, change(next(read_records(dataset / LABELS))))
    before = tree_of(dataset)
    with pytest.raises(LabelingError, match=message):
        export_dataset(dataset, "yolo", CLASSES, source_of)
    assert tree_of(dataset) == before
