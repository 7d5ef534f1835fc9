"""Image preprocessing without the network: reading, cutting into crops, and hashing.

For small models this is most of the work per image. It can run in any thread, for many images at once, while a single
thread runs the networks.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np

from moondream_cv.engine.crops import Crops, cut_crops
from moondream_cv.model.config import VisionConfig


class PreprocessedImage:
    """An image that is cut into crops. Every call of the model that created it accepts it in place of an image.

    `LocalModel.preprocess_image` creates it.

    Attributes:
        rgb: [H, W, 3] uint8 RGB; it must not change.
        size: (width, height) in pixels.
    """

    def __init__(self, rgb: np.ndarray, config: VisionConfig, max_crops: int) -> None:
        """Cut an image.

        Args:
            rgb: [H, W, 3] uint8 RGB.
            config: Sizes of the crops.
            max_crops: Maximum number of local crops that requests are expected to use. Crops for other values are cut
                on first use.

        Raises:
            ValueError: `max_crops` is not positive.
        """
        self.rgb, self.size = rgb, (rgb.shape[1], rgb.shape[0])
        self._config = config
        self._digest: bytes | None = None
        self._lock = threading.Lock()
        self._cut = {max_crops: cut_crops(rgb, config, max_crops)}
        self._max_crops = max_crops

    def __repr__(self) -> str:
        return f"PreprocessedImage({self.size[0]}x{self.size[1]})"

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return self.rgb.nbytes + sum(crops.pixels.nbytes for crops in list(self._cut.values()))

    @property
    def digest(self) -> bytes:
        """Digest of the pixels, computed on first use."""
        if self._digest is None:
            self._digest = digest_of(self.rgb)
        return self._digest

    @property
    def has_digest(self) -> bool:
        """Whether the digest has been computed."""
        return self._digest is not None

    def crops(self, max_crops: int) -> Crops:
        """Return the crops for a maximum number of local crops.

        Raises:
            ValueError: `max_crops` is not positive.
        """
        with self._lock:
            if max_crops not in self._cut:
                self._cut[max_crops] = cut_crops(self.rgb, self._config, max_crops)
            return self._cut[max_crops]

    def without_pixels(self, max_crops: int | None) -> PreprocessedImage:
        """Return a copy for another process, with crops and digest only; the image itself if it must cut other crops.

        Args:
            max_crops: Maximum number of local crops of the request; None: the value that the image was created with.
        """
        if max_crops not in (None, self._max_crops):
            return self
        light = object.__new__(PreprocessedImage)
        light.__dict__ = self.__dict__ | {"rgb": self.rgb[:0], "_digest": self.digest}
        light._cut = {self._max_crops: self._cut[self._max_crops]}
        return light

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}


def digest_of(rgb: np.ndarray) -> bytes:
    """Return a 32-byte digest of the content and shape of an [H, W, 3] uint8 array."""
    digest = hashlib.blake2b(repr(rgb.shape).encode(), digest_size=32)  # 2×3 and 3×2 pixels may have the same bytes
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.digest()
