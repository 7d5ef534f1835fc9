"""Encoded images that a model keeps for when the same picture comes again.

It knows nothing of models: who asks computes what is missing and puts it in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from moondream_cv.engine.encoding import EncodedImage
from moondream_cv.engine.preprocessing import PreparedImage, digest_of

Coming = Future["EncodedImage | None"]


class ImageKey(NamedTuple):
    """What an encoded image depends on beside the model.

    Attributes:
        digest: Of the pixels and of their shape.
        max_crops: Local crops at the most.
        variant: The adapter's name.
    """

    digest: bytes
    max_crops: int
    variant: str | None


class ImageCache:
    """The images of one model that were used last, as many as fit.

    Calls from several threads are safe. Of threads that miss the same image at once one encodes it, and the others wait
    for that.

    Attributes:
        hits: How often an image was found.
        misses: How often it was not.
    """

    def __init__(self, max_images: int, max_bytes: int) -> None:
        """Make an empty cache.

        Args:
            max_images: How many images to keep at the most.
            max_bytes: What they may take together, `EncodedImage.nbytes` each. An image that takes more by itself is
                not kept.

        Raises:
            ValueError: A limit is below 1.
        """
        for name, value in (("max_images", max_images), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.max_images, self.max_bytes = max_images, max_bytes
        self._images: OrderedDict[ImageKey, EncodedImage] = OrderedDict()  # the one used last stands last
        self._nbytes = 0
        self.hits = self.misses = 0
        self._coming: dict[ImageKey, Coming] = {}  # being encoded
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ImageCache({len(self)} of {self.max_images} images, {self.nbytes:,} of {self.max_bytes:,} bytes)"

    def __len__(self) -> int:
        """Number of images that are kept."""
        return len(self._images)

    @property
    def nbytes(self) -> int:
        """Bytes that the kept images take."""
        return self._nbytes

    @staticmethod
    def key(image: np.ndarray | PreparedImage, max_crops: int, variant: str | None) -> ImageKey:
        """Name an image by its content.

        Args:
            image: [H, W, 3] uint8 RGB, or such an image prepared.
            max_crops: Local crops at the most that it is or would be encoded with.
            variant: The adapter that it is or would be encoded with.
        """
        digest = image.digest if isinstance(image, PreparedImage) else digest_of(image)
        return ImageKey(digest, max_crops, variant)

    def claim(self, key: ImageKey) -> tuple[EncodedImage | Coming, bool]:
        """Return what is kept under a key, or the promise of it, and whether the promise is the caller's to keep.

        A promise is a future that ends in the image, or in None if who made it gives up. Who has made one must `put`
        the image or `give_up` before waiting for those of others.
        """
        with self._lock:
            found = self._images.get(key) or self._coming.get(key)
            if found is None:
                self.misses += 1
                coming = self._coming[key] = Future()
                return coming, True
            self.hits += 1
            if key in self._images:
                self._images.move_to_end(key)
            return found, False

    def give_up(self, claims: Mapping[ImageKey, Coming]) -> None:
        """Let go of promises that were not kept; who waits for one may encode the image."""
        with self._lock:
            for key, coming in claims.items():
                if self._coming.get(key) is coming:
                    del self._coming[key]
                    coming.set_result(None)

    def put(self, key: ImageKey, encoded: EncodedImage) -> None:
        """Keep an image, in place of the one under this key and of those that were not used for longest.

        Args:
            key: Must be that of the very pixels that were encoded: not of a frame that `reencode` took for unchanged
                within a tolerance.
            encoded: The image.
        """
        with self._lock:
            self._remove(key)
            if encoded.nbytes <= self.max_bytes:
                self._images[key] = encoded
                self._nbytes += encoded.nbytes
            while len(self._images) > self.max_images or self._nbytes > self.max_bytes:
                self._remove(next(iter(self._images)))
            coming = self._coming.pop(key, None)
            if coming is not None:
                coming.set_result(encoded)

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self._images.clear()
            self._nbytes = 0

    def _remove(self, key: ImageKey) -> None:
        encoded = self._images.pop(key, None)
        if encoded is not None:
            self._nbytes -= encoded.nbytes
