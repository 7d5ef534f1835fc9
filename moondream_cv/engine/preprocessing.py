"""Images of which everything is done that takes no network: read, cut into crops, and named by their content.

That is most of the time that an image takes a small model, and can be done in any thread, for many images at once,
while a single thread runs the networks.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np

from moondream_cv.engine.crops import Crops, cut_crops
from moondream_cv.model.config import VisionConfig


class PreparedImage:
    """An image, usable in place of it in every call of the model that made it; `LocalModel.prepare_image` does.

    Attributes:
        rgb: [H, W, 3] uint8 RGB; it must not change.
        size: (width, height) in pixels.
    """

    def __init__(self, rgb: np.ndarray, config: VisionConfig, max_crops: int) -> None:
        """Cut an image.

        Args:
            rgb: [H, W, 3] uint8 RGB.
            config: Sizes of a crop.
            max_crops: Local crops at the most that requests will ask for; others are made when they do.

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
        return f"PreparedImage({self.size[0]}x{self.size[1]})"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.rgb.nbytes + sum(crops.pixels.nbytes for crops in list(self._cut.values()))

    @property
    def digest(self) -> bytes:
        """Of the pixels; made when it is first asked for."""
        if self._digest is None:
            self._digest = digest_of(self.rgb)
        return self._digest

    @property
    def has_digest(self) -> bool:
        return self._digest is not None

    def crops(self, max_crops: int) -> Crops:
        """The crops with at most so many local ones.

        Raises:
            ValueError: `max_crops` is not positive.
        """
        with self._lock:
            if max_crops not in self._cut:
                self._cut[max_crops] = cut_crops(self.rgb, self._config, max_crops)
            return self._cut[max_crops]

    def without_pixels(self, max_crops: int | None) -> PreparedImage:
        """What of it goes to another process: the crops that are needed there; itself where it has to cut others.

        Args:
            max_crops: Local crops at the most that a request asks for; None: those that it was made with.
        """
        if max_crops not in (None, self._max_crops):
            return self
        light = object.__new__(PreparedImage)
        light.__dict__ = self.__dict__ | {"rgb": self.rgb[:0], "_digest": self.digest}
        light._cut = {self._max_crops: self._cut[self._max_crops]}
        return light

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}


def digest_of(rgb: np.ndarray) -> bytes:
    """32 bytes that name the content of an array [H, W, 3] uint8."""
    digest = hashlib.blake2b(repr(rgb.shape).encode(), digest_size=32)  # 2×3 and 3×2 pixels may be the same bytes
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.digest()
