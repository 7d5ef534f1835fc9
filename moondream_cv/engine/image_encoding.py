"""Image encoding: from frames to `EncodedImage`s, which the caller can keep and reuse.

Several frames are encoded together. `reencode` encodes only those crops of a frame that differ from an earlier frame.
`image_cache.py` caches encoded images by content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moondream_cv._deprecation import renamed_attribute
from moondream_cv.engine.crops import cut_all, largest_differences, normalize
from moondream_cv.engine.gpu_preprocessing import cut_crops_on_device
from moondream_cv.engine.kv_cache import ImagePrefix, prefill_images
from moondream_cv.engine.preprocessing import PreprocessedImage
from moondream_cv.engine.prompts import Prompt, embed_prompts
from moondream_cv.engine.transfers import integers, upload
from moondream_cv.model.adapters import Adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import prefix_mask
from moondream_cv.progress import Operation

TOKENS_PER_PASS = 12_000
"""Maximum number of patches or positions in one pass through a transformer.

It limits the memory for activations, the largest of which are those of an MLP: for full-size weights in float32 about
400 MB in the vision encoder and 800 MB in the decoder. These process 16 crops or 16 images per pass, so the 13 crops of
one image fit into one pass, and larger passes would not use a GPU any better. The tiny model processes 187 crops per
pass.
"""
TOKENS_PER_CPU_PASS = 3_000
"""The same on a CPU: 4 crops or 4 images. Activations stay in the CPU's cache, and Ctrl-C, which Python handles between
operators, ends within a second."""
CUTTING_DEVICES = ("cuda",)  # devices that cut images themselves; for others, Pillow does it on the host


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image with its KV cache prefix. Every call of a model with the same weights accepts it in place of an image.

    It can be pickled and used in another process.

    Attributes:
        size: (width, height) of the image in pixels.
        tiling: (rows, columns) of local crops.
        max_crops: Maximum number of local crops that it was encoded with.
        adapter_name: Adapter that it was encoded with; None: the one that the model was loaded with.
        fingerprint: Fingerprint of the model with the adapter.
        pixels: Crops as encoded, on the device that cut them: an array, or a tensor on a CUDA device.
        features: [1 + rows · columns, num_patches, enc_dim] output of the vision encoder for each crop.
        embedding: [num_patches, dim] image tokens.
        prefix: Keys and values of the image tokens in the decoder.
    """

    size: tuple[int, int]
    tiling: tuple[int, int]
    max_crops: int
    adapter_name: str | None
    fingerprint: str
    pixels: np.ndarray | Tensor
    features: Tensor
    embedding: Tensor
    prefix: ImagePrefix

    variant = renamed_attribute("EncodedImage.variant", "adapter_name")

    @property
    def crops(self) -> np.ndarray:
        """[1 + rows · columns, crop_size, crop_size, 3] uint8 RGB: the global crop, then the local ones row by row."""
        return _on_host(self.pixels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pixels": self.crops}

    @property
    def nbytes(self) -> int:
        """Size of all tensors and arrays in bytes, on any device."""
        return self.pixels.nbytes + self.features.nbytes + self.embedding.nbytes + self.prefix.nbytes

    def check(self, fingerprint: str, max_crops: int | None, adapter_name: str | None) -> None:
        """Check that the image was encoded by a certain model with certain settings.

        Args:
            fingerprint: Fingerprint of the model with the adapter.
            max_crops: Maximum number of local crops; None: any.
            adapter_name: Name of the adapter.

        Raises:
            ValueError: The model or a setting differs; the message names it.
        """
        if max_crops is not None and max_crops != self.max_crops:
            raise ValueError(
                f"this image was encoded with max_crops={self.max_crops}, not {max_crops}; encode it again"
            )
        if adapter_name != self.adapter_name:
            raise ValueError(
                f"this image was encoded with the adapter {self.adapter_name!r}, not {adapter_name!r}; encode it again"
            )
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"this image was encoded by another model (other weights, dtype or adapter: fingerprint "
                f"{self.fingerprint!r}, not {fingerprint!r}); encode it with the model that gets the request"
            )


def encode_images(
    network: MoondreamNetwork,
    frames: Sequence[np.ndarray | PreprocessedImage],
    *,
    max_crops: int | None,
    adapter_name: str | None,
    adapter: Adapter | None,
    fingerprint: str,
    operation: Operation | None = None,
) -> list[EncodedImage]:
    """Cut, encode and prefill images of any sizes together.

    Args:
        network: Network of the model.
        frames: Each [H, W, 3] uint8 RGB, or preprocessed.
        max_crops: Maximum number of local crops of an image; None: the number the model was trained with.
        adapter_name: Name of the adapter, for `EncodedImage.check`.
        adapter: Adapter; None: no adapter.
        fingerprint: Fingerprint of the model with the adapter, for `EncodedImage.check`.
        operation: Receives the progress.

    Returns:
        One encoded image per frame, in order. They share no memory.

    Raises:
        ValueError: `max_crops` is not positive.
    """
    if not frames:
        return []
    # Cut the frames into crops
    limit = network.config.vision.max_crops if max_crops is None else max_crops
    cut = _cut(frames, network, limit)
    distinct = [pixels[:1] if tiling == (1, 1) else pixels for pixels, tiling in cut]
    tilings = [tiling for _, tiling in cut]

    # Encode the crops and prefill the decoder
    with torch.inference_mode():
        images = "image" if len(frames) == 1 else f"{len(frames)} images"
        encoded = _encode_crops(network, [pixels for image in distinct for pixels in image], operation, images)
        split = encoded.split([len(image) for image in distinct])
        # A copy: a slice would keep the features of all frames alive.
        features = [f.expand(len(pixels), -1, -1).clone() for f, (pixels, _) in zip(split, cut, strict=True)]
        embeddings, prefixes = _prefill(network, features, tilings, adapter, operation, images)

    sizes = [f.size if isinstance(f, PreprocessedImage) else (f.shape[1], f.shape[0]) for f in frames]
    return [
        EncodedImage(size, tiling, limit, adapter_name, fingerprint, pixels, *tensors)
        for size, (pixels, tiling), *tensors in zip(sizes, cut, features, embeddings, prefixes, strict=True)
    ]


def reencode(
    network: MoondreamNetwork,
    frame: np.ndarray,
    previous: EncodedImage,
    tolerance: float = 0.0,
    *,
    max_crops: int | None,
    adapter_name: str | None,
    adapter: Adapter | None,
    fingerprint: str,
    operation: Operation | None = None,
) -> EncodedImage:
    """Encode a video frame, running the vision encoder only on crops that differ from an earlier frame.

    An unchanged crop keeps its features and its old pixels. The next frame is compared with the pixels that the
    features were computed from, so slow drift accumulates until it exceeds the tolerance. A frame of another size is
    encoded completely.

    Args:
        network: Network of the model.
        frame: [H, W, 3] uint8 RGB.
        previous: An earlier frame, encoded by the same model. It is not modified.
        tolerance: Maximum of a crop's `largest_differences`, in gray levels, for the crop to count as unchanged; use
            slightly more than the standard deviation of the camera's noise. 0: only identical crops are unchanged.
        max_crops: Maximum number of local crops; None: that of `previous`.
        adapter_name: Name of the adapter.
        adapter: Adapter; None: no adapter.
        fingerprint: Fingerprint of the model with the adapter.
        operation: Receives the progress.

    Returns:
        `previous` itself if all crops are unchanged. With a tolerance of 0, the result equals that of `encode_images`
        up to rounding in a batch of another size. Otherwise it differs by changes within the tolerance.

    Raises:
        ValueError: `previous` was encoded by another model or with other settings, or `tolerance` is negative or NaN.
    """
    # Check the arguments
    previous.check(fingerprint, max_crops, adapter_name)
    if not tolerance >= 0:  # also true of NaN
        raise ValueError(f"tolerance must be 0 or more gray levels, got {tolerance}")
    if (frame.shape[1], frame.shape[0]) != previous.size:
        (encoded,) = encode_images(
            network,
            [frame],
            max_crops=previous.max_crops,
            adapter_name=adapter_name,
            adapter=adapter,
            fingerprint=fingerprint,
            operation=operation,
        )
        return encoded

    # Find the changed crops
    ((pixels, tiling),) = _cut([frame], network, previous.max_crops)
    new, old = _on_host(pixels), previous.crops
    changed = _changed(new, old, tolerance)
    if not changed.any():
        return previous
    crops = np.where(changed[:, None, None, None], new, old)
    new_crops = crops[:1] if tiling == (1, 1) else crops[changed]

    # Encode them and prefill the decoder
    with torch.inference_mode():
        features = previous.features.to(network.device, copy=True)
        features[torch.from_numpy(changed).to(features.device)] = _encode_crops(
            network, list(new_crops), operation, "image"
        )
        (embedding,), (prefix,) = _prefill(network, [features], [tiling], adapter, operation, "image")
    return EncodedImage(
        previous.size, tiling, previous.max_crops, adapter_name, fingerprint, crops, features, embedding, prefix
    )


@torch.inference_mode()
def encode_tokens(
    network: MoondreamNetwork,
    embedding: Tensor,
    size: tuple[int, int],
    *,
    adapter_name: str | None,
    adapter: Adapter | None,
    fingerprint: str,
) -> EncodedImage:
    """Prefill the decoder with image tokens that were encoded before, for example for another adapter.

    Args:
        network: Network of the model.
        embedding: [num_patches, dim] image tokens, which do not depend on the adapter.
        size: (width, height) of the image in pixels.
        adapter_name: Name of the adapter.
        adapter: Adapter; None: no adapter.
        fingerprint: Fingerprint of the model with the adapter.

    Returns:
        An encoded image without crops, so it cannot be `previous` of `reencode`.
    """
    bos_id = torch.tensor([network.config.tokenizer.bos_id], device=network.device, dtype=torch.long)
    (prefix,) = prefill_images(network, torch.cat((network.text.embed(bos_id), embedding))[None], adapter)
    max_crops, nothing = network.config.vision.max_crops, embedding[:0]
    pixels = np.empty((0, 0, 0, 3), np.uint8)
    return EncodedImage(size, (0, 0), max_crops, adapter_name, fingerprint, pixels, nothing, embedding, prefix)


@dataclass(frozen=True, eq=False)
class InterleavedContext:
    """Context of a conversation from its start to its last image, unless that is a single image at the start.

    Attributes:
        segments: Text as `Prompt`s, and images, in order. The first one is text.
    """

    segments: tuple[Prompt | Any, ...]

    @property
    def images(self) -> list[Any]:
        """Images in order."""
        return [segment for segment in self.segments if not isinstance(segment, Prompt)]

    def num_tokens(self, num_patches: int) -> int:
        """Return the number of positions of the context, for `num_patches` tokens per image."""
        return sum(len(segment.ids) if isinstance(segment, Prompt) else num_patches for segment in self.segments)


@dataclass(frozen=True, eq=False)
class EncodedContext:
    """An `InterleavedContext` with its KV cache prefix.

    Attributes:
        prefix: Keys and values of all tokens.
    """

    prefix: ImagePrefix


@torch.inference_mode()
def encode_context(
    network: MoondreamNetwork, context: InterleavedContext, images: Sequence[EncodedImage], adapter: Adapter | None
) -> EncodedContext:
    """Prefill the decoder with the text and the image tokens of a conversation.

    As in the inference engine of the model's authors, the tokens of each image attend to one another, and all tokens
    attend to earlier ones. The beginning-of-sequence token attends to an image that directly follows it.

    Args:
        network: Network of the model.
        context: Text and images.
        images: The images of the context, encoded.
        adapter: Adapter; None: no adapter.
    """
    # Embed the segments, and number the tokens of each image
    texts = iter(embed_prompts(network, [segment for segment in context.segments if isinstance(segment, Prompt)]))
    left = iter(images)
    parts: list[Tensor] = []
    blocks: list[int] = []
    for i, segment in enumerate(context.segments):
        is_text = isinstance(segment, Prompt)
        parts.append(next(texts) if is_text else next(left).embedding.to(network.device))
        blocks += [-1 if is_text else i] * len(parts[-1])
    if blocks[1] >= 0:
        blocks[0] = blocks[1]

    # Prefill the decoder
    block = integers(blocks, network.device)
    mask = prefix_mask(len(blocks), 0, network.device)
    mask |= (block[:, None] == block) & (block >= 0)
    (prefix,) = prefill_images(network, torch.cat(parts)[None], adapter, mask=mask)
    return EncodedContext(prefix)


def _cut(
    frames: Sequence[np.ndarray | PreprocessedImage], network: MoondreamNetwork, max_crops: int
) -> list[tuple[np.ndarray | Tensor, tuple[int, int]]]:
    """Return the crops and the tiling of each frame."""
    config, device = network.config.vision, network.device
    on_device = device.type in CUTTING_DEVICES
    arrays = [frame for frame in frames if not isinstance(frame, PreprocessedImage)]
    on_host = iter([] if on_device else cut_all(arrays, config, max_crops, torch.get_num_threads()))
    cut: list[tuple[np.ndarray | Tensor, tuple[int, int]]] = []
    for frame in frames:
        if on_device and not isinstance(frame, PreprocessedImage):
            cut.append(cut_crops_on_device(upload(frame, device), config, max_crops))
        else:
            crops = frame.crops(max_crops) if isinstance(frame, PreprocessedImage) else next(on_host)
            cut.append((crops.pixels, crops.tiling))
    return cut


def _on_host(pixels: np.ndarray | Tensor) -> np.ndarray:
    """Return crops as an array."""
    return pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels


def _changed(pixels: np.ndarray, before: np.ndarray, tolerance: float) -> np.ndarray:
    """Return [N] booleans: whether each crop differs by more than the tolerance."""
    changed = np.array([not np.array_equal(new, old) for new, old in zip(pixels, before, strict=True)])
    if tolerance > 0 and changed.any():
        changed[changed] = largest_differences(pixels[changed], before[changed]) > tolerance
    return changed


def _encode_crops(
    network: MoondreamNetwork, crops: Sequence[np.ndarray | Tensor], operation: Operation | None, images: str
) -> Tensor:
    """Run the vision encoder: [S, S, 3] uint8 crops → [N, num_patches, enc_dim] features."""
    features = []
    for part in _passes(len(crops), network.config.vision.num_patches, network.device):
        pixels = _stack(crops[part], network.device)
        crops_per_block = len(pixels) / len(network.vision.blocks)
        on_block = _reporter(
            network, operation, f"Encoding {images}", float(part.start), crops_per_block, len(crops), "crops"
        )
        features.append(network.vision(normalize(pixels, network.dtype), on_block))
    return features[0] if len(features) == 1 else torch.cat(features)


def _stack(crops: Sequence[np.ndarray | Tensor], device: torch.device) -> Tensor:
    """Stack crops on a device: [S, S, 3] each → [N, S, S, 3]."""
    arrays = [crop for crop in crops if isinstance(crop, np.ndarray)]
    if len(arrays) == len(crops):
        return upload(np.stack(arrays), device)
    return torch.stack([upload(crop, device) if isinstance(crop, np.ndarray) else crop for crop in crops])


def _prefill(
    network: MoondreamNetwork,
    features: Sequence[Tensor],
    tilings: Sequence[tuple[int, int]],
    adapter: Adapter | None,
    operation: Operation | None,
    images: str,
) -> tuple[list[Tensor], list[ImagePrefix]]:
    """Join the crop features of each image and prefill the decoder with them.

    Args:
        network: Network of the model.
        features: One [1 + rows · columns, num_patches, enc_dim] tensor per image.
        tilings: (rows, columns) of each image.
        adapter: Adapter; None: no adapter.
        operation: Receives the progress.
        images: "image" or the number of images, for the name of the stage.

    Returns:
        A [num_patches, dim] embedding and a prefix per image.
    """
    bos_id = torch.tensor([network.config.tokenizer.bos_id], device=network.device, dtype=torch.long)
    bos = network.text.embed(bos_id)  # [1, dim]
    embeddings: list[Tensor] = []
    prefixes: list[ImagePrefix] = []
    tokens, num_layers = 1 + network.config.vision.num_patches, len(network.text.blocks)
    passes = list(_passes(len(features), tokens, network.device))
    for i, part in enumerate(passes):
        joined = network.vision.join(torch.cat(tuple(features[part])), tilings[part])  # [I, num_patches, dim]
        start = bos.expand(len(joined), 1, -1)
        on_layer = _reporter(
            network, operation, f"Prefilling {images}", i * num_layers, 1, len(passes) * num_layers, "layers"
        )
        prefixes += prefill_images(network, torch.cat((start, joined), dim=1), adapter, on_layer)
        embeddings += [image.clone() for image in joined]
    return embeddings, prefixes


def _reporter(
    network: MoondreamNetwork,
    operation: Operation | None,
    stage: str,
    start: float,
    per_layer: float,
    total: int,
    unit: str,
) -> Callable[[int], None] | None:
    """Report the start of a pass, and return a function that reports its layers.

    Args:
        network: Network of the model.
        operation: Receives the progress; None: nothing is reported.
        stage: Name of the stage.
        start: Part of the stage that earlier passes have completed, in `unit`.
        per_layer: Part of the stage that each layer completes, in `unit`.
        total: Size of the stage, in `unit`.
        unit: Plural of the unit.

    Returns:
        A function of the number of complete layers. None if Python runs ahead of the device, so that layers cannot be
        timed, or if the encoder is compiled.
    """
    if operation is None:
        return None
    operation.update(stage, start, total, unit)
    if network.device.type != "cpu" or network.vision._compiled_call_impl is not None:
        return None
    return lambda layers: operation.update(stage, start + layers * per_layer, total, unit)


def _passes(count: int, tokens: int, device: torch.device) -> Iterator[slice]:
    """Split `count` items of `tokens` tokens each into the fewest passes that fit, of similar size."""
    limit = TOKENS_PER_CPU_PASS if device.type == "cpu" else TOKENS_PER_PASS
    passes = math.ceil(count / max(1, limit // tokens))
    size = math.ceil(count / passes)
    return (slice(start, start + size) for start in range(0, count, size))
