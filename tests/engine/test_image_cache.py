"""The cache of encoded images. Run with `pytest tests/engine/test_image_cache.py`."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.engine import local_model
from moondream_cv.engine.image_cache import ImageCache, ImageKey
from moondream_cv.engine.image_encoding import EncodedImage, encode_images
from moondream_cv.engine.kv_cache import ImagePrefix
from moondream_cv.engine.local_model import LocalModel


def image_of(nbytes: int) -> EncodedImage:
    """Return an encoded image of a given size in bytes, at least 16."""
    word = torch.zeros(1, 1, 1, 1)
    return EncodedImage(
        size=(1, 1),
        tiling=(1, 1),
        max_crops=None,
        adapter_name=None,
        fingerprint="0",
        pixels=np.zeros(nbytes - 16, np.uint8),
        features=word,
        embedding=word,
        prefix=ImagePrefix(((word, word),)),
    )


def key_of(number: int) -> ImageKey:
    return ImageCache.key(np.full((1, 1, 3), number, np.uint8), None, None)


def lookup(cache: ImageCache, key: ImageKey) -> EncodedImage | None:
    """Look up an image, which counts as a hit or a miss."""
    found, is_owner = cache.get_or_start(key)
    if isinstance(found, EncodedImage):
        return found
    if is_owner:
        cache.abandon({key: found})
    return None


def test_put_image_is_returned_by_key(model: LocalModel, frame: np.ndarray) -> None:
    cache = ImageCache(4, 10_000_000)
    key = cache.key(frame, None, None)
    assert lookup(cache, key) is None
    (encoded,) = encode_images(model.network, [frame], max_crops=None, adapter_name=None, adapter=None, fingerprint="0")
    cache.put(key, encoded)
    assert lookup(cache, cache.key(frame.copy(), None, None)) is encoded
    assert (len(cache), cache.nbytes) == (1, encoded.nbytes)
    assert repr(cache) == f"ImageCache(1 of 4 images, {encoded.nbytes:,} of 10,000,000 bytes)"
    assert (cache.hits, cache.misses) == (1, 1)
    cache.clear()
    assert (len(cache), cache.nbytes, lookup(cache, key)) == (0, 0, None)
    assert (cache.hits, cache.misses) == (1, 2)


def test_keys_depend_on_content_shape_and_settings() -> None:
    rgb = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    other = rgb.copy()
    other[2, 3, 2] += 1
    keys = [
        ImageCache.key(*arguments)
        for arguments in (
            (rgb, None, None),
            (other, None, None),
            (rgb.reshape(4, 3, 3), None, None),
            (rgb.reshape(2, 6, 3), None, None),
            (rgb, 4, None),
            (rgb, None, "adapter"),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_view_and_copy_have_the_same_key() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    assert ImageCache.key(wide[::2, ::-1], 2, "a") == ImageCache.key(wide[::2, ::-1].copy(), 2, "a")


def test_least_recently_used_image_is_evicted() -> None:
    cache = ImageCache(2, 1000)
    cache.put(key_of(1), image_of(100))
    cache.put(key_of(2), image_of(100))
    assert lookup(cache, key_of(1)) is not None  # now image 2 is the least recently used one
    cache.put(key_of(3), image_of(100))
    assert [lookup(cache, key_of(i)) is not None for i in (1, 2, 3)] == [True, False, True]


def test_large_image_evicts_several() -> None:
    cache = ImageCache(10, 1000)
    for number in range(5):
        cache.put(key_of(number), image_of(200))
    cache.put(key_of(5), image_of(500))
    assert [lookup(cache, key_of(i)) is not None for i in range(6)] == [False, False, False, True, True, True]
    assert cache.nbytes == 900


def test_image_above_max_bytes_is_not_cached() -> None:
    cache = ImageCache(10, 1000)
    cache.put(key_of(1), image_of(1000))
    cache.put(key_of(2), image_of(1001))
    assert lookup(cache, key_of(1)) is not None
    assert lookup(cache, key_of(2)) is None


def test_put_replaces_an_existing_key() -> None:
    cache = ImageCache(2, 1000)
    cache.put(key_of(1), image_of(700))
    second = image_of(600)
    cache.put(key_of(1), second)
    assert lookup(cache, key_of(1)) is second
    assert (len(cache), cache.nbytes) == (1, 600)
    cache.put(key_of(1), image_of(2000))
    assert (len(cache), cache.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("max_images", "max_bytes", "message"),
    [(0, 1, "max_images must be at least 1, got 0"), (1, -5, "max_bytes must be at least 1, got -5")],
)
def test_limits_below_one_raise(max_images: int, max_bytes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageCache(max_images, max_bytes)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["get", "put", "clear"]), st.integers(0, 7), st.integers(16, 120)), max_size=60
    ),
    max_images=st.integers(1, 5),
    max_bytes=st.integers(1, 300),
)
def test_cache_equals_a_reference_implementation(
    steps: list[tuple[str, int, int]], max_images: int, max_bytes: int
) -> None:
    cache = ImageCache(max_images, max_bytes)
    expected: OrderedDict[int, int] = OrderedDict()  # number → bytes
    for step, number, nbytes in steps:
        if step == "clear":
            cache.clear()
            expected.clear()
        elif step == "put":
            cache.put(key_of(number), image_of(nbytes))
            expected.pop(number, None)
            if nbytes <= max_bytes:
                expected[number] = nbytes
            while len(expected) > max_images or sum(expected.values()) > max_bytes:
                expected.popitem(last=False)
        else:
            found = lookup(cache, key_of(number))
            assert (None if found is None else found.nbytes) == expected.get(number)
            if number in expected:
                expected.move_to_end(number)
        assert (len(cache), cache.nbytes) == (len(expected), sum(expected.values()))


def test_concurrent_access_keeps_the_cache_consistent(request: pytest.FixtureRequest) -> None:
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)  # otherwise threads are hardly ever interrupted within a put
    cache = ImageCache(5, 1000)
    keys, images = [key_of(i) for i in range(12)], [image_of(100 + 20 * i) for i in range(12)]
    errors: list[Exception] = []
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        start.wait()
        rng = np.random.default_rng(seed)
        try:
            for number, get in zip(rng.integers(0, 12, 5000).tolist(), (rng.random(5000) < 0.3).tolist(), strict=True):
                if get:
                    assert lookup(cache, keys[number]) in (None, images[number])
                else:
                    cache.put(keys[number], images[number])
        except Exception as error:  # would otherwise end only the thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    left = [image for key in keys if (image := lookup(cache, key)) is not None]
    assert len(left) == len(cache) <= 5
    assert sum(image.nbytes for image in left) == cache.nbytes <= 1000


def test_second_lookup_gets_the_in_flight_entry() -> None:
    cache, key, image = ImageCache(4, 10_000), key_of(1), image_of(100)
    entry, is_owner = cache.get_or_start(key)
    assert isinstance(entry, Future)
    assert is_owner
    assert cache.get_or_start(key) == (entry, False)
    assert not entry.done()
    cache.put(key, image)
    assert entry.result(0) is image
    assert cache.get_or_start(key) == (image, False)
    assert (cache.hits, cache.misses) == (2, 1)


def test_image_too_large_to_cache_resolves_the_in_flight_entry() -> None:
    cache, key, image = ImageCache(4, 50), key_of(1), image_of(100)
    entry, _ = cache.get_or_start(key)
    cache.put(key, image)
    assert isinstance(entry, Future)
    assert entry.result(0) is image
    assert cache.get_or_start(key)[1]


def test_abandoned_entry_resolves_to_none_and_can_be_restarted() -> None:
    cache, key = ImageCache(4, 10_000), key_of(1)
    entry, _ = cache.get_or_start(key)
    assert isinstance(entry, Future)
    cache.abandon({key: entry})
    assert entry.result(0) is None
    again, is_owner = cache.get_or_start(key)
    assert again is not entry
    assert is_owner


def test_abandon_does_not_affect_a_newer_entry_of_another_owner() -> None:
    """The image is stored, evicted and started by another thread before the first owner abandons its entry."""
    cache, key = ImageCache(1, 10_000), key_of(1)
    first, _ = cache.get_or_start(key)
    cache.put(key, image_of(100))
    cache.put(key_of(2), image_of(100))
    second, is_owner = cache.get_or_start(key)
    assert is_owner
    assert isinstance(first, Future)
    assert isinstance(second, Future)
    cache.abandon({key: first})
    assert not second.done()
    assert cache.get_or_start(key) == (second, False)


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_concurrent_misses_encode_an_image_once(
    model: LocalModel, frame: np.ndarray, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = 8
    together, calls = threading.Barrier(threads), itertools.count(1)

    def encode(network: Any, frames: list[np.ndarray], **options: Any) -> list[EncodedImage]:
        if frames:
            number = next(calls)
            time.sleep(0.02)  # other threads arrive meanwhile
            if number <= failures:
                raise MemoryError("none left")
        return encode_images(network, frames, **options)

    def call(_: int) -> EncodedImage | None:
        together.wait(240)
        try:
            return model.encode_arrays([frame, frame], None, None)[1]
        except MemoryError:
            return None

    monkeypatch.setattr(model, "image_cache", ImageCache(4, 10_000_000))
    monkeypatch.setattr(local_model, "encode_images", encode)
    with ThreadPoolExecutor(threads) as pool:
        given = list(pool.map(call, range(threads)))
    assert given.count(None) == failures
    assert len({id(one) for one in given if one is not None}) == 1
    assert next(calls) == failures + 2
