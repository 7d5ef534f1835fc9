"""Run a model on a benchmark, batch by batch. Images are read batch by batch, and predictions appended to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image

from moondream_cv.errors import ImageError
from moondream_cv.evaluation.benchmarks.dataset import Benchmark, Example
from moondream_cv.evaluation.benchmarks.parquet import ParquetImage, ParquetImages
from moondream_cv.evaluation.benchmarks.predictions import PredictionsFolder, Record
from moondream_cv.geometry import clip_xyxy, denormalize_xyxy
from moondream_cv.images import to_rgb
from moondream_cv.postprocessing import filter_by_size, remove_duplicates
from moondream_cv.requests import (
    Detect,
    DetectResult,
    ErrorResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Request,
    Result,
    Settings,
)
from moondream_cv.vision_model import VisionModel

Calibrate = Callable[[str, float], float]


def run_model(
    model: VisionModel,
    benchmark: Benchmark,
    folder: PredictionsFolder,
    *,
    batch: int,
    max_objects: int,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Run the images that have no predictions yet, and append their predictions.

    Text is decoded greedily. An unreadable image has a record with its error.

    Args:
        model: Model to evaluate. The calibration of a local model is turned off during the run: records contain the
            score before and the confidence after calibration.
        benchmark: Benchmark to run.
        folder: Folder of the predictions, after `start`.
        batch: Number of images per batch.
        max_objects: Maximum number of objects per prompt and image.
        on_progress: Called with the number of images that have predictions, first with those of an earlier run.

    Raises:
        EvaluationError: The predictions in the folder are not those of the benchmark.
        Exception: The model failed; the error of its first failed request. The run can be continued.
    """
    done = folder.resume(benchmark, batch)
    if done and on_progress is not None:
        on_progress(done)
    images = ParquetImages()
    settings = Settings(temperature=0.0, max_objects=max_objects)
    with _uncalibrated(model) as calibrate:
        for start in range(done, len(benchmark.examples), batch):
            examples = benchmark.examples[start : start + batch]
            records = _run_batch(model, benchmark, examples, images, settings, calibrate)
            folder.append(records)
            if on_progress is not None:
                on_progress(start + len(records))


@contextmanager
def _uncalibrated(model: VisionModel) -> Iterator[Calibrate | None]:
    """Turn off the calibration of a local model, and yield the function that applies it; None for other models."""
    calibration = model.calibration if getattr(model, "calibrated", False) else None  # type: ignore[attr-defined]
    if calibration is None:
        yield None
        return
    model.calibration = None  # type: ignore[attr-defined]
    try:
        yield calibration.apply
    finally:
        model.calibration = calibration  # type: ignore[attr-defined]


def _run_batch(
    model: VisionModel,
    benchmark: Benchmark,
    examples: Sequence[Example],
    images: ParquetImages,
    settings: Settings,
    calibrate: Calibrate | None,
) -> list[Record]:
    # Read the images
    opened: dict[str, Image.Image] = {}
    errors: dict[str, str] = {}
    for example in examples:
        try:
            opened[example.name] = _open(example, images)
        except ImageError as error:
            errors[example.name] = str(error)

    # Run all prompts of all images
    prompts = {one.name: benchmark.classes or [question.prompt for question in one.questions] for one in examples}
    request = {"detect": Detect, "point": Point, "query": Query}[benchmark.skill]
    requests: list[Request] = [
        request(image, prompt, settings=settings) for name, image in opened.items() for prompt in prompts[name]
    ]
    results = iter(model.run(requests) if requests else [])

    # Convert the results of each image
    records: list[Record] = []
    for example in examples:
        name = example.name
        if name in errors:
            records.append({"image": name, "error": errors[name]})
            continue
        image = opened[name]
        found: list[Record] = []
        for prompt in prompts[name]:
            entry = _entry(next(results), image.size, calibrate)
            if not benchmark.classes or entry["objects"]:
                found.append({"prompt": prompt, **entry})
        records.append({"image": name, "width": image.width, "height": image.height, "results": found})
    return records


def _open(example: Example, images: ParquetImages) -> Image.Image:
    if not isinstance(example.image, ParquetImage):
        return Image.fromarray(to_rgb(example.image))
    content = images.read(example.image)
    if content is None:
        raise ImageError(f"{example.image.path}: row {example.image.row} has no image")
    return Image.fromarray(to_rgb(content))


def _entry(result: Result, size_wh: tuple[int, int], calibrate: Calibrate | None) -> Record:
    """Return the answer, or the objects inside the image without duplicates, as `Detector` and `Pointer` do."""
    if isinstance(result, ErrorResult):
        raise result.error
    if isinstance(result, QueryResult):
        return {"answer": result.answer}
    if isinstance(result, DetectResult):
        boxes = _array([(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects])
        scores, skill = [o.confidence for o in result.objects], "detect"
    elif isinstance(result, PointResult):
        boxes = _array([(p.x, p.y, p.x, p.y) for p in result.points])
        scores, skill = [p.confidence for p in result.points], "point"
    else:
        raise TypeError(f"the model must return the result of the request, got {type(result).__name__}")
    found = sv.Detections(
        xyxy=clip_xyxy(denormalize_xyxy(boxes, size_wh), size_wh).astype(np.float32),
        confidence=np.array(scores, np.float32),
        class_id=np.zeros(len(boxes), int),
    )
    inside = np.asarray(((boxes >= 0) & (boxes <= 1)).all(axis=1))
    visible = filter_by_size(found, 0.0) if skill == "detect" else cast(sv.Detections, found[inside])
    kept = remove_duplicates(visible)
    objects: list[Record] = []
    for xyxy, confidence in zip(kept.xyxy, np.asarray(kept.confidence), strict=True):
        values, score = [_shortest(value) for value in xyxy], _shortest(confidence)
        place = {"box": values} if skill == "detect" else {"point": values[:2]}
        if calibrate is None:
            objects.append({**place, "confidence": score})
        else:
            calibrated = _shortest(np.float32(calibrate(skill, score)))
            objects.append({**place, "confidence": calibrated, "score": score})
    return {"objects": objects}


def _shortest(value: np.float32) -> float:
    """Return the number with the fewest digits that is the same float32."""
    return float(str(value))


def _array(boxes: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    return np.array(boxes, np.float64).reshape(-1, 4)
