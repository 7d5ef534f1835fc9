"""`MoondreamModel` in FiftyOne: `apply_model` on a dataset in its database, and the source of the model zoo."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv import Detector, Pointer
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import render_scene
from tests.helpers.remote_server import Reply, remote_server

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("fiftyone_folder")]
if find_spec("fiftyone") is None:
    pytest.skip("needs fiftyone (make test-integrations)", allow_module_level=True)

CLASSES = ["red circle", "dog"]
SIZES = [(320, 240), (240, 320), (320, 240), (400, 300)]


@pytest.fixture
def dataset(tmp_path: Path, fiftyone_folder: Path) -> Iterator[Any]:
    """Return a FiftyOne dataset of rendered scenes of different sizes."""
    import fiftyone as fo

    dataset = fo.Dataset()
    for number, size in enumerate(SIZES):
        path = tmp_path / f"{number}.png"
        Image.fromarray(render_scene(number, names=["dog", "red circle", "dog"], resolution_wh=size).image).save(path)
        dataset.add_sample(fo.Sample(filepath=str(path)))
    yield dataset
    dataset.delete()


def moondream_model(*args: Any, **options: Any) -> Any:
    from moondream_cv.integrations.fiftyone import MoondreamModel

    return MoondreamModel(*args, **options)


def expected_boxes(detections: sv.Detections, size: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Return label, box as fractions and confidence of each detection, as FiftyOne's labels have them."""
    width, height = size
    return [
        (name, [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height], score)
        for (x0, y0, x1, y1), name, score in zip(
            detections.xyxy.tolist(), detections.data["class_name"], detections.confidence.tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("batch_size", [None, 3])
def test_apply_model_writes_the_boxes_of_the_detector(dataset: Any, tiny: LocalModel, batch_size: int | None) -> None:
    model = moondream_model(CLASSES, tiny)
    dataset.apply_model(model, label_field="found", batch_size=batch_size, skip_failures=False)
    detector = Detector(tiny)
    for sample, size in zip(dataset, SIZES, strict=True):
        expected = expected_boxes(detector(sample.filepath, CLASSES), size)
        labels = sample.found.detections
        assert [label.label for label in labels] == [name for name, _, _ in expected]
        assert np.allclose([label.bounding_box for label in labels], [box for _, box, _ in expected], atol=1e-6)
        assert np.allclose([label.confidence for label in labels], [score for _, _, score in expected], atol=1e-5)
    assert dataset.count("found.detections") >= 2 * len(SIZES)


def test_confidence_threshold_of_apply_model_drops_labels(dataset: Any, tiny: LocalModel) -> None:
    model = moondream_model(CLASSES, tiny)
    dataset.apply_model(model, label_field="all", skip_failures=False)
    threshold = sorted(dataset.values("all.detections.confidence", unwind=True))[2]
    dataset.apply_model(model, label_field="some", confidence_thresh=threshold, skip_failures=False)
    kept = [score for score in dataset.values("all.detections.confidence", unwind=True) if score >= threshold]
    assert dataset.values("some.detections.confidence", unwind=True) == kept
    assert len(kept) == dataset.count("all.detections") - 2
    assert model.config.confidence_thresh is None


def test_points_are_keypoints(dataset: Any, tiny: LocalModel) -> None:
    model = moondream_model("dog", tiny, skill="point")
    dataset.apply_model(model, label_field="points", confidence_thresh=0.01, skip_failures=False)
    sample = dataset.first()
    expected = Pointer(tiny)(sample.filepath, "dog")
    found = [(point.label, np.multiply(point.points[0], SIZES[0])) for point in sample.points.keypoints]
    assert [name for name, _ in found] == ["dog", "dog"]
    assert np.allclose([xy for _, xy in found], expected.xyxy[:, :2], atol=1e-3)
    assert np.allclose([point.confidence for point in sample.points.keypoints], expected.confidence[:, None], atol=1e-5)


def test_classes_can_be_replaced(dataset: Any, tiny: LocalModel) -> None:
    image = np.asarray(Image.open(dataset.first().filepath))
    model = moondream_model(CLASSES, tiny)
    model.classes = "dog"
    assert {label.label for label in model.predict(image).detections} == {"dog"}
    with pytest.raises(ValueError, match="classes must be unique"):
        model.classes = ["dog", "dog"]


def test_model_zoo_downloads_and_loads_the_model_from_a_url(dataset: Any, fiftyone_folder: Path) -> None:
    import fiftyone.operators.types as types
    import fiftyone.zoo as foz

    # Register the source
    source = io.BytesIO()
    with zipfile.ZipFile(source, "w") as archive:
        for file in resources.files("moondream_cv.integrations.fiftyone_zoo").iterdir():
            if file.is_file():
                archive.writestr(f"main/zoo/{file.name}", file.read_bytes())
    with remote_server() as server:
        server.on("/source.zip", Reply(source.getvalue(), kind="application/zip"))
        foz.register_zoo_model_source(f"{server.url}/source.zip")

    # Load and apply a model
    name, weights = "moondream-cv/tiny", fiftyone_folder / "models" / "moondream-cv" / "tiny" / "model.safetensors"
    assert {name, "moondream-cv/moondream2"} <= {*foz.list_zoo_models()}
    assert not weights.exists()
    model = foz.load_zoo_model(name, classes=["dog"], confidence=0.2)
    assert model.detector.confidence == 0.2
    assert weights.exists()
    assert foz.is_zoo_model_downloaded(name)
    dataset.apply_model(model, label_field="found", skip_failures=False)
    assert dataset.distinct("found.detections.label") == ["dog"]

    # The form in the App asks for the arguments
    form = foz.get_zoo_model(name).resolve_input(None).type
    assert isinstance(form, types.Object)
    assert [*form.properties] == ["classes", "skill"]

    # Delete the files
    foz.delete_zoo_model(name)
    assert not weights.parent.exists()
