"""Test `moondream-cv evaluate`: scores of the tiny model, interrupted runs, unreadable images, and unusable folders."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner
from typer.testing import Result as RunResult

import moondream_cv
from moondream_cv import Detector, Pointer, load
from moondream_cv.cli import app, models
from moondream_cv.engine.calibration import FILE_NAME
from moondream_cv.evaluation.benchmarks.layouts import load_benchmark
from moondream_cv.evaluation.benchmarks.model_run import run_model
from moondream_cv.evaluation.benchmarks.predictions import (
    MODEL_CALIBRATION,
    PREDICTIONS,
    SETTINGS,
    PredictionsFolder,
)
from moondream_cv.evaluation.benchmarks.results import RESULTS
from moondream_cv.evaluation.benchmarks.scoring import score_predictions
from moondream_cv.evaluation.matching import Counts, match_boxes, match_points, true_positive_boxes
from moondream_cv.evaluation.metrics import calibration_error
from moondream_cv.requests import Query, QueryResult, Request, Result
from moondream_cv.scenes import Scene, render_scene
from moondream_cv.scenes.hard import render_hard
from moondream_cv.scenes.world import SHAPES
from tests.helpers.benchmark_files import text_entry, write_image, write_json, write_parquet
from tests.helpers.color_model import ColorModel, color_frame
from tests.helpers.labeled_scenes import write_dataset
from tests.helpers.served import served
from tests.helpers.small_commands import command
from tests.helpers.waiting import until

NAMES = ("red circle", "blue square", "dog", "car")


def evaluate(*arguments: object) -> RunResult:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def write_colors(folder: Path, count: int) -> Path:
    """Write COCO ground truth of images with one red and one green patch each; return the folder."""
    (folder / "valid").mkdir(parents=True)
    annotations = []
    for number in range(count):
        boxes = {"red": (5 + number, 5, 30 + number, 45), "green": (50, 10 + number, 70, 40 + number)}
        cv2.imwrite(str(folder / "valid" / f"{number}.png"), color_frame(*boxes.items()))
        for name, (x0, y0, x1, y1) in boxes.items():
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({"image_id": number, "category_id": 1 + (name == "green"), "bbox": box})
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 80, "height": 60} for n in range(count)],
        "annotations": annotations,
        "categories": [{"id": 0, "name": "colors"}, {"id": 1, "name": "red"}, {"id": 2, "name": "green"}],
    }
    write_json(folder / "valid" / "_annotations.coco.json", content)
    return folder


@pytest.fixture
def colors(monkeypatch: pytest.MonkeyPatch) -> ColorModel:
    """Return a model that detects colors, which all commands use."""
    model = ColorModel()
    monkeypatch.setattr(models, "load_model", lambda *_: model)
    return model


# --- The tiny model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return COCO ground truth of 14 rendered scenes with up to 3 objects of each of 4 classes."""
    rng = np.random.default_rng(0)
    found: list[Scene] = []
    while len(found) < 14:
        names = [name for name in NAMES for _ in range(int(rng.integers(0, 4)))]
        try:
            found.append(render_scene(rng, names=names))
        except ValueError:  # the objects do not fit into the frame
            continue
    return write_dataset(tmp_path_factory.mktemp("data"), found, "coco", "valid")


def labels(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "valid" / "_annotations.coco.json").read_text()))


def true_boxes(content: dict[str, Any], image: dict[str, Any], name: str) -> np.ndarray:
    (category,) = [one["id"] for one in content["categories"] if one["name"] == name]
    found = [
        one["bbox"]
        for one in content["annotations"]
        if (one["image_id"], one["category_id"]) == (image["id"], category)
    ]
    xywh = np.array(found, np.float32).reshape(-1, 4)
    return np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1)


def test_scores_equal_those_of_the_detector(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    options = [scenes, "-o", results, "--model", "tiny", "--device", "cpu", "--batch", "6", "--json"]
    run = evaluate(*options)
    assert run.exit_code == 0, run.stderr
    document = json.loads(run.stdout)
    metrics = document["metrics"]

    # Run the detector on its own
    content = labels(scenes)
    with Detector("tiny", device="cpu") as detector:
        paths = [scenes / "valid" / image["file_name"] for image in content["images"]]
        batches = [detector(paths[start : start + 6], NAMES) for start in range(0, len(paths), 6)]
    detections = [one for batch in batches for one in batch]
    counts, entries = Counts(), []
    for image, found in zip(content["images"], detections, strict=True):
        for index, name in enumerate(NAMES):
            boxes = found.xyxy[found.class_id == index]
            counts += match_boxes(boxes, true_boxes(content, image, name))[0]
            (category,) = [one["id"] for one in content["categories"] if one["name"] == name]
            for box, confidence in zip(boxes, found.confidence[found.class_id == index], strict=True):
                x0, y0, x1, y1 = map(float, box)
                entry = {"image_id": image["id"], "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                entries.append({**entry, "score": float(confidence)})
    assert metrics["F1 at IoU 0.5"] == pytest.approx(counts.f1)
    assert 0.8 < counts.f1 < 1.0
    assert metrics["F1 at IoU 0.5, best threshold"] >= counts.f1

    # Score its boxes with pycocotools
    truth = COCO()
    truth.dataset = {**content, "annotations": [{**one, "id": 1 + one["id"]} for one in content["annotations"]]}
    truth.createIndex()
    expected = COCOeval(truth, truth.loadRes(entries), "bbox")
    expected.evaluate()
    expected.accumulate()
    expected.summarize()
    assert [metrics[name] for name in ("mAP", "AP50", "AP75")] == pytest.approx(expected.stats[:3], abs=1e-6)

    # An interrupted run continues with the same predictions, and a complete one does not load the model
    files = {name: (results / name).read_bytes() for name in (PREDICTIONS, RESULTS, FILE_NAME)}
    lines = files[PREDICTIONS].splitlines(keepends=True)
    (results / PREDICTIONS).write_bytes(b"".join(lines[:9]) + lines[9][:20])
    assert evaluate(*options).exit_code == 0
    assert {name: (results / name).read_bytes() for name in files} == files
    monkeypatch.setattr(models, "load_model", None)
    assert json.loads(evaluate(*options).stdout) == document


def test_points_equal_those_of_the_pointer(scenes: Path, tmp_path: Path) -> None:
    options = ["--model", "tiny", "--device", "cpu", "--skill", "point", "--limit", "6", "--json"]
    run = evaluate(scenes, "-o", tmp_path / "results", *options)
    assert run.exit_code == 0, run.stderr
    content, counts = labels(scenes), Counts()
    with Pointer("tiny", device="cpu") as pointer:
        images = content["images"][:6]
        found = pointer([scenes / "valid" / image["file_name"] for image in images], NAMES)
    for image, points in zip(images, found, strict=True):
        for index, name in enumerate(NAMES):
            chosen = points.xyxy[points.class_id == index][:, :2]
            counts += match_points(chosen, true_boxes(content, image, name))
    metrics = json.loads(run.stdout)["metrics"]
    assert metrics["F1 of points in boxes"] == pytest.approx(counts.f1)
    assert counts.true_positives > 10
    assert "mAP" not in metrics


@pytest.mark.slow
def test_fitted_calibration_loads_and_lowers_the_error_on_other_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fit a calibration to hard scenes, for a copy of the tiny model that has none
    folder = tmp_path / "model"
    shutil.copytree(Path(moondream_cv.__file__).parent / "tiny", folder)
    (folder / FILE_NAME).unlink()
    monkeypatch.setattr("tests.helpers.labeled_scenes.CLASSES", SHAPES)
    monkeypatch.setattr("tests.helpers.labeled_scenes.label_of", lambda scene, index: scene.objects[index].shape)
    data = write_dataset(tmp_path / "data", [shapes_only(seed) for seed in range(5000, 5060)], "coco", "valid")
    run = evaluate(data, "-o", tmp_path / "results", "--model", folder, "--device", "cpu", "--json")
    assert run.exit_code == 0, run.stderr
    shutil.copy(tmp_path / "results" / FILE_NAME, folder)

    # Measure the error before and after calibration on other scenes
    model = load(folder, device="cpu")
    calibration = model.calibration
    assert calibration is not None
    calibrated = Detector(model)(shapes_only(6000).image, SHAPES).confidence
    model.calibration = None
    raw = Detector(model)(shapes_only(6000).image, SHAPES).confidence
    assert calibrated == pytest.approx([calibration.apply("detect", float(score)) for score in raw], abs=1e-6)
    scores, correct = [], []
    for scene in map(shapes_only, range(6000, 6060)):
        found = Detector(model)(scene.image[..., ::-1].copy(), SHAPES)
        scores += found.confidence.tolist()
        for index, shape in enumerate(SHAPES):
            true = np.array([one.xyxy for one in scene.objects if one.shape == shape], np.float32).reshape(-1, 4)
            correct += true_positive_boxes(found.xyxy[found.class_id == index], true).tolist()
    before = calibration_error(np.array(scores), np.array(correct))
    after = calibration_error(np.array([calibration.apply("detect", score) for score in scores]), np.array(correct))
    assert after < 0.85 * before


def shapes_only(seed: int) -> Scene:
    """Return a hard scene with the ground truth of its shapes."""
    scene = render_hard(seed)
    return Scene(scene.image, tuple(one for one in scene.objects if one.shape in SHAPES))


# --- Interrupted runs -------------------------------------------------------------------------------------------------


def test_killed_run_continues_with_the_same_bytes(
    tmp_path: Path, colors: ColorModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_colors(tmp_path / "data", 7)
    predictions = tmp_path / "results" / PREDICTIONS
    arguments = ["evaluate", "data", "--model", "colors", "--batch", "2", "-o"]
    process = command(*arguments, "results", cwd=tmp_path, stage="wait for the test")
    until(lambda: predictions.exists() and predictions.read_bytes().count(b"\n") == 2)
    process.kill()
    process.communicate()
    with predictions.open("ab") as file:
        file.write(b'{"image": "2.png", "wid')
    (tmp_path / "go").touch()
    process = command(*arguments, "results", cwd=tmp_path, stage="wait for the test")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert evaluate(*arguments[1:], "uninterrupted").exit_code == 0
    for name in (PREDICTIONS, RESULTS):
        assert (tmp_path / "results" / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()
    assert len((tmp_path / "results" / PREDICTIONS).read_text().splitlines()) == 7


def test_run_continues_after_any_number_of_bytes(tmp_path: Path) -> None:
    benchmark = load_benchmark(write_colors(tmp_path / "data", 5))
    folder = PredictionsFolder(tmp_path / "results")
    folder.folder.mkdir()
    path = folder.folder / PREDICTIONS
    run_model(ColorModel(), benchmark, folder, batch=2, max_objects=50)
    complete = path.read_bytes()
    for size in range(0, len(complete), 41):
        path.write_bytes(complete[:size])
        model = ColorModel()
        run_model(model, benchmark, folder, batch=2, max_objects=50)
        assert path.read_bytes() == complete
        kept = complete[:size].count(b"\n") // 2 * 2
        assert sum(len(run) for run in model.runs) == 2 * (5 - kept)  # two classes per image


def test_failure_of_the_model_keeps_the_complete_batches(tmp_path: Path, colors: ColorModel) -> None:
    data = write_colors(tmp_path / "data", 4)
    cv2.imwrite(str(data / "valid" / "3.png"), np.full((60, 80, 3), (255, 0, 255), np.uint8))  # the model fails on it
    run = evaluate(data, "-o", tmp_path / "results", "--batch", "2")
    assert run.exit_code == 1
    assert "rejected the image" in run.stderr
    assert (tmp_path / "results" / PREDICTIONS).read_text().count("\n") == 2


def test_images_of_earlier_batches_are_released(tmp_path: Path) -> None:
    class Watching(ColorModel):
        def __init__(self) -> None:
            super().__init__()
            self.images: list[weakref.ref[Any]] = []

        def run(self, requests: Sequence[Request]) -> list[Result]:
            assert not [image for image in self.images if image() is not None]
            self.images += [weakref.ref(request.image) for request in requests]
            return [self._run_one(request) for request in requests]

    write_parquet(tmp_path / "hub" / "test.parquet", [{"question": "?", "number": 1}] * 9)
    for number, data in enumerate((write_colors(tmp_path / "data", 9), tmp_path / "hub")):
        model = Watching()
        folder = PredictionsFolder(tmp_path / str(number))
        folder.folder.mkdir()
        run_model(model, load_benchmark(data), folder, batch=3, max_objects=50)
        assert len({id(image) for image in model.images}) >= 9


# --- Results ----------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_listed_and_count_as_misses(tmp_path: Path, colors: ColorModel) -> None:
    data = write_colors(tmp_path / "data", 2)
    (data / "valid" / "1.png").write_bytes(b"junk")
    run = evaluate(data, "-o", tmp_path / "results")
    assert run.exit_code == 1
    assert "1.png is not an image" in run.stderr.replace("'", "").replace("\n", "")
    assert "Scored as misses: 1 unreadable image; " in run.stderr
    document = json.loads((tmp_path / "results" / RESULTS).read_text())
    assert list(document["unreadable"]) == ["1.png"]
    assert document["metrics"]["F1 at IoU 0.5"] == pytest.approx(2 / 3)  # each class has two objects, and one is missed
    assert document["metrics"]["mAP"] == pytest.approx(51 / 101)


def test_model_on_a_server(scenes: Path, tmp_path: Path) -> None:
    with served(load("tiny", device="cpu")) as server:
        run = evaluate(scenes, "-o", tmp_path / "results", "--model", server.url, "--limit", "3", "--json")
    assert run.exit_code == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["metrics"]["F1 at IoU 0.5"] > 0.8
    assert document["settings"]["model"] == server.url


class AnswerModel(ColorModel):
    """Gives the same answer to every question."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer

    def _run_one(self, request: Request) -> Result:
        return QueryResult(self.answer)


def test_table_has_the_figure_of_the_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AnswerModel(" 4")
    monkeypatch.setattr(models, "load_model", lambda *_: model)
    rows = [{"text": "cups", "question": "How many cups?", "number": number} for number in (4, 5, 4)]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    run = evaluate(tmp_path / "data", "-o", tmp_path / "results", "--model", "other")
    assert run.exit_code == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if "accuracy" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["accuracy", "66.7", "86.4 (2025-03-27)"]
    note = "The model card is that of moondream2 (2025-06-21)"
    assert note in run.stdout
    (request,) = model.runs[0][:1]
    assert isinstance(request, Query)
    assert request.question.endswith("without any additional text. How many cups?")
    assert request.settings.temperature == 0.0
    run = evaluate(tmp_path / "data", "-o", tmp_path / "card")
    assert "86.4 (2025-03-27)" in run.stdout
    assert note not in run.stdout


def test_scores_of_questions(tmp_path: Path) -> None:
    head = {"questionId": 1, "question": "date?", "image": "documents/a.png", "answers": ["15 May", "May"]}
    write_json(tmp_path / "docvqa" / "val_v1.0_withQT.json", {"data": [head, {**head, "answers": ["June"]}]})
    write_image(tmp_path / "docvqa" / "documents" / "a.png")
    write_json(tmp_path / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [text_entry("a", ["15"] * 3 + ["x"] * 7)]})
    write_image(tmp_path / "textvqa" / "train_images" / "a.jpg")
    for kind, label in (("human", "15.5"), ("augmented", "20")):
        entry = {"imgname": f"{kind}.png", "query": "How many?", "label": label}
        write_json(tmp_path / "chartqa" / "test" / f"test_{kind}.json", [entry])
        write_image(tmp_path / "chartqa" / "test" / "png" / f"{kind}.png")
    formula = "Handwritten Mathematical Expression Recognition"
    entries = [
        {"dataset_name": name, "type": kind, "question": "?", "answers": answers, "image_path": "a.png"}
        for name, kind, answers in (("IIIT5K", "Text", ["5", "7"]), ("HME100k", formula, ["1 5"]), ("X", "Text", "1 5"))
    ]
    write_json(tmp_path / "ocrbench" / "OCRBench.json", entries)
    write_image(tmp_path / "ocrbench" / "OCRBench_Images" / "a.png")

    expected: dict[str, tuple[dict[str, float], dict[str, tuple[float, int]]]] = {
        "docvqa": ({"ANLS": 0.0, "exact match": 0.0}, {}),  # "15" is too far from "May", "15 May" and "June"
        "textvqa": ({"VQA accuracy": 0.9, "VQA accuracy, min(matches / 3, 1)": 1.0, "exact match": 1.0}, {}),
        "chartqa": ({"relaxed accuracy": 0.5, "exact match": 0.0}, {"augmented": (0.0, 1), "human": (1.0, 1)}),
        "ocrbench": ({"accuracy": 2 / 3}, {formula: (1.0, 1), "Text": (0.5, 2)}),
    }
    for task, (metrics, groups) in expected.items():
        benchmark = load_benchmark(tmp_path / task)
        folder = PredictionsFolder(tmp_path / task / "results")
        folder.folder.mkdir()
        run_model(AnswerModel("15"), benchmark, folder, batch=2, max_objects=50)
        scores = score_predictions(benchmark, folder)
        assert scores.metrics == pytest.approx(metrics)
        assert scores.groups == groups


def test_screenspot_scores_each_instruction(tmp_path: Path, colors: ColorModel) -> None:
    (tmp_path / "data" / "screenspot_imgs").mkdir(parents=True)
    boxes = {"red": (5, 5, 30, 45), "green": (50, 10, 70, 40)}
    cv2.imwrite(str(tmp_path / "data" / "screenspot_imgs" / "a.png"), color_frame(*boxes.items()))
    entries = [
        {"img_filename": "a.png", "bbox": [5, 5, 25, 40], "instruction": "red", "data_type": "icon"},
        {"img_filename": "a.png", "bbox": [0, 0, 10, 10], "instruction": "green", "data_type": "text"},
        {"img_filename": "a.png", "bbox": [0, 0, 10, 10], "instruction": "blue", "data_type": "text"},
    ]
    write_json(tmp_path / "data" / "screenspot_web.json", [{**one, "data_source": "shop"} for one in entries])
    document = json.loads(evaluate(tmp_path / "data", "-o", tmp_path / "results", "--json").stdout)
    assert document["metrics"]["F1 at IoU 0.5"] == pytest.approx(2 / 5)  # 1 true, 1 false, 2 missed
    assert document["groups"]["icon"] == {"value": 1.0, "questions": 1}
    assert document["groups"]["text"] == {"value": 0.0, "questions": 2}
    assert document["model_card"]["figures"]["F1 at IoU 0.5"]["percent"] == 80.4


# --- Unusable folders -------------------------------------------------------------------------------------------------


def test_errors_come_before_the_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ColorModel()
    monkeypatch.setattr(models, "load_model", lambda *_: model)
    data, results = write_colors(tmp_path / "data", 2), tmp_path / "results"
    assert evaluate(data, "-o", results).exit_code == 0
    monkeypatch.setattr(models, "load_model", None)
    other = evaluate(data, "-o", results, "--model", "tiny")
    assert other.exit_code == 1
    assert (
        "has the results of another run, with model 'moondream2' instead of 'tiny'; give a new folder" in other.stderr
    )
    assert "with images 2 instead of 1" in evaluate(data, "-o", results, "--limit", "1").stderr
    assert "is not empty and has no evaluation.json" in evaluate(data, "-o", data).stderr
    (tmp_path / "file").touch()
    assert "is a file; give a new folder for the results" in evaluate(data, "-o", tmp_path / "file").stderr
    assert "supported layouts: COCO" in evaluate(results, "-o", tmp_path / "new").stderr
    url = evaluate(data, "-o", tmp_path / "new", "--model", "http://localhost:1", "--device", "cpu")
    assert "--device applies to a local model only" in url.stderr
    assert evaluate(data, "-o", tmp_path / "new", "--split", "dev").exit_code == 2
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycocotools", None)
        missing = evaluate(data, "-o", tmp_path / "new").stderr
    assert 'the metrics of COCO ground truth need pycocotools; pip install "moondream-cv[labeling]"' in missing
    assert not (tmp_path / "new").exists()
    with PredictionsFolder(results).locked():
        assert "another process writes to" in evaluate(data, "-o", results).stderr
    (results / PREDICTIONS).write_text("[7]\n" * 2)
    assert "predictions.jsonl is damaged" in evaluate(data, "-o", results).stderr
    for content in ("[" * 100_000, '{"schema": 1, "settings": 7}'):
        (results / SETTINGS).write_text(content)
        assert "give a new folder" in evaluate(data, "-o", results).stderr


def test_run_starts_in_a_folder_of_a_run_that_was_killed_before_its_settings(
    colors: ColorModel, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    for name in (MODEL_CALIBRATION, f"{SETTINGS}.part"):
        (tmp_path / "results" / name).write_text('{"detect"')
    assert evaluate(write_colors(tmp_path / "data", 2), "-o", tmp_path / "results").exit_code == 0
    assert not (tmp_path / "results" / MODEL_CALIBRATION).exists()
