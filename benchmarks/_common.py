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


def random_model(vision_layers: int | None, text_layers: int | None, device: torch.device) -> LocalModel:
    """Return a model with the dimensions of Moondream 2B in bfloat16 and random weights.

    Random weights have the speed of real ones, and almost never generate an end token.

    Args:
        vision_layers: Number of layers of the vision encoder; None: all.
        text_layers: Number of layers of the decoder; None: all.
        device: Device of the model.
    """
    config = MoondreamConfig()
    config = replace(
        config,
        text=replace(config.text, n_layers=text_layers or config.text.n_layers),
        vision=replace(config.vision, enc_n_layers=vision_layers or config.vision.enc_n_layers),
    )
    with torch.device("meta"):
        network = MoondreamNetwork(config)
    network = network.to(torch.bfloat16).to_empty(device=device)
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
