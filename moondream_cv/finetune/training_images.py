"""Images of training requests: their pixels, digests and tokens."""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from moondream_cv.engine.image_encoding import EncodedImage
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.preprocessing import PreprocessedImage, digest_of
from moondream_cv.errors import ImageError
from moondream_cv.images import to_rgb

IMAGES_PER_PASS = 4  # images that are encoded together; their prefixes take 0.6 GB at full size
MAX_IMAGES = 512  # images whose tokens are in memory; 3 MB each at full size


@dataclass(frozen=True)
class TrainingImage:
    """An image of a request.

    Attributes:
        digest: Digest of the pixels and their shape, or of the tokens of an encoded image.
        size: (width, height) in pixels.
        source: [H, W, 3] uint8 RGB, or an encoded image.
    """

    digest: bytes
    size: tuple[int, int]
    source: np.ndarray | EncodedImage


class ImageTokens:
    """Tokens of the images that were used last. They do not depend on the adapter. Not thread-safe."""

    def __init__(self, model: LocalModel) -> None:
        """Create an empty cache.

        Args:
            model: Model that encodes the images.
        """
        self._model = model
        self._tokens: OrderedDict[bytes, Tensor] = OrderedDict()

    def clear(self) -> None:
        """Free the tokens."""
        self._tokens.clear()

    def get(self, images: Sequence[TrainingImage | None]) -> list[Tensor | None]:
        """Return the [num_patches, dim] tokens of each image; None for None.

        Args:
            images: Images; equal ones are encoded once.
        """
        found: dict[bytes, Tensor] = {}
        # Collect the images that are not in memory
        missing: dict[bytes, np.ndarray] = {}
        for image in images:
            if image is None or image.digest in found:
                continue
            if isinstance(image.source, EncodedImage):
                found[image.digest] = image.source.embedding.to(self._model.device)
            elif image.digest in self._tokens:
                self._tokens.move_to_end(image.digest)
                found[image.digest] = self._tokens[image.digest]
            else:
                missing[image.digest] = image.source

        # Encode them
        for start in range(0, len(missing), IMAGES_PER_PASS):
            digests = list(missing)[start : start + IMAGES_PER_PASS]
            encoded = self._model.encode_arrays([missing[digest] for digest in digests], None, None)
            found.update({digest: one.embedding for digest, one in zip(digests, encoded, strict=True)})
        self._tokens.update({digest: found[digest] for digest in missing})
        while len(self._tokens) > MAX_IMAGES:
            self._tokens.popitem(last=False)
        return [None if image is None else found[image.digest] for image in images]


def read_image(image: Any) -> TrainingImage | None:
    """Read an image of a request; None without an image.

    Args:
        image: Any image that `moondream_cv.images.to_rgb` accepts, a preprocessed or encoded one, or an object or a
            dict with the data URI `image_url`, as in the hosted client.

    Raises:
        ImageError: The image cannot be read.
    """
    if image is None:
        return None
    if isinstance(image, EncodedImage):
        content = image.embedding.float().cpu().numpy()
        return TrainingImage(hashlib.blake2b(content.tobytes(), digest_size=32).digest(), image.size, image)
    url = image.get("image_url") if isinstance(image, Mapping) else getattr(image, "image_url", None)
    if isinstance(url, str):
        image = _decode_data_uri(url)
    rgb = image.rgb if isinstance(image, PreprocessedImage) else to_rgb(image)
    return TrainingImage(digest_of(rgb), (rgb.shape[1], rgb.shape[0]), rgb)


def _decode_data_uri(url: str) -> bytes:
    head, _, content = url.partition(",")
    try:
        if not head.startswith("data:") or not head.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise ImageError(f"image_url must be a data URI, got {url[:60]!r}: {error}") from error
