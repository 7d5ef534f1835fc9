"""Helpers of the benchmarks: models with random weights, and median times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.training.tokenizer import build_tokenizer


def empty_network(vision_layers: int | None, text_layers: int | None, device: torch.device) -> MoondreamNetwork:
    """Return a network with the dimensions of Moondream 2B in bfloat16 and uninitialized weights.

    Args:
        vision_layers: Number of layers of the vision encoder; None: all.
        text_layers: Number of layers of the decoder; None: all.
        device: Device of the network.
    """
    config = MoondreamConfig()
    config = replace(
        config,
        text=replace(config.text, n_layers=text_layers or config.text.n_layers),
        vision=replace(config.vision, enc_n_layers=vision_layers or config.vision.enc_n_layers),
    )
    with torch.device("meta"):
        network = MoondreamNetwork(config)
    return network.to(torch.bfloat16).to_empty(device=device)


@torch.no_grad()
def forbid_end(network: MoondreamNetwork) -> None:
    """Make the end token impossible, so that every detection returns the maximum number of objects."""
    network.text.lm_head.bias[network.config.tokenizer.eos_id] = -1e4


def random_model(vision_layers: int | None, text_layers: int | None, device: torch.device) -> LocalModel:
    """Return a model with the dimensions of Moondream 2B in bfloat16 and random weights.

    Random weights have the speed of real ones, and almost never generate an end token.

    Args:
        vision_layers: Number of layers of the vision encoder; None: all.
        text_layers: Number of layers of the decoder; None: all.
        device: Device of the model.
    """
    network = empty_network(vision_layers, text_layers, device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.02)
    return LocalModel(network, build_tokenizer(), name="random")


def seconds(call: Callable[[], object], repeat: int, device: torch.device | None = None) -> float:
    """Return the median time of a call in seconds, after one warm-up call.

    Args:
        call: Function to time.
        repeat: Number of timed calls.
        device: CUDA device to synchronize after each call; None: do not synchronize.
    """
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def encoding_flops(config: MoondreamConfig, num_crops: int) -> float:
    """Return the floating-point operations of encoding an image: vision encoder, projection and prefill."""
    vision, text = config.vision, config.text
    patches, width = vision.num_patches, vision.enc_dim
    per_token = 2 * width * (4 * width + 2 * vision.enc_ff_dim) + 4 * patches * width
    crops = num_crops * patches * vision.enc_n_layers * per_token
    joined = 2 * patches * vision.proj_inner_dim * (2 * width + vision.proj_out_dim)
    tokens = config.prefix_length
    qkv = (text.n_heads + 2 * text.n_kv_heads) * text.head_dim
    per_token = 2 * text.dim * (qkv + text.dim + 2 * text.ff_dim) + 4 * tokens * text.dim
    return crops + joined + tokens * text.n_layers * per_token
