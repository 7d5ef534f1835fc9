"""Preprocessed images. Run with `pytest tests/engine/test_preprocessing.py`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector
from moondream_cv.engine.crops import cut_crops
from moondream_cv.engine.image_cache import ImageCache
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import ImageError
from moondream_cv.requests import Caption, Detect, Query, Settings
from tests.helpers.batch_invariance import assert_same
from tests.helpers.models import random_model

SHORT = Settings(temperature=0, max_tokens=6, max_objects=2)


@pytest.mark.parametrize("max_crops", [None, 1, 2])
def test_preprocessed_image_gives_the_replies_of_its_image(
    model: LocalModel, frame: np.ndarray, max_crops: int | None
) -> None:
    settings = Settings(temperature=0, max_tokens=6, max_objects=2, max_crops=max_crops)
    preprocessed = model.preprocess_image(frame)  # crops for other values are cut on first use
    for ask in (Detect, lambda i, s: Caption(i, "short", s), lambda i, s: Query(i, "What?", settings=s)):
        request = ask(frame, "dog", settings) if ask is Detect else ask(frame, settings)
        same = ask(preprocessed, "dog", settings) if ask is Detect else ask(preprocessed, settings)
        assert_same(model, request, model.run([request])[0], model.run([same])[0])


def test_crops_equal_those_of_the_encoder(model: LocalModel, frame: np.ndarray) -> None:
    preprocessed = model.preprocess_image(frame, {"max_crops": 2})
    rgb = np.ascontiguousarray(frame[..., ::-1])
    for max_crops in (2, 4):
        expected = cut_crops(rgb, model.config.vision, max_crops)
        assert preprocessed.crops(max_crops).tiling == expected.tiling
        assert np.array_equal(preprocessed.crops(max_crops).pixels, expected.pixels)
    assert preprocessed.size == (320, 240)
    assert preprocessed.nbytes > rgb.nbytes
    assert repr(preprocessed) == "PreprocessedImage(320x240)"
    assert model.preprocess_image(preprocessed) is preprocessed


def test_preprocessed_image_is_accepted_in_place_of_an_image(model: LocalModel, frame: np.ndarray) -> None:
    preprocessed = model.preprocess_image(frame)
    assert model.encode_image(preprocessed).size == (320, 240)
    encoded = model.encode_image(frame)
    assert model.encode_image(preprocessed, previous=encoded) is encoded
    detector = Detector(model, max_objects=2)
    assert np.array_equal(detector(preprocessed, "dog").xyxy, detector(frame, "dog").xyxy)


def test_preprocessed_image_hits_the_cache_of_equal_arrays(frame: np.ndarray) -> None:
    model = random_model()
    model.image_cache = ImageCache(4, 1 << 30)
    model.run([Detect(frame, "dog", SHORT)])
    model.run([Detect(model.preprocess_image(frame.copy()), "dog", SHORT)])
    assert (model.image_cache.hits, model.image_cache.misses) == (1, 1)


def test_source_array_may_change_after_preprocessing(model: LocalModel, frame: np.ndarray) -> None:
    changing = frame.copy()
    preprocessed = model.preprocess_image(changing)
    changing[:] = 0
    request = Detect(frame, "dog", SHORT)
    assert_same(model, request, model.run([request])[0], model.run([Detect(preprocessed, "dog", SHORT)])[0])


def test_preprocess_image_is_thread_safe(model: LocalModel) -> None:
    images = [Image.new("RGB", (50 + 30 * i, 90), (i, 2 * i, 255 - i)) for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        preprocessed = list(pool.map(model.preprocess_image, images))
        assert [one.size for one in preprocessed] == [image.size for image in images]
        tilings = list(pool.map(lambda one: one.crops(1).tiling, preprocessed * 3))
    assert set(tilings) == {(1, 1)}


def test_invalid_image_or_settings_raise(model: LocalModel) -> None:
    with pytest.raises(ImageError):
        model.preprocess_image(b"junk")
    with pytest.raises(ValueError, match="max_crops"):
        model.preprocess_image(np.zeros((4, 4, 3), np.uint8), {"max_crops": 0})
