"""`MoondreamDetector` in autodistill: `predict` and `label` of the real package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv import Detector
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import Scene, render_scene
from tests.helpers.workflows import CountingModel

pytestmark = pytest.mark.integrations
pytest.importorskip("autodistill", reason="needs autodistill (make test-integrations)")

PROMPTS = {"dog": "pet", "red circle": "ball", "cat": "pet", "bus": "vehicle"}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    names = ["dog", "cat", "red circle"]
    return [render_scene(seed, names=names[: 1 + seed % 3], resolution_wh=(320, 240)) for seed in range(6)]


def base_model(model: Any, prompts: dict[str, str]) -> Any:
    from autodistill.detection import CaptionOntology

    from moondream_cv.integrations.autodistill import MoondreamDetector

    return MoondreamDetector(CaptionOntology(prompts), model)


def test_predict_runs_all_prompts_in_one_call(tiny: LocalModel, scenes: list[Scene]) -> None:
    model = CountingModel(tiny)
    base_model(model, PROMPTS).predict(scenes[2].image[..., ::-1])
    assert model.call_sizes == [len(PROMPTS)]


def test_predict_returns_the_boxes_of_the_detector_with_class_ids_of_the_ontology(
    tiny: LocalModel, scenes: list[Scene]
) -> None:
    image = Image.fromarray(scenes[2].image)
    found = base_model(tiny, PROMPTS).predict(image)
    expected = Detector(tiny)(image, list(PROMPTS))
    assert np.array_equal(found.xyxy, expected.xyxy)
    assert np.array_equal(found.confidence, expected.confidence)
    assert expected.class_id.tolist() == [0, 1, 2]
    assert found.class_id.tolist() == [0, 1, 0]  # both pets have the first ID of their class
    assert found.data["class_name"].tolist() == ["pet", "ball", "pet"]


def test_predict_accepts_paths_arrays_and_pil_images(tiny: LocalModel, scenes: list[Scene], tmp_path: Path) -> None:
    model, path = base_model(tiny, PROMPTS), str(tmp_path / "scene.png")
    Image.fromarray(scenes[1].image).save(path)
    results = [model.predict(value) for value in (path, cv2.imread(path), Image.open(path))]
    assert len(results[0]) == 2
    assert results[0] == results[1] == results[2]


def test_new_ontology_replaces_the_prompts(tiny: LocalModel, scenes: list[Scene]) -> None:
    from autodistill.detection import CaptionOntology

    model = base_model(tiny, {"bus": "vehicle"})
    assert len(model.predict(scenes[0].image[..., ::-1])) == 0
    model.set_ontology(CaptionOntology({"dog": "animal"}))
    assert model.predict(scenes[0].image[..., ::-1]).data["class_name"].tolist() == ["animal"]


def test_label_writes_a_dataset_with_the_boxes_of_the_detector(
    tiny: LocalModel, scenes: list[Scene], tmp_path: Path
) -> None:
    # Label a folder
    source, target = tmp_path / "photos", tmp_path / "dataset"
    source.mkdir()
    for number, scene in enumerate(scenes):
        cv2.imwrite(str(source / f"{number}.jpg"), scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    prompts = {"red circle": "ball", "dog": "pet"}
    base_model(tiny, prompts).label(str(source), extension=".jpg", output_folder=str(target))

    # Read both splits and compare them with the detector
    detector, images = Detector(tiny), set()
    for split in ("train", "valid"):
        folders = (str(target / split / name) for name in ("images", "labels"))
        dataset = sv.DetectionDataset.from_yolo(*folders, str(target / "data.yaml"))
        assert dataset.classes == ["ball", "pet"]
        for path, _, written in dataset:
            expected = detector(str(source / Path(path).name), list(prompts))
            assert np.array_equal(written.class_id, expected.class_id)
            assert np.allclose(written.xyxy, expected.xyxy, atol=0.01)
            images.add(Path(path).name)
    assert len(images) == len(scenes)
