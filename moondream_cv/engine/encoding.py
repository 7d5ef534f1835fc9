"""Encoded images: what a request on an image starts from, as a value that the caller may keep.

Several frames are encoded together, and a frame of a clip with what stayed the same since the one before. Which images
are worth keeping is the business of `image_cache.py` and of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moondream_cv.engine.crops import Crops, cut_all, largest_differences, normalize
from moondream_cv.engine.prefix import Prefix, encode_prefix
from moondream_cv.engine.preprocessing import PreparedImage
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import LayerLora

TOKENS_PER_PASS = 12_000
"""Patches or positions that go through a transformer together.

It bounds the activations, the widest of which are those within an MLP: for full-size weights in float32 some 400 MB in
the vision encoder and 800 MB in the decoder. Those read 16 crops or 16 images at a time, so that one image's 13 crops
are one pass, and more would not make a GPU any busier; the tiny model reads 187 crops at a time.
"""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as the decoder sees it; usable in place of the image in every call of a model with the same weights.

    It can be pickled and used in another process.

    Attributes:
        size: (width, height) of the image in pixels.
        tiling: (rows, columns) of local crops.
        max_crops: Local crops at the most that it was encoded with.
        variant: The adapter that it was encoded with; None is the one that the model was loaded with.
        model_key: The fingerprint of the model and of the adapter.
        crops: [1 + rows · columns, crop_size, crop_size, 3] uint8 RGB: the global crop and the local ones row by row,
            as they were encoded.
        features: [1 + rows · columns, num_patches, enc_dim] what the vision encoder makes of each crop.
        embedding: [num_patches, dim] image tokens.
        prefix: The decoder's keys and values.
    """

    size: tuple[int, int]
    tiling: tuple[int, int]
    max_crops: int
    variant: str | None
    model_key: str
    crops: np.ndarray
    features: Tensor
    embedding: Tensor
    prefix: Prefix

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and arrays, wherever they lie."""
        return self.crops.nbytes + self.features.nbytes + self.embedding.nbytes + self.prefix.nbytes

    def check(self, model_key: str, max_crops: int | None, variant: str | None) -> None:
        """Refuse to be used by another model or with other settings than it was made with.

        Raises:
            ValueError: Names what differs.
        """
        if max_crops is not None and max_crops != self.max_crops:
            raise ValueError(
                f"this image was encoded with max_crops={self.max_crops}, not {max_crops}; encode it again"
            )
        if variant != self.variant:
            raise ValueError(
                f"this image was encoded with the adapter {self.variant!r}, not {variant!r}; encode it again"
            )
        if model_key != self.model_key:
            raise ValueError(
                f"this image was encoded by another model (other weights, dtype or adapter: fingerprint "
                f"{self.model_key!r}, not {model_key!r}); encode it with the model that gets the request"
            )


def encode_images(
    network: MoondreamNetwork,
    frames: Sequence[np.ndarray | PreparedImage],
    *,
    max_crops: int | None,
    variant: str | None,
    model_key: str,
    lora: Sequence[LayerLora] | None,
) -> list[EncodedImage]:
    """Cut, encode and prefill images of any sizes together.

    Args:
        frames: Each [H, W, 3] uint8 RGB, or an image that is cut already.
        max_crops: Local crops of an image at the most; None: as many as the model was trained with.
        variant: The name of `lora`, for `EncodedImage.check`.
        model_key: The fingerprint of the model and of `lora`, for `EncodedImage.check`.
        lora: The adapter.

    Returns:
        One per frame, in order; none holds on to the memory of another.

    Raises:
        ValueError: `max_crops` is not positive.
    """
    if not frames:
        return []
    limit = network.config.vision.max_crops if max_crops is None else max_crops
    cut = _cut(frames, network, limit)
    distinct = [crops.pixels[:1] if crops.tiling == (1, 1) else crops.pixels for crops in cut]
    tilings = [crops.tiling for crops in cut]
    with torch.inference_mode():
        encoded = _encode_crops(network, [pixels for image in distinct for pixels in image])
        split = encoded.split([len(image) for image in distinct])
        # A copy: a slice would keep the features of all frames alive.
        features = [f.expand(len(crops.pixels), -1, -1).clone() for f, crops in zip(split, cut, strict=True)]
        embeddings, prefixes = _read(network, features, tilings, lora)
    sizes = [f.size if isinstance(f, PreparedImage) else (f.shape[1], f.shape[0]) for f in frames]
    return [
        EncodedImage(size, crops.tiling, limit, variant, model_key, crops.pixels, *tensors)
        for size, crops, *tensors in zip(sizes, cut, features, embeddings, prefixes, strict=True)
    ]


def reencode(
    network: MoondreamNetwork,
    frame: np.ndarray,
    previous: EncodedImage,
    tolerance: float = 0.0,
    *,
    max_crops: int | None,
    variant: str | None,
    model_key: str,
    lora: Sequence[LayerLora] | None,
) -> EncodedImage:
    """Encode a frame of a clip, and of its crops only those that look different from what was encoded before.

    A crop that counts as unchanged keeps its features and also its old pixels: the next frame is compared with what the
    features were made of, so that slow drift adds up until it is noticed. A frame of another size is encoded in full.

    Args:
        frame: [H, W, 3] uint8 RGB.
        previous: An earlier frame, encoded by this model. Nothing in it is changed.
        tolerance: Grey levels of a crop's `largest_differences` that count as unchanged; a little above the standard
            deviation of the camera's noise is enough. 0: only crops that are equal to the last bit.
        max_crops: None: that of `previous`.
        variant: The name of `lora`.
        model_key: The fingerprint of the model and of `lora`.
        lora: The adapter that `variant` names.

    Returns:
        `previous` itself when all crops count as unchanged. With a tolerance of 0 the same as a full encode, up to the
        rounding of another batch size; otherwise the frame up to changes within the tolerance.

    Raises:
        ValueError: `previous` is another model's or was made with other settings, or `tolerance` is negative or not a
            number.
    """
    previous.check(model_key, max_crops, variant)
    if not tolerance >= 0:  # also true of NaN
        raise ValueError(f"tolerance must be 0 or more grey levels, not {tolerance}")
    if (frame.shape[1], frame.shape[0]) != previous.size:
        (encoded,) = encode_images(
            network, [frame], max_crops=previous.max_crops, variant=variant, model_key=model_key, lora=lora
        )
        return encoded
    (cut,) = cut_all([frame], network.config.vision, previous.max_crops, torch.get_num_threads())
    changed = _changed(cut.pixels, previous.crops, tolerance)
    if not changed.any():
        return previous
    crops = np.where(changed[:, None, None, None], cut.pixels, previous.crops)
    fresh = crops[:1] if cut.tiling == (1, 1) else crops[changed]
    with torch.inference_mode():
        features = previous.features.to(network.device, copy=True)
        features[torch.from_numpy(changed).to(features.device)] = _encode_crops(network, list(fresh))
        (embedding,), (prefix,) = _read(network, [features], [cut.tiling], lora)
    return EncodedImage(
        previous.size, cut.tiling, previous.max_crops, variant, model_key, crops, features, embedding, prefix
    )


def _cut(frames: Sequence[np.ndarray | PreparedImage], network: MoondreamNetwork, max_crops: int) -> list[Crops]:
    """The crops of each frame."""
    arrays = [frame for frame in frames if not isinstance(frame, PreparedImage)]
    fresh = iter(cut_all(arrays, network.config.vision, max_crops, torch.get_num_threads()))
    return [frame.crops(max_crops) if isinstance(frame, PreparedImage) else next(fresh) for frame in frames]


def _changed(pixels: np.ndarray, before: np.ndarray, tolerance: float) -> np.ndarray:
    """[N] booleans: which crops differ by more than the tolerance."""
    changed = np.array([not np.array_equal(new, old) for new, old in zip(pixels, before, strict=True)])
    if tolerance > 0 and changed.any():
        changed[changed] = largest_differences(pixels[changed], before[changed]) > tolerance
    return changed


def _encode_crops(network: MoondreamNetwork, crops: Sequence[np.ndarray]) -> Tensor:
    """[S, S, 3] uint8 crops → [N, num_patches, enc_dim] features."""
    features = []
    for part in _passes(len(crops), network.config.vision.num_patches):
        pixels = torch.from_numpy(np.stack(crops[part])).to(network.device)
        features.append(network.vision(normalize(pixels, network.dtype)))
    return features[0] if len(features) == 1 else torch.cat(features)


def _read(
    network: MoondreamNetwork,
    features: Sequence[Tensor],
    tilings: Sequence[tuple[int, int]],
    lora: Sequence[LayerLora] | None,
) -> tuple[list[Tensor], list[Prefix]]:
    """Join the features of each image's crops and let the decoder read them.

    Args:
        features: One [1 + rows · columns, num_patches, enc_dim] per image.
        tilings: (rows, columns) of each image.

    Returns:
        A [num_patches, dim] embedding and a prefix per image.
    """
    bos_id = torch.tensor([network.config.tokenizer.bos_id], device=network.device, dtype=torch.long)
    bos = network.text.embed(bos_id)  # [1, dim]
    embeddings: list[Tensor] = []
    prefixes: list[Prefix] = []
    for part in _passes(len(features), 1 + network.config.vision.num_patches):
        joined = network.vision.join(torch.cat(tuple(features[part])), tilings[part])  # [I, num_patches, dim]
        start = bos.expand(len(joined), 1, -1)
        prefixes += encode_prefix(network, torch.cat((start, joined), dim=1), lora)
        embeddings += [image.clone() for image in joined]
    return embeddings, prefixes


def _passes(count: int, tokens: int) -> Iterator[slice]:
    """Split `count` items of `tokens` tokens each into as few passes as fit, of about the same size."""
    passes = math.ceil(count / max(1, TOKENS_PER_PASS // tokens))
    size = math.ceil(count / passes)
    return (slice(start, start + size) for start in range(0, count, size))
