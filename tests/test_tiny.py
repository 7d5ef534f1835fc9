"""The embedded model: accuracy on its scenes, and boxes from every type of image file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector, Pointer, load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.evaluation.scenes import evaluate_scenes, held_out_scenes
from moondream_cv.images import to_rgb
from moondream_cv.scenes import Scene, render_scene

NAMES = ["dog", "red circle", "blue star", "bus"]
EXIF_TURNS: dict[int, Callable[[Image.Image], Image.Image]] = {  # order of the pixels in a file with that orientation
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def scene() -> Scene:
    return render_scene(5, resolution_wh=(320, 240), names=NAMES, style="plain")


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["own", "alternate"])
def test_tiny_finds_objects_in_held_out_scenes(tiny: LocalModel, renderer: str) -> None:
    figures = evaluate_scenes(tiny, held_out_scenes(renderer, 25)).metrics()
    assert figures["F1 at IoU 0.5"] >= 0.8
    assert figures["absent names answered with nothing"] >= 0.9


@pytest.mark.slow
def test_bfloat16_boxes_are_close_to_float32(tiny: LocalModel) -> None:
    scenes = list(held_out_scenes("own", 25))
    with load("tiny", device="cpu", dtype="bfloat16") as rounded:
        drifted, exact = (evaluate_scenes(m, scenes).metrics() for m in (rounded, tiny))
    assert drifted != exact
    for name in ("F1 at IoU 0.5", "F1 of points", "count", "colour"):
        assert abs(drifted[name] - exact[name]) <= 0.05, name


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "tolerance"), [("int8", 0.02), ("int4", 0.05)])
def test_quantized_boxes_are_close_to_float32(tiny: LocalModel, mode: str, tolerance: float) -> None:
    scenes = list(held_out_scenes("own", 40))
    with load("tiny", device="cpu", quantize=mode) as quantized:
        drifted, exact = (evaluate_scenes(m, scenes).metrics() for m in (quantized, tiny))
    assert drifted != exact
    for name in ("F1 at IoU 0.5", "F1 of points"):
        assert abs(drifted[name] - exact[name]) <= tolerance, name


def test_tiny_finds_present_objects_and_no_absent_ones(tiny: LocalModel, scene: Scene) -> None:
    found = Detector(tiny)(Image.fromarray(scene.image), [*NAMES, "banana", "green heart"])
    assert sorted(found.data["class_name"]) == sorted(NAMES)
    for item in scene.objects:
        box = found[found.data["class_name"] == item.name].xyxy[0]
        assert np.abs(box - item.xyxy).max() < 10
    points = Pointer(tiny)(Image.fromarray(scene.image), NAMES)
    assert len(points) == len(NAMES)


def file_of(rgb: np.ndarray, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, suffix, **options)
    return buffer.getvalue()


def cmyk_jpeg(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(buffer, "JPEG", quality=98)
    return buffer.getvalue()


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "BGR": lambda rgb: np.ascontiguousarray(rgb[..., ::-1]),
    "non-contiguous view": lambda rgb: rgb[..., ::-1],
    "every other pixel of a larger array": lambda rgb: np.repeat(np.repeat(rgb[..., ::-1], 2, 0), 2, 1)[::2, ::2],
    "BGRA": lambda rgb: cv2.cvtColor(rgb, cv2.COLOR_RGB2BGRA),
    "16 bit": lambda rgb: rgb[..., ::-1].astype(np.uint16) * 257,
    "PIL": lambda rgb: Image.fromarray(rgb),
    "PIL RGBA": lambda rgb: Image.fromarray(rgb).convert("RGBA"),
    "PNG bytes": lambda rgb: file_of(rgb, "PNG"),
    "16-bit PNG": lambda rgb: cv2.imencode(".png", rgb[..., ::-1].astype(np.uint16) * 257)[1].tobytes(),
    "TIFF bytes": lambda rgb: file_of(rgb, "TIFF"),
    "BMP bytes": lambda rgb: file_of(rgb, "BMP"),
    "lossless WebP": lambda rgb: file_of(rgb, "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_type_gives_the_same_boxes(tiny: LocalModel, scene: Scene, kind: str) -> None:
    detector = Detector(tiny)
    expected = detector(Image.fromarray(scene.image), NAMES)
    found = detector(KINDS[kind](scene.image), NAMES)
    assert len(expected) == len(NAMES)
    np.testing.assert_array_equal(found.xyxy, expected.xyxy)
    np.testing.assert_array_equal(found.class_id, expected.class_id)


@pytest.mark.parametrize("orientation", EXIF_TURNS)
def test_every_exif_orientation_gives_upright_boxes(
    tiny: LocalModel, scene: Scene, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    EXIF_TURNS[orientation](Image.fromarray(scene.image)).save(path, quality=98, subsampling=0, exif=exif)
    found = Detector(tiny)(path, NAMES)
    assert to_rgb(path).shape == scene.image.shape
    assert sorted(found.data["class_name"]) == sorted(NAMES)
    for item in scene.objects:
        box = found[found.data["class_name"] == item.name].xyxy[0]
        assert np.abs(box - item.xyxy).max() < 12


@pytest.mark.parametrize(
    "make",
    [cmyk_jpeg, lambda rgb: Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE)],
    ids=["CMYK", "palette"],
)
def test_lossy_formats_keep_the_boxes(tiny: LocalModel, scene: Scene, make: Callable[[np.ndarray], Any]) -> None:
    found = Detector(tiny)(make(scene.image), NAMES)
    for item in scene.objects:
        boxes = found[found.data["class_name"] == item.name].xyxy
        assert np.abs(boxes - item.xyxy).max(1).min() < 12


def test_every_gray_format_gives_the_same_boxes(tiny: LocalModel, scene: Scene) -> None:
    gray = cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY)
    kinds = [gray, gray[..., None], Image.fromarray(gray), cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR), file_of(gray, "PNG")]
    first, *others = Detector(tiny)(kinds, ["object"])
    assert len(first)
    for other in others:
        np.testing.assert_array_equal(other.xyxy, first.xyxy)
