"""Cache of encoded images, by the content of their pixels.

The cache does not run models: callers encode missing images and store them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.preprocessing import PreprocessedImage, digest_of

InFlight = Future["EncodedImage | None"]
"""Entry of an image that a thread is encoding; it resolves to None if that thread gives up."""


class ImageKey(NamedTuple):
    """Key of an encoded image within one model.

    Attributes:
        digest: Digest of the pixels and their shape.
        max_crops: Maximum number of local crops.
        adapter_name: Name of the adapter.
    """

    digest: bytes
    max_crops: int
    adapter_name: str | None


class ImageCache:
    """Least-recently-used cache of the encoded images of one model. Safe for use from several threads.

    If several threads miss the same image at the same time, one of them encodes it and the others wait for it.

    Attributes:
        max_images: Maximum number of images.
        max_bytes: Maximum total size of the images in bytes.
        hits: Number of lookups that found an image, in the cache or in flight.
        misses: Number of lookups that did not.
    """

    def __init__(self, max_images: int, max_bytes: int) -> None:
        """Create an empty cache.

        Args:
            max_images: Maximum number of images.
            max_bytes: Maximum total size in bytes, by `EncodedImage.nbytes`. A larger image is not stored.

        Raises:
            ValueError: A limit is below 1.
        """
        for name, value in (("max_images", max_images), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_images, self.max_bytes = max_images, max_bytes
        self._images: OrderedDict[ImageKey, EncodedImage] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self.hits = self.misses = 0
        self._in_flight: dict[ImageKey, InFlight] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ImageCache({len(self)} of {self.max_images} images, {self.nbytes:,} of {self.max_bytes:,} bytes)"

    def __len__(self) -> int:
        """Number of cached images."""
        return len(self._images)

    @property
    def nbytes(self) -> int:
        """Total size of the cached images in bytes."""
        return self._nbytes

    @staticmethod
    def key(image: np.ndarray | PreprocessedImage, max_crops: int, adapter_name: str | None) -> ImageKey:
        """Return the key of an image.

        Args:
            image: [H, W, 3] uint8 RGB, or preprocessed.
            max_crops: Maximum number of local crops that the image is encoded with.
            adapter_name: Name of the adapter that the image is encoded with.
        """
        digest = image.digest if isinstance(image, PreprocessedImage) else digest_of(image)
        return ImageKey(digest, max_crops, adapter_name)

    def get_or_start(self, key: ImageKey) -> tuple[EncodedImage | InFlight, bool]:
        """Look up an image; on a miss, start an in-flight entry that the caller owns.

        The owner must `put` the image or `abandon` the entry before it waits for entries of other threads.

        Returns:
            The image or its in-flight entry, and whether the caller owns the entry.
        """
        with self._lock:
            found = self._images.get(key) or self._in_flight.get(key)
            if found is None:
                self.misses += 1
                entry = self._in_flight[key] = Future()
                return entry, True
            self.hits += 1
            if key in self._images:
                self._images.move_to_end(key)
            return found, False

    def abandon(self, entries: Mapping[ImageKey, InFlight]) -> None:
        """Resolve in-flight entries to None unless their images have been stored, so that waiting threads can encode.

        Args:
            entries: In-flight entries that the caller owns, by key.
        """
        with self._lock:
            for key, entry in entries.items():
                if self._in_flight.get(key) is entry:
                    del self._in_flight[key]
                    entry.set_result(None)

    def put(self, key: ImageKey, encoded: EncodedImage) -> None:
        """Store an image, evict the least recently used ones beyond the limits, and resolve the in-flight entry.

        Args:
            key: Key of exactly the pixels that were encoded; not of a frame that `reencode` treated as unchanged within
                a tolerance.
            encoded: Encoded image.
        """
        with self._lock:
            self._remove(key)
            if encoded.nbytes <= self.max_bytes:
                self._images[key] = encoded
                self._nbytes += encoded.nbytes
            while len(self._images) > self.max_images or self._nbytes > self.max_bytes:
                self._remove(next(iter(self._images)))
            entry = self._in_flight.pop(key, None)
            if entry is not None:
                entry.set_result(encoded)

    def clear(self) -> None:
        """Drop all cached images."""
        with self._lock:
            self._images.clear()
            self._nbytes = 0

    def _remove(self, key: ImageKey) -> None:
        encoded = self._images.pop(key, None)
        if encoded is not None:
            self._nbytes -= encoded.nbytes
