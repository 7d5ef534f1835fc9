"""`label`: complete runs, resumption, extension, and errors before any work."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from filelock import FileLock

from moondream_cv import Detector, load
from moondream_cv.errors import BackendError, MoondreamError
from moondream_cv.evaluation.matching import Counts, match_boxes
from moondream_cv.labeling import LabelingProgress, LabelingResult, label
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.layout import LABELS, SETTINGS, WORK
from moondream_cv.labeling.records import read_records
from moondream_cv.labeling.run import merge_review
from moondream_cv.requests import Request, Result
from moondream_cv.scenes import Scene, render_scene
from tests.helpers.color_model import ColorModel, color_frame
from tests.helpers.waiting import until

CLASSES = ["red", "green"]


class FailingModel(ColorModel):
    """Fails on all requests after a number of calls of `run`."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def run(self, requests: Sequence[Request]) -> list[Result]:
        if len(self.runs) >= self.calls:
            raise BackendError("http://colors is unreachable")
        return super().run(requests)


def write_frames(folder: Path, indices: Sequence[int]) -> Path:
    """Write images with 0 to 3 patches."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        rng = np.random.default_rng(index)
        patches = []
        for place in range(int(rng.integers(0, 4))):
            x, y = 4 + 25 * place, int(rng.integers(0, 40))
            patches.append((str(rng.choice(CLASSES)), (x, y, x + int(rng.integers(4, 20)), y + 10)))
        cv2.imwrite(str(folder / f"{index:03}.png"), color_frame(*patches))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of the files of a dataset, without temporary ones."""
    paths = [path for path in folder.rglob("*") if path.is_file() and WORK not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_frames(tmp_path / "images", range(10))


# --- Results ----------------------------------------------------------------------------------------------------------


def test_dataset_contains_the_detections_of_every_image(images: Path, tmp_path: Path) -> None:
    seen: list[LabelingProgress] = []
    result = label(images, CLASSES, tmp_path / "dataset", model=ColorModel(), batch=4, on_progress=seen.append)
    records = list(read_records(result.folder / LABELS))
    assert [record.image for record in records] == [f"{index:03}.png" for index in range(10)]
    detector = Detector(ColorModel())
    for record in records:
        found = detector(cv2.imread(record.source), CLASSES)
        assert [one.class_name for one in record.objects] == list(found.data["class_name"])
        np.testing.assert_allclose([one.xyxy for one in record.objects], found.xyxy.reshape(-1, 4), atol=0.005)
    counts = {name: sum(one.class_name == name for record in records for one in record.objects) for name in CLASSES}
    assert (result.num_images, dict(result.counts), result.num_failed) == (10, counts, 0)
    assert dict(result.splits) == {"train": 8, "valid": 1, "test": 1}
    assert result.report.is_file()
    assert {progress.stage for progress in seen} == {"labels", "export"}


def test_f1_of_the_exported_dataset_equals_that_of_the_detector(tmp_path: Path) -> None:
    scenes = [render_scene(np.random.default_rng([7, index])) for index in range(12)]
    folder = tmp_path / "scenes"
    folder.mkdir()
    for index, scene in enumerate(scenes):
        cv2.imwrite(str(folder / f"{index:02}.png"), scene.image[..., ::-1])
    classes = sorted({item.name for scene in scenes for item in scene.objects})[:16]
    with load("tiny", device="cpu") as model:
        found = [Detector(model)(scene.image[..., ::-1], classes) for scene in scenes]
        label(folder, classes, tmp_path / "dataset", model=model, split=(1, 0, 0))
    exported = sv.DetectionDataset.from_yolo(
        str(tmp_path / "dataset/train/images"),
        str(tmp_path / "dataset/train/labels"),
        str(tmp_path / "dataset/data.yaml"),
    )
    assert exported.classes == classes
    labeled = [exported.annotations[str(tmp_path / f"dataset/train/images/{i:02}.png")] for i in range(12)]
    expected = counts_of(scenes, found, classes)
    assert counts_of(scenes, labeled, classes) == expected
    assert expected.true_positives > 10


def counts_of(scenes: Sequence[Scene], found: Sequence[sv.Detections], classes: Sequence[str]) -> Counts:
    """Return the matches of detections with the objects of the scenes."""
    counts = Counts()
    for scene, detections in zip(scenes, found, strict=True):
        for index, name in enumerate(classes):
            true = np.array([item.xyxy for item in scene.objects if item.name == name], np.float32).reshape(-1, 4)
            mine = (
                np.zeros((0, 4), np.float32)
                if detections.class_id is None
                else detections.xyxy[detections.class_id == index]
            )
            counts += match_boxes(np.asarray(mine, np.float32).reshape(-1, 4), true)[0]
    return counts


def test_unreadable_images_are_reported_and_not_exported(images: Path, tmp_path: Path) -> None:
    (images / "005.png").write_bytes(b"no image")
    result = label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    assert (result.num_images, result.num_failed) == (9, 1)
    assert "005.png" in result.report.read_text(encoding="utf-8")
    assert not any("005" in name for name in files_of(result.folder) if name.startswith(("train", "valid", "test")))


def test_near_duplicates_are_dropped(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        scene = render_scene(np.random.default_rng([3, index])).image[..., ::-1]
        cv2.imwrite(str(images / f"{index}.png"), scene)
        cv2.imwrite(str(images / f"{index}-copy.jpg"), scene, [cv2.IMWRITE_JPEG_QUALITY, 80])
    result = label(images, CLASSES, tmp_path / "dataset", model=ColorModel(), duplicate_distance=6)
    assert (result.num_images, result.num_duplicates) == (3, 3)
    duplicates = {record.image: record.duplicate_of for record in read_records(result.folder / LABELS)}
    assert duplicates["0.png"] == "0-copy.jpg"


def test_prompts_of_a_file_are_used(images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("stop: [red]\ngo: {prompts: [green], threshold: 0.5}\n")
    label(images, None, tmp_path / "dataset", prompts=prompts, model=ColorModel())
    found = {
        one.class_name: one.prompt for record in read_records(tmp_path / "dataset" / LABELS) for one in record.objects
    }
    assert found == {"stop": "red", "go": "green"}


def test_dataset_is_exported_in_another_format_without_a_model(images: Path, tmp_path: Path) -> None:
    first = label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    second = label(first.folder, None, tmp_path / "coco", format="coco", split=(1, 0, 0))
    assert dict(second.counts) == dict(first.counts)
    before, after = (list(read_records(result.folder / LABELS)) for result in (first, second))
    assert [record.objects for record in after] == [record.objects for record in before]
    exported = json.loads((second.folder / "train/_annotations.coco.json").read_text())
    assert [category["name"] for category in exported["categories"]] == CLASSES  # not in alphabetical order


# --- Resumption -------------------------------------------------------------------------------------------------------


def test_second_run_of_a_complete_dataset_does_nothing(images: Path, tmp_path: Path) -> None:
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    before = files_of(tmp_path / "dataset")
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "dataset" / "train").rglob("*") if path.is_file()}
    model = ColorModel()
    label(images, CLASSES, tmp_path / "dataset", model=model)
    assert model.runs == []
    assert files_of(tmp_path / "dataset") == before
    assert all(path.stat().st_mtime_ns == time for path, time in changed.items())


def test_run_continues_after_an_error_of_the_model(images: Path, tmp_path: Path) -> None:
    label(images, CLASSES, tmp_path / "expected", model=ColorModel(), batch=4)
    with pytest.raises(LabelingError, match=r"unreachable\. 4 of 10 images are labeled; the same command continues"):
        label(images, CLASSES, tmp_path / "dataset", model=FailingModel(1), batch=4)
    model = FailingModel(99)
    label(images, CLASSES, tmp_path / "dataset", model=model, batch=4)
    assert [len(requests) for requests in model.runs] == [8, 4]  # 2 requests per image
    expected = files_of(tmp_path / "expected")
    found = files_of(tmp_path / "dataset")
    for name in (SETTINGS, "report.html"):  # with the names of the model and the folder
        expected.pop(name)
        found.pop(name)
    assert found == expected


def test_dataset_of_a_lost_image_is_completed_in_another_folder(images: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelingError, match="unreachable"):
        label(images, CLASSES, tmp_path / "dataset", model=FailingModel(1), batch=4)
    (images / "001.png").unlink()
    with pytest.raises(LabelingError, match="use this dataset as the input of another one, which leaves the image out"):
        label(images, CLASSES, tmp_path / "dataset", model=FailingModel(99), batch=4)
    result = label(tmp_path / "dataset", None, tmp_path / "other")
    assert (result.num_images, result.num_failed) == (9, 1)


def test_new_images_are_added_to_a_complete_dataset(images: Path, tmp_path: Path) -> None:
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel(), batch=4)
    before = (tmp_path / "dataset" / LABELS).read_bytes()
    write_frames(images, range(10, 13))
    write_frames(tmp_path / "images" / "aaa", [20])
    model = ColorModel()
    result = label(images, CLASSES, tmp_path / "dataset", model=model, batch=4)
    assert result.num_images == 14
    assert sum(map(len, model.runs)) == 4 * 2
    assert (tmp_path / "dataset" / LABELS).read_bytes().startswith(before)


def test_review_replaces_the_labels_of_the_model(images: Path, tmp_path: Path) -> None:
    result = label(images, CLASSES, tmp_path / "dataset", model=ColorModel(), split=(1, 0, 0))
    shutil.copytree(result.folder / "train", tmp_path / "reviewed" / "train")
    shutil.copy(result.folder / "data.yaml", tmp_path / "reviewed")
    (tmp_path / "reviewed/train/labels/003.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    summary, merged = merge_review(result.folder, tmp_path / "reviewed")
    assert (summary.num_reviewed, summary.num_changed) == (10, 1)
    record = next(record for record in read_records(result.folder / LABELS) if record.image == "003.png")
    assert [(one.class_name, one.xyxy, one.origin) for one in record.objects] == [("green", (30, 15, 50, 45), "human")]
    assert (result.folder / "train/labels/003.txt").read_text().split() == [
        "1",
        "0.50000",
        "0.50000",
        "0.25000",
        "0.50000",
    ]
    model = ColorModel()
    again = label(images, CLASSES, result.folder, model=model, split=(1, 0, 0))
    assert model.runs == []
    assert dict(again.counts) == dict(merged.counts)


def write_review(path: Path, class_name: str, kind: str = "rectanglelabels") -> Path:
    """Write a review of Label Studio with one object in the first image."""
    size = {"width": 30, "height": 40} if kind == "rectanglelabels" else {}
    region = {"type": kind, "value": {"x": 10, "y": 20, **size, kind: [class_name]}}
    path.write_text(json.dumps([{"data": {"image": "000.png"}, "annotations": [{"result": [region]}]}]))
    return path


@pytest.mark.parametrize("stage", ["moondream_cv.labeling.run.export_labels", "moondream_cv.labeling.merge._merged"])
def test_interrupted_merge_with_a_new_class_is_completed_by_the_same_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    review = write_review(tmp_path / "review.json", "new")
    for name in ("a/dataset", "b/dataset"):
        label(images, CLASSES, tmp_path / name, model=ColorModel())
    merge_review(tmp_path / "a/dataset", review)

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_review(tmp_path / "b/dataset", review)
    result = merge_review(tmp_path / "b/dataset", review)[1]
    assert result.counts["new"] == 1
    assert files_of(tmp_path / "b/dataset") == files_of(tmp_path / "a/dataset")


@pytest.mark.parametrize(
    ("class_name", "kind", "message"),
    [
        ("a\nb", "rectanglelabels", "control characters"),
        (" ", "rectanglelabels", "must not be empty"),
        ("tip", "keypointlabels", "the format yolo has no points"),
    ],
)
def test_merge_of_objects_that_the_format_cannot_represent_changes_nothing(
    images: Path, tmp_path: Path, class_name: str, kind: str, message: str
) -> None:
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    before = files_of(tmp_path / "dataset")
    with pytest.raises(LabelingError, match=message):
        merge_review(tmp_path / "dataset", write_review(tmp_path / "review.json", class_name, kind))
    assert files_of(tmp_path / "dataset") == before


def test_incomplete_dataset_is_not_merged(images: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelingError):
        label(images, CLASSES, tmp_path / "dataset", model=FailingModel(1), batch=4)
    with pytest.raises(LabelingError, match=r"4 of 10 images in .* are labeled; complete the run first"):
        merge_review(tmp_path / "dataset", images)


# --- Errors before any work -------------------------------------------------------------------------------------------


def run_rejected(tmp_path: Path, message: str, images: Path, **arguments: Any) -> None:
    """Check that a call raises before the model runs, and changes nothing."""
    before = sorted(tmp_path.rglob("*"))
    model = ColorModel()
    given = {"inputs": images, "classes": CLASSES, "output": tmp_path / "dataset", "model": model, **arguments}
    with pytest.raises((MoondreamError, ValueError), match=message):
        label(**given)
    assert model.runs == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": None}, "class names are missing"),
        ({"classes": []}, "class names must not be empty"),
        ({"classes": ["red", "Red"]}, 'duplicates: "red", "Red"'),
        ({"classes": ["red", " "]}, "must not be empty"),
        ({"classes": ["a\nb"], "format": "voc"}, "control characters"),
        ({"split": (0, 1, 0)}, "the first above 0"),
        ({"batch": 0}, "batch must be"),
        ({"confidence": 2}, "confidence must be between 0 and 1"),
        ({"slice_size": 8}, "slice_size must be"),
        ({"format": "tfrecord"}, "tfrecord"),
        ({"device": "cpu"}, "device must be None for a loaded model"),
        ({"every": 0}, "every must be"),
    ],
)
def test_invalid_arguments_are_rejected_before_any_work(
    images: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    run_rejected(tmp_path, message, images, **arguments)


def test_points_need_a_format_with_points(images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("red: {skill: point}\n")
    run_rejected(tmp_path, "points", images, classes=None, prompts=prompts)


def test_folder_without_images_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run_rejected(tmp_path, "images have .*jpg", tmp_path / "empty")
    run_rejected(tmp_path, "missing", tmp_path / "missing")


def test_files_with_the_same_stem_are_rejected(images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "003.png", images / "003.bmp")
    run_rejected(tmp_path, r"003\.bmp.*003\.png", images)


@pytest.mark.parametrize("output", ["images", "file", "file/dataset"])
def test_unsuitable_output_is_rejected_and_kept(images: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("text")
    run_rejected(tmp_path, "contains other files|must be a folder|cannot be written", images, output=tmp_path / output)


def test_dataset_with_other_settings_is_rejected(images: Path, tmp_path: Path) -> None:
    label(images, ["red", "green"], tmp_path / "dataset", model=ColorModel())
    changed = {"classes": ["red", "blue"], "confidence": 0.5, "max_objects": 5, "every": 3}
    differences = (
        'classes: now without "green"; with "blue"; "red" has threshold: 0.0, now 0.5; max_objects: 50, now 5; '
        "every: none, now 3"
    )
    run_rejected(tmp_path, re.escape(f"other settings ({differences})"), images, **changed)
    run_rejected(tmp_path, r"classes: now in another order\)", images, classes=["green", "red"])
    many = r'classes: now with "0", "1", "2", "3", "4" and 2 more\)'
    run_rejected(tmp_path, many, images, classes=["red", "green", *map(str, range(7))])
    run_rejected(tmp_path, r"classes: now none\)", tmp_path / "dataset", classes=None)


def test_settings_can_change_until_an_image_is_labeled(images: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelingError, match="0 of 10 images are labeled"):
        label(images, ["red", "Grean"], tmp_path / "dataset", model=FailingModel(0), batch=2)
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    label(images, CLASSES, tmp_path / "other/dataset", model=ColorModel())
    assert files_of(tmp_path / "dataset") == files_of(tmp_path / "other/dataset")


def test_dataset_that_another_process_labels_is_rejected(images: Path, tmp_path: Path) -> None:
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    with FileLock(tmp_path / "dataset" / WORK / "lock"):
        run_rejected(tmp_path, "another process is labeling", images)


def test_dataset_whose_images_another_process_lists_is_rejected_and_kept(images: Path, tmp_path: Path) -> None:
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    (tmp_path / "dataset" / WORK / "images.jsonl").unlink()
    with FileLock(tmp_path / "dataset" / WORK / "lock"):
        run_rejected(tmp_path, "another process is labeling", images)


def test_run_starts_in_a_folder_of_a_run_that_was_killed_before_its_settings(images: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset" / WORK).mkdir(parents=True)
    for name in (f"{WORK}/lock", f"{SETTINGS}.part", ".moondream-cv.part"):
        (tmp_path / "dataset" / name).touch()
    assert label(images, CLASSES, tmp_path / "dataset", model=ColorModel()).num_images == 10
    assert not list((tmp_path / "dataset").rglob("*.part"))


def test_edited_labels_are_rejected_before_new_images_are_labeled(images: Path, tmp_path: Path) -> None:
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel(), split=(1, 0, 0))
    (tmp_path / "dataset/train/labels/003.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    write_frames(images, [10])
    run_rejected(tmp_path, "was edited after the export; merge the review with --merge", images, split=(1, 0, 0))


def test_damaged_settings_are_rejected(images: Path, tmp_path: Path) -> None:
    label(images, CLASSES, tmp_path / "dataset", model=ColorModel())
    (tmp_path / "dataset" / SETTINGS).write_text("{")
    run_rejected(tmp_path, "labeling.json cannot be read", images)


def test_disk_without_space_for_the_images_is_rejected(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    run_rejected(tmp_path, "free some space, choose another disk, or link the images", images)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of the file size")
def test_run_continues_after_a_full_disk(images: Path, tmp_path: Path) -> None:
    write_frames(images, range(10, 200))
    script = f"""
import resource, sys
from moondream_cv.labeling import label
from tests.helpers.color_model import ColorModel
if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (35_000, resource.RLIM_INFINITY))
label({str(images)!r}, {CLASSES!r}, {str(tmp_path / "dataset")!r}, model=ColorModel())
"""
    full = run_script(script, "full")
    assert full.returncode == 1
    assert "is full; free some space and run the same command again: it continues" in full.stderr
    assert 0 < (tmp_path / "dataset" / LABELS).stat().st_size <= 35_000
    assert run_script(script, "").returncode == 0
    label(images, CLASSES, tmp_path / "expected", model=ColorModel())
    assert (tmp_path / "dataset" / LABELS).read_bytes() == (tmp_path / "expected" / LABELS).read_bytes()


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )


# --- Kills ------------------------------------------------------------------------------------------------------------


def write_scenes(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        scene = render_scene(np.random.default_rng([11, index]), resolution_wh=(320, 240))
        cv2.imwrite(str(folder / f"{index:05}.jpg"), scene.image[..., ::-1])
    return folder


KILLED = """
import sys
from moondream_cv.labeling import label
label(sys.argv[1], ["circle", "square", "star"], "dataset", model="tiny", device="cpu", dtype="float32")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)
"""


def peak_memory_of_run(images: Path, folder: Path) -> float:
    """Label images in a process, and return its peak memory in MB."""
    folder.mkdir()
    return float(process_of(images, folder).communicate()[0])


def process_of(images: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(images)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def check_kills(tmp_path: Path, count: int, kills: int) -> None:
    """Label images in one run, and in a run that is killed at random moments; compare the results and the memory."""
    images = write_scenes(tmp_path / "images", count)
    peak = peak_memory_of_run(images, tmp_path / "whole")
    rng = np.random.default_rng(0)
    folder = tmp_path / "killed"
    folder.mkdir()
    dataset = folder / "dataset"

    # Kill at random amounts of written files: first of the labels, then of the exported images
    whole = tmp_path / "whole" / "dataset"
    size = (whole / LABELS).stat().st_size
    moments: list[tuple[str, int]] = [(LABELS, int(at)) for at in np.sort(rng.integers(0, size, kills - 2))]
    moments += [("train", int(at)) for at in np.sort(rng.integers(1, count // 2, 2))]
    for name, at in moments:
        process = process_of(images, folder)

        def reached(path: Path = dataset / name, at: int = at, process: subprocess.Popen[str] = process) -> bool:
            amount = sum(1 for _ in path.rglob("*")) if path.is_dir() else path.stat().st_size if path.exists() else -1
            return amount >= at or process.poll() is not None

        until(reached, 600)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, (name, at)
    assert process_of(images, folder).wait() == 0
    assert files_of(dataset) == files_of(whole)

    # Compare the peak memory with that of a tenth of the images
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(images.iterdir())[: count // 10]:
        shutil.copy(path, few)
    assert peak - peak_memory_of_run(few, tmp_path / "tenth") < 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_run_that_is_killed_10_times_gives_the_same_files(tmp_path: Path) -> None:
    check_kills(tmp_path, 2000, 10)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_run_with_20000_images_that_is_killed_30_times_gives_the_same_files(tmp_path: Path) -> None:
    check_kills(tmp_path, 20_000, 30)


def test_settings_are_json(images: Path, tmp_path: Path) -> None:
    result = label(images, CLASSES, tmp_path / "dataset", model=ColorModel(), confidence=0.25, format="coco")
    content = json.loads((result.folder / SETTINGS).read_text())
    assert [one["name"] for one in content["labeling"]["classes"]] == CLASSES
    assert content["labeling"]["classes"][0]["threshold"] == 0.25
    assert content["export"]["format"] == "coco"
    assert isinstance(result, LabelingResult)
