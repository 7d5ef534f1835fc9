"""Encoded images: what a request on an image starts from, as a value that the caller may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moondream_cv.engine.crops import cut_crops, normalize
from moondream_cv.engine.state import Prefix, encode_prefix
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import LayerLora


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as the decoder sees it; usable in place of the image in every call of the model that made it.

    Attributes:
        size: (width, height) of the image in pixels.
        tiling: (rows, columns) of local crops.
        max_crops: The setting that it was encoded with.
        variant: The adapter that it was encoded with; None is the one that the model was loaded with.
        model_key: Identifies the model.
        embedding: [num_patches, dim] image tokens.
        prefix: The decoder's keys and values.
    """

    size: tuple[int, int]
    tiling: tuple[int, int]
    max_crops: int | None
    variant: str | None
    model_key: int
    embedding: torch.Tensor
    prefix: Prefix

    def check(self, model_key: int, max_crops: int | None, variant: str | None) -> None:
        """Refuse to be used by another model or with other settings than it was made with.

        Raises:
            ValueError: Names what differs.
        """
        if model_key != self.model_key:
            raise ValueError("this image was encoded by another model; encode it with the model that is asked")
        if max_crops is not None and max_crops != self.max_crops:
            raise ValueError(
                f"this image was encoded with max_crops={self.max_crops}, not {max_crops}; encode it again"
            )
        if variant != self.variant:
            raise ValueError(
                f"this image was encoded with the adapter {self.variant!r}, not {variant!r}; encode it again"
            )


def encode_pixels(
    network: MoondreamNetwork,
    rgb: np.ndarray,
    *,
    max_crops: int | None,
    variant: str | None,
    model_key: int,
    lora: Sequence[LayerLora] | None,
) -> EncodedImage:
    """Cut, encode and prefill an image.

    Args:
        rgb: [H, W, 3] uint8 RGB.
    """
    crops = cut_crops(rgb, network.config.vision, max_crops)
    bos = torch.tensor([[network.config.tokenizer.bos_id]], device=network.device)
    with torch.inference_mode():
        pixels = normalize(torch.from_numpy(crops.pixels).to(network.device), network.dtype)
        embedding = network.vision.join(network.vision(pixels), [crops.tiling])  # [1, P, dim]
        prefix = encode_prefix(network, torch.cat((network.text.embed(bos), embedding), dim=1), lora)
    size = (rgb.shape[1], rgb.shape[0])
    return EncodedImage(size, crops.tiling, max_crops, variant, model_key, embedding[0], prefix)
