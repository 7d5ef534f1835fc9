"""A `Detector` as the callback of supervision's slicer, with the scenes of the example and the tiny model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv import Detector, load
from moondream_cv.engine.local_model import LocalModel
from tests.helpers.color_model import ColorModel, color_frame
from tests.helpers.scripts import import_file

pytestmark = pytest.mark.compat

Find = Callable[[Any], Any]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "small_objects.py"
    if not path.exists():
        pytest.skip("the examples are not part of a source distribution")
    return import_file("examples/small_objects.py")


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


def slicer_of(find: Find, **options: Any) -> sv.InferenceSlicer:
    return sv.InferenceSlicer(find, slice_wh=256, overlap_wh=48, overlap_metric=sv.OverlapMetric.IOS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 7])
def test_slices_find_small_objects_that_the_whole_image_misses(
    seed: int, example: ModuleType, tiny: LocalModel
) -> None:
    scene = example.render_small_objects(seed)
    assert scene.resolution_wh == (2400, 1600)
    assert max(max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (item.xyxy for item in scene.objects)) <= 26
    frame = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    find = partial(Detector(tiny, max_area=0.5), classes=example.CLASSES)
    whole = example.compare(find(frame), scene)
    sliced = example.compare(slicer_of(find, batch_size=8)(frame), scene)
    assert whole.true_positives <= 4
    assert sliced.true_positives >= 44
    assert sliced.false_positives <= 4


def test_batches_threads_and_image_types_return_the_same_boxes(example: ModuleType, tiny: LocalModel) -> None:
    scene = example.render_small_objects(5)
    image = np.ascontiguousarray(scene.image[:600, :800])
    frame = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    find = partial(Detector(tiny), classes=example.CLASSES)
    expected = slicer_of(find)(frame)
    assert len(expected) > 3
    others = {
        "batches": slicer_of(find, batch_size=5)(frame),
        "threads": slicer_of(find, thread_workers=3)(frame),
        "both": slicer_of(find, batch_size=2, thread_workers=2)(frame),
        "PIL": slicer_of(find)(Image.fromarray(image)),
        "lambda": slicer_of(lambda tile: find(tile))(frame),
    }
    for name, found in others.items():
        np.testing.assert_allclose(found.xyxy, expected.xyxy, atol=0.5, err_msg=name)
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-3, err_msg=name)
        assert found.data["class_name"].tolist() == expected.data["class_name"].tolist(), name


def test_truncated_slice_marks_its_objects() -> None:
    crowd = color_frame(*[("red", (x, 10, x + 5, 15)) for x in range(0, 100, 10)], ("red", (150, 150, 160, 160)),
                    size_wh=(200, 200))  # fmt: skip
    find = partial(Detector(ColorModel(), max_objects=3, mark_truncated=True), classes=["red", "green"])
    found = sv.InferenceSlicer(find, slice_wh=100, overlap_wh=0)(crowd)
    assert found.xyxy.tolist() == [[0, 10, 5, 15], [10, 10, 15, 15], [20, 10, 25, 15], [150, 150, 160, 160]]
    assert found.data["truncated"].tolist() == [True, True, True, False]
    assert found.metadata == {}


def test_objects_larger_than_a_slice_need_the_whole_image() -> None:
    frame = color_frame(("red", (20, 20, 180, 180)), ("green", (185, 5, 190, 10)), size_wh=(200, 200))
    model = ColorModel()
    pieces = sv.InferenceSlicer(partial(Detector(model, max_area=0.5), classes=["red", "green"]), 100, 0)(frame)
    assert pieces.data["class_name"].tolist() == ["green"]  # the four parts of the red object fill their slices
    both = sv.Detections.merge([Detector(model)(frame, ["red", "green"]), pieces]).with_nms(0.5)
    assert sorted(both.xyxy.tolist()) == [[20, 20, 180, 180], [185, 5, 190, 10]]


@pytest.mark.slow
def test_example_runs(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["small_objects.py", "--output", str(tmp_path / "out.png")])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == ["whole image", "slices"]
    assert all(" of 48 found" in line for line in lines[:2])
    written = cv2.imread(str(tmp_path / "out.png"))
    plain = cv2.cvtColor(example.render_small_objects(5).image, cv2.COLOR_RGB2BGR)
    assert written.shape == plain.shape
    assert (written != plain).any(axis=2).mean() > 0.005
