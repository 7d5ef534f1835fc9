"""Encoded images are valid for equal weights, in any object and process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from moondream_cv import load
from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.model_fingerprint import fingerprint
from moondream_cv.requests import ErrorResult, Point, Settings
from tests.test_parity import GOLDEN

FOLDER = GOLDEN / "mha"
ADAPTER = FOLDER / "adapter.pt"
IMAGE = FOLDER / "images" / "4_50x40.png"
FEW = {"max_objects": 3}


def encode_elsewhere(folder: Path) -> bytes:
    """Encode an image in another process, after creating other models there."""
    load("tiny", device="cpu")
    return pickle.dumps(load(folder, device="cpu").encode_image(IMAGE))


@pytest.fixture(scope="module")
def loaded() -> LocalModel:
    return load(FOLDER, device="cpu")


def test_encoded_images_of_equal_weights_are_accepted(loaded: LocalModel) -> None:
    again = load(FOLDER, device="cpu")
    assert again.fingerprint() == loaded.fingerprint()
    encoded = again.encode_image(IMAGE)
    assert loaded.encode_image(encoded) is encoded
    assert loaded.point(encoded, "dog", FEW) == loaded.point(IMAGE, "dog", FEW)


def test_encoded_images_of_another_process_are_accepted(loaded: LocalModel) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        encoded: EncodedImage = pickle.loads(pool.apply(encode_elsewhere, (FOLDER,)))
    assert encoded.fingerprint == loaded.fingerprint()
    assert loaded.point(encoded, "dog", FEW) == loaded.point(IMAGE, "dog", FEW)
    moved = np.full((40, 50, 3), 90, np.uint8)
    expected = loaded.point(moved, "dog", FEW)["points"]
    for got, wanted in zip(
        loaded.point(loaded.encode_image(moved, previous=encoded), "dog", FEW)["points"], expected, strict=True
    ):
        assert got == pytest.approx(wanted, abs=1e-4)


def test_encoded_images_of_other_weights_are_rejected(loaded: LocalModel) -> None:
    fine_tuned = copy.deepcopy(loaded.network)
    with torch.no_grad():
        fine_tuned.region.size_encoder.bias += 1e-3
    others = {
        "fine-tune": LocalModel(fine_tuned, loaded.tokenizer),
        "dtype": load(FOLDER, device="cpu", dtype="bfloat16"),
        "adapter": load(FOLDER, device="cpu", adapter=ADAPTER),
    }
    keys = {loaded.fingerprint(), *(other.fingerprint() for other in others.values())}
    assert len(keys) == 4
    for other in others.values():
        encoded = other.encode_image(IMAGE)
        (result,) = loaded.run([Point(encoded, "dog")])
        assert isinstance(result, ErrorResult)
        assert "encoded by another model" in str(result.error)
        with pytest.raises(ValueError, match=f"fingerprint '{other.fingerprint()}', not '{loaded.fingerprint()}'"):
            loaded.encode_image(encoded)
        with pytest.raises(ValueError, match="encoded by another model"):
            loaded.encode_image(IMAGE, previous=encoded)


def test_adapter_fingerprint_depends_on_content(loaded: LocalModel, tmp_path: Path) -> None:
    variant = tmp_path / "variant.pt"
    variant.write_bytes(ADAPTER.read_bytes())
    settings = {"variant": str(variant), "max_objects": 3}
    encoded = loaded.encode_image(IMAGE, settings)
    assert loaded.fingerprint(str(variant)) == load(FOLDER, device="cpu", adapter=ADAPTER).fingerprint()
    with pytest.raises(ValueError, match=r"with the adapter .*, not None"):
        loaded.encode_image(encoded)
    tensors = torch.load(variant, weights_only=True)
    torch.save({key: tensor * 2 for key, tensor in tensors.items()}, variant)
    other = load(FOLDER, device="cpu")
    with pytest.raises(ValueError, match="encoded by another model"):
        other.encode_image(encoded, settings)
    (result,) = other.run([Point(encoded, "dog", Settings.of(settings))])
    assert isinstance(result, ErrorResult)


def test_fingerprint_does_not_depend_on_the_device(loaded: LocalModel) -> None:
    assert fingerprint(copy.deepcopy(loaded.network), None) == loaded.fingerprint()
    if torch.cuda.is_available():
        assert fingerprint(copy.deepcopy(loaded.network).cuda(), None) == loaded.fingerprint()
