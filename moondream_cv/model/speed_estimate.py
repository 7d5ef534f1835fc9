"""Estimate of the time that a model takes on a CPU, from a measurement of a few of its products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import TextBlock
from moondream_cv.model.vision import VisionBlock

PROBE_SECONDS = 0.1  # minimum duration of each of two measurements
CROPS = 9  # crops of a 640×480 image
OBJECTS = 3
_STEPS_PER_OBJECT = 3  # x, y and size
_PRODUCT_SHARE = 0.8  # share of products in the time of the encoder; the rest is attention, norms and activations


@dataclass(frozen=True)
class SpeedEstimate:
    """Expected times.

    Attributes:
        encode_seconds: Time to encode a 640×480 image.
        class_seconds: Time to detect 3 objects of a class on an encoded image.
    """

    encode_seconds: float
    class_seconds: float


@torch.inference_mode()
def estimate_speed(network: MoondreamNetwork) -> SpeedEstimate:
    """Measure products of a network for about 0.2 s and estimate the times of whole calls.

    Args:
        network: Network on a CPU.
    """
    config = network.config
    vision = config.vision
    encoder = next(block.mlp for block in network.vision.blocks if isinstance(block, VisionBlock))
    decoder = [block.mlp for block in network.text.blocks if isinstance(block, TextBlock)]

    # Measure the rates of many rows and of one row
    x = torch.zeros(vision.num_patches, vision.enc_dim, dtype=network.dtype, device=network.device)
    encode = _seconds(lambda: encoder.fc1(x)) / (vision.enc_dim * vision.enc_ff_dim)
    row = torch.zeros(1, config.text.dim, dtype=network.dtype, device=network.device)
    decode = _seconds(lambda: [mlp.fc1(row) for mlp in decoder][-1])
    decode /= config.text.dim * config.text.ff_dim * len(decoder)

    # Count the products
    text = config.text
    text_values = text.n_layers * (
        2 * text.dim * text.ff_dim + text.dim * (2 * text.dim + 2 * text.n_kv_heads * text.head_dim)
    )
    vision_values = vision.enc_n_layers * vision.enc_dim * (4 * vision.enc_dim + 2 * vision.enc_ff_dim)
    prefill = text_values * config.prefix_length / vision.num_patches
    steps = OBJECTS * _STEPS_PER_OBJECT + 1
    head = 2 * config.region.inner_dim * config.region.dim
    return SpeedEstimate(
        encode * (CROPS * vision_values + prefill) / _PRODUCT_SHARE, decode * steps * (text_values + head)
    )


def _seconds(run: Callable[[], Tensor]) -> float:
    """Return the shortest time of several calls."""
    run()
    best, start = float("inf"), time.perf_counter()
    while (begin := time.perf_counter()) - start < PROBE_SECONDS:
        run()
        best = min(best, time.perf_counter() - begin)
    return best
