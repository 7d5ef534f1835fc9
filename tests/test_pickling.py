"""Pickling and copying of models, detectors and encoded images."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from moondream_cv import load
from moondream_cv.backends import MoondreamAPI
from moondream_cv.detector import Detector, Pointer
from moondream_cv.engine.calibration import Calibration, Curve
from moondream_cv.engine.image_cache import ImageCache
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import MoondreamError
from moondream_cv.model import hardware
from moondream_cv.model.quantized_linear import quantization_of
from tests.helpers.remote_server import Reply, remote_server
from tests.helpers.small_checkpoint import small_config, write_small
from tests.test_parity import GOLDEN

ADAPTER = GOLDEN / "mha" / "adapter.pt"
CLASSES = ["circle", "star"]


def detect(detector: Detector, frame: np.ndarray) -> np.ndarray:
    return np.asarray(detector(frame, CLASSES).xyxy)


def point(model: LocalModel, frame: np.ndarray) -> Any:
    return model.point(frame, "dog", {"max_objects": 3})


class Frames(Dataset[np.ndarray]):
    """Data set that detects objects in its frames, in the workers of a data loader."""

    def __init__(self, detector: Detector, frames: list[np.ndarray]) -> None:
        self.detector, self.frames = detector, frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> np.ndarray:
        return detect(self.detector, self.frames[index])


@pytest.mark.parametrize("kind", [Detector, Pointer])
def test_detectors_are_pickled_to_spawned_processes(kind: type[Detector], frame: np.ndarray) -> None:
    detector = kind("tiny", device="cpu", confidence=0.1, max_objects=3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(detect, (detector, frame)), detect(detector, frame))


@pytest.mark.slow
def test_detectors_are_pickled_to_data_loader_workers(frame: np.ndarray) -> None:
    detector = Detector("tiny", device="cpu")
    frames = [frame, frame[::-1].copy()]
    loader = DataLoader(
        Frames(detector, frames), batch_size=None, num_workers=1, multiprocessing_context="spawn", collate_fn=None
    )
    for found, image in zip(loader, frames, strict=True):
        assert np.array_equal(np.asarray(found), detect(detector, image))


def test_models_are_pickled_by_name(frame: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    model = load("mha", device="cpu", dtype="float32", adapter="mha/adapter.pt", cache_images=2)
    model.calibration = Calibration({"point": Curve((0.0, 1.0), (0.25, 0.75))})
    model.limits.max_num_seqs = 5
    pickled = pickle.dumps(model)
    assert len(pickled) < 10_000
    monkeypatch.chdir(tmp_path)
    again: LocalModel = pickle.loads(pickled)
    assert (again.name, again.dtype, again.device) == ("mha", torch.float32, torch.device("cpu"))
    assert again.fingerprint() == model.fingerprint() != load(GOLDEN / "mha", device="cpu").fingerprint()
    assert again.calibration == model.calibration
    assert again.limits == model.limits
    assert isinstance(again.image_cache, ImageCache)
    assert (again.image_cache.max_images, len(again.image_cache)) == (2, 0)
    assert point(again, frame) == point(model, frame)
    assert pickle.loads(pickle.dumps(again)).fingerprint() == model.fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["absolute", "Path", "file", "home"])
def test_folders_are_pickled_by_absolute_path(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    monkeypatch.setenv("HOME", str(GOLDEN))
    name = {"absolute": str(GOLDEN / "gqa"), "Path": Path("gqa"), "file": "gqa/model.safetensors", "home": "~/gqa"}
    model = load(name[path], device="cpu")
    pickled = pickle.dumps(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pickle.loads(pickled).fingerprint() == model.fingerprint()


def test_pickled_models_keep_their_precision_when_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(tmp_path, small_config(dim=576, layers=1))
    cpu = replace(hardware.probe_cpu(), free_memory=2**40)
    monkeypatch.setattr(hardware, "probe_cpu", lambda: cpu)
    model = load(tmp_path, device="cpu")
    monkeypatch.setattr(hardware, "probe_cpu", lambda: replace(cpu, free_memory=0))
    assert quantization_of(load(tmp_path, device="cpu").network) == "int8"
    copied = pickle.loads(pickle.dumps(model))
    assert quantization_of(copied.network) is None
    assert copied.dtype == model.dtype


def test_pickling_unnamed_models_raises_with_advice(model: LocalModel) -> None:
    for unnamed in (model, Detector(model)):
        with pytest.raises(
            MoondreamError, match=r"LocalModel\('random'.*not loaded by name; load it with moondream_cv"
        ):
            pickle.dumps(unnamed)


def test_pickling_closed_models_raises() -> None:
    model = load("tiny", device="cpu")
    model.close()
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(MoondreamError, match="'tiny' is closed"):
            copied(model)


def test_deep_copies_have_separate_weights(model: LocalModel, frame: np.ndarray) -> None:
    expected = point(model, frame)
    copied = copy.deepcopy(model)
    assert point(copied, frame) == expected
    with torch.no_grad():
        copied.network.text.wte.zero_()
    copied.close()
    assert point(model, frame) == expected


def test_deep_copies_keep_adapter_and_settings(frame: np.ndarray) -> None:
    model = load(GOLDEN / "mha", device="cpu", adapter=ADAPTER, cache_images=2)
    copied = copy.deepcopy(model)
    assert copied.fingerprint() == model.fingerprint()
    assert copied.image_cache is not model.image_cache
    assert isinstance(copied.image_cache, ImageCache)
    assert point(pickle.loads(pickle.dumps(copied)), frame) == point(model, frame)


def test_deep_copies_of_detectors(frame: np.ndarray) -> None:
    detector = Detector("tiny", device="cpu")
    expected = detect(detector, frame)
    copied = copy.deepcopy(detector)
    detector.close()
    assert np.array_equal(detect(copied, frame), expected)


def test_detectors_on_a_server_are_pickled_by_url(frame: np.ndarray) -> None:
    box = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75}
    models = Reply({"models": [{"id": "tiny", "has_scores": False}]})
    with remote_server() as server:
        server.on("/v1/models", models).on("/v1/detect", Reply({"objects": [box]}))
        detector = Detector(server.url)
        expected = detect(detector, frame)
        assert len(expected) == 2
        for copied in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector)):
            with copied:
                assert np.array_equal(detect(copied, frame), expected)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert np.array_equal(pool.apply(detect, (detector, frame)), expected)
        detector.close()
        with pytest.raises(MoondreamError, match="cannot be pickled or copied, because it is closed"):
            pickle.dumps(detector)


def test_pickling_remote_models_without_connect_raises() -> None:
    message = (
        r"MoondreamAPI at http://localhost:9.* cannot be pickled or copied, because it was not created by connect\(\)"
    )
    with MoondreamAPI("http://localhost:9") as model, pytest.raises(MoondreamError, match=message):
        pickle.dumps(model)
