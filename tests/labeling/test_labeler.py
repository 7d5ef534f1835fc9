"""Labels of batches: prompts, negative prompts, thresholds, points, slices, and the labels of input datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector
from moondream_cv.errors import BackendError, MoondreamError
from moondream_cv.labeling.errors import LabelingError
from moondream_cv.labeling.inputs import InputImage
from moondream_cv.labeling.labeler import Labeler, LabelingSettings
from moondream_cv.labeling.prompts import ClassPrompts
from moondream_cv.labeling.records import ImageRecord, LabeledObject
from moondream_cv.requests import Detect, DetectedObject, DetectResult, ErrorResult, Request, Result
from tests.helpers.color_model import ColorModel, color_frame

pytestmark = pytest.mark.compat

SQUARE = ("red", (10, 20, 30, 40))


class PromptModel(ColorModel):
    """Returns fixed objects for each prompt."""

    def __init__(self, objects: dict[str, list[DetectedObject]]) -> None:
        super().__init__()
        self.objects = objects

    def _run_one(self, request: Request) -> Result:
        assert isinstance(request, Detect)
        return DetectResult(tuple(self.objects.get(request.object, ())[: request.settings.max_objects]))


def save(folder: Path, name: str, frame: np.ndarray) -> InputImage:
    cv2.imwrite(str(folder / name), frame)
    return InputImage(name, str(folder / name))


def label(model: ColorModel, image: InputImage, *classes: ClassPrompts, **options: Any) -> ImageRecord:
    """Return the labels of one image."""
    (record,) = Labeler(LabelingSettings(classes, "colors", **options), model).label([image])
    return record


def boxes(record: ImageRecord) -> list[tuple[str, tuple[float, ...], float | None]]:
    return [(one.class_name, one.xyxy, one.confidence) for one in record.objects]


def test_records_equal_the_detections_of_a_detector(tmp_path: Path) -> None:
    frame = color_frame(SQUARE, ("green", (40, 10, 60, 30)), ("red", (50, 40, 70, 50)))
    image = save(tmp_path, "a.png", frame)
    record = label(ColorModel(), image, ClassPrompts(name="green"), ClassPrompts(name="red"))
    found = Detector(ColorModel())(frame, ["green", "red"])
    assert [one.class_name for one in record.objects] == list(found.data["class_name"])
    np.testing.assert_allclose([one.xyxy for one in record.objects], found.xyxy, atol=0.005)
    assert (record.width, record.height, record.image, record.source) == (80, 60, "a.png", image.source)
    assert {one.origin for one in record.objects} == {"model"}


def test_all_prompts_of_a_batch_run_in_one_pass(tmp_path: Path) -> None:
    model = ColorModel()
    batch = [save(tmp_path, f"{name}.png", color_frame(SQUARE)) for name in "abc"]
    classes = (ClassPrompts(name="warm", prompts=("red", "orange"), negative=("blue",)), ClassPrompts(name="green"))
    Labeler(LabelingSettings(classes, "colors"), model).label(batch)
    (requests,) = model.runs
    assert len(requests) == 3 * 4


def test_synonyms_are_merged_and_the_most_confident_box_is_kept(tmp_path: Path) -> None:
    model = PromptModel(
        {
            "cup": [DetectedObject(0.1, 0.1, 0.5, 0.5, 0.6), DetectedObject(0.11, 0.1, 0.5, 0.5, 0.5)],
            "mug": [DetectedObject(0.1, 0.1, 0.48, 0.5, 0.9), DetectedObject(0.6, 0.6, 0.9, 0.9, 0.3)],
        }
    )
    image = save(tmp_path, "a.png", color_frame(size_wh=(100, 100)))
    merged = label(model, image, ClassPrompts(name="cup", prompts=("cup", "mug")))
    assert boxes(merged) == [("cup", (10, 10, 48, 50), 0.9), ("cup", (60, 60, 90, 90), 0.3)]
    assert [one.prompt for one in merged.objects] == ["mug", "mug"]
    alone = label(model, image, ClassPrompts(name="cup"))
    assert len(alone.objects) == 2  # overlapping boxes of one prompt stay
    assert [one.prompt for one in alone.objects] == [None, None]
    assert len(label(model, image, ClassPrompts(name="cup"), nms=0.5).objects) == 1


def test_negative_prompt_removes_objects_that_it_describes_better(tmp_path: Path) -> None:
    model = PromptModel(
        {
            "person": [DetectedObject(0, 0, 0.4, 0.4, 0.5), DetectedObject(0.5, 0.5, 1, 1, 0.8)],
            "mannequin": [DetectedObject(0, 0, 0.4, 0.42, 0.7), DetectedObject(0.5, 0.5, 1, 1, 0.6)],
        }
    )
    image = save(tmp_path, "a.png", color_frame(size_wh=(100, 100)))
    record = label(model, image, ClassPrompts(name="person", negative=("mannequin",)))
    assert boxes(record) == [("person", (50, 50, 100, 100), 0.8)]


def test_threshold_and_maximum_apply_to_their_class_only(tmp_path: Path) -> None:
    objects = [DetectedObject(i / 10, 0, i / 10 + 0.1, 0.1, 0.1 * (i + 1)) for i in range(5)]
    model = PromptModel({"a": objects, "b": objects, "c": objects})
    image = save(tmp_path, "a.png", color_frame(size_wh=(100, 100)))
    classes = (
        ClassPrompts(name="a", threshold=0.3),
        ClassPrompts(name="b", max_objects=2),
        ClassPrompts(name="c", threshold=0.2, max_objects=3),
    )
    record = label(model, image, *classes, max_objects=4)
    found = {name: [one.confidence for one in record.objects if one.class_name == name] for name in "abc"}
    assert found == {"a": [0.3, 0.4], "b": [0.1, 0.2], "c": [0.2, 0.3]}


def test_points_and_boxes_keep_the_order_of_the_classes(tmp_path: Path) -> None:
    image = save(tmp_path, "a.png", color_frame(SQUARE, ("green", (40, 10, 60, 30))))
    record = label(ColorModel(), image, ClassPrompts(name="red", skill="point"), ClassPrompts(name="green"))
    assert boxes(record) == [("red", (20, 30, 20, 30), 1.0), ("green", (40, 10, 60, 30), 1.0)]
    assert [one.is_point for one in record.objects] == [True, False]
    assert ImageRecord.from_line(record.to_line()) == record


def test_models_without_scores_give_no_confidence(tmp_path: Path) -> None:
    record = label(ColorModel(has_scores=False), save(tmp_path, "a.png", color_frame(SQUARE)), ClassPrompts(name="red"))
    assert [one.confidence for one in record.objects] == [None]


def test_slices_find_the_objects_of_a_large_image(tmp_path: Path) -> None:
    frame = color_frame(("red", (10, 20, 30, 40)), ("red", (230, 150, 250, 170)), size_wh=(300, 200))
    record = label(ColorModel(), save(tmp_path, "a.png", frame), ClassPrompts(name="red"), slice_size=100)
    assert sorted(one.xyxy for one in record.objects) == [(10, 20, 30, 40), (230, 150, 250, 170)]


def test_images_of_a_dataset_keep_their_labels(tmp_path: Path) -> None:
    image = save(tmp_path, "a.png", color_frame(SQUARE, ("red", (50, 40, 70, 50)), ("green", (40, 10, 60, 30))))
    given = (
        LabeledObject("red", (0.1, 1 / 3, 0.4, 0.7), origin="given"),
        LabeledObject("car", (0, 0, 1, 1), origin="given"),
    )
    known = InputImage(image.name, image.source, split="valid", given=given)
    record = label(ColorModel(), known, ClassPrompts(name="red"), ClassPrompts(name="green"))
    assert [(one.class_name, one.xyxy, one.origin) for one in record.objects] == [
        ("red", (8, 20, 32, 42), "given"),  # replaces the similar box of the model
        ("car", (0, 0, 80, 60), "given"),
        ("red", (50, 40, 70, 50), "model"),
        ("green", (40, 10, 60, 30), "model"),
    ]
    assert record.split == "valid"
    exported = label(ColorModel(), known)
    assert exported.objects == record.objects[:2]


def test_unreadable_image_has_an_error_and_does_not_affect_the_others(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    upright = Image.fromarray(color_frame(("red", (10, 20, 30, 40)))[..., ::-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "rotated.png", exif=exif)
    batch = [InputImage(name, str(tmp_path / name)) for name in ("bad.jpg", "rotated.png", "missing.png")]
    classes = (ClassPrompts(name="red"),)
    bad, rotated, missing = Labeler(LabelingSettings(classes, "colors"), ColorModel()).label(batch)
    assert bad.error is not None
    assert "bad.jpg" in bad.error
    assert missing.error is not None
    assert (rotated.width, rotated.height) == (60, 80)
    assert boxes(rotated) == [("red", (20, 10, 40, 30), 1.0)]
    assert ImageRecord.from_line(bad.to_line()) == bad


def test_lost_folder_or_storage_is_not_recorded_as_failed_images(tmp_path: Path) -> None:
    labeler = Labeler(LabelingSettings((ClassPrompts(name="red"),), "colors"), ColorModel())
    lost = [InputImage(name, str(tmp_path / "share" / name)) for name in ("a.png", "b.png")]
    with pytest.raises(LabelingError, match=r"share does not exist anymore, or is empty; mount it again"):
        labeler.label(lost)
    (tmp_path / "share").mkdir()
    with pytest.raises(LabelingError, match=r"does not exist anymore, or is empty"):
        labeler.label(lost)
    (tmp_path / "share" / "b.png").write_bytes(b"no image")
    assert all(record.error is not None for record in labeler.label(lost))
    urls = [InputImage(f"{index}.png", f"memory://missing/{index}.png") for index in range(4)]
    with pytest.raises(LabelingError, match=r"no image of a batch can be read: .*; check the storage"):
        labeler.label(urls)
    assert labeler.label(urls[:1])[0].error is not None


def test_failed_image_is_recorded_unless_the_model_fails_on_all(tmp_path: Path) -> None:
    magenta = save(tmp_path, "magenta.png", color_frame(("magenta", (0, 0, 80, 60))))
    good = save(tmp_path, "good.png", color_frame(SQUARE))
    labeler = Labeler(LabelingSettings((ClassPrompts(name="red"),), "colors"), ColorModel())
    failed, labeled = labeler.label([magenta, good])
    assert failed.error == "http://colors rejected the image"
    assert len(labeled.objects) == 1
    with pytest.raises(BackendError, match="rejected"):
        labeler.label([magenta])


class DyingModel(ColorModel):
    """A server that answers a number of requests, and is gone for a number of others."""

    def __init__(self, num_answers: int, num_errors: int) -> None:
        super().__init__()
        self.has_scores = False
        self._remaining = iter([True] * num_answers + [False] * num_errors)

    def _run_one(self, request: Request) -> Result:
        if not next(self._remaining, True):
            return ErrorResult(BackendError("http://colors is unreachable"))
        self.has_scores = True
        return super()._run_one(request)


def test_images_of_a_server_that_dies_are_not_recorded_as_failed(tmp_path: Path) -> None:
    images = [save(tmp_path, f"{index}.png", color_frame(SQUARE)) for index in range(4)]
    settings = LabelingSettings((ClassPrompts(name="red"),), "colors")
    with pytest.raises(BackendError, match="unreachable"):
        Labeler(settings, DyingModel(2, 99)).label(images)
    assert Labeler(settings, DyingModel(2, 2)).label(images) == Labeler(settings, ColorModel()).label(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "http://localhost:9001", "device": "cpu"}, "device must be None for a server"),
        ({"model": "no such model"}, "no such model"),
        ({"slice_size": 100, "classes": (ClassPrompts(name="a", skill="point"),)}, "slices are for boxes only"),
    ],
)
def test_settings_that_exclude_each_other_are_rejected(options: dict[str, Any], message: str) -> None:
    settings = LabelingSettings(**{"classes": (ClassPrompts(name="red"),), "model": "tiny", **options})
    with pytest.raises(MoondreamError, match=message):
        settings.check(is_loaded=False, on_ray=False)


def test_loaded_model_cannot_run_on_ray() -> None:
    with pytest.raises(LabelingError, match="cannot run on Ray"):
        LabelingSettings((ClassPrompts(name="red"),), "colors").check(is_loaded=True, on_ray=True)
