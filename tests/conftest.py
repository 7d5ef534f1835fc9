"""Fixtures that several folders share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moondream_cv.engine.local import LocalModel
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.training.tiny import tiny_config, tiny_templates
from moondream_cv.training.tokenizer import build_tokenizer
from tests.signals import default_signals


@pytest.fixture(scope="session", autouse=True)
def _default_signals() -> Iterator[None]:
    """Default signals for all tests, whatever signals pytest was started with."""
    with default_signals():
        yield


def random_model(seed: int = 0, device: str = "cpu", max_context: int | None = None) -> LocalModel:
    """A model of the tiny sizes with random weights that end neither at once nor never."""
    tokenizer = build_tokenizer()
    config = tiny_config("small", tokenizer.get_vocab_size(), tiny_templates(tokenizer))
    if max_context is not None:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, max_context=max_context))
    network = MoondreamNetwork(config)
    network.initialize(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        network.text.lm_head.weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(seed + 1))
    return LocalModel(network.to(device), tokenizer, name="random")


def endless_model() -> LocalModel:
    """A random model whose texts go on until the context is full, which takes many seconds."""
    endless = random_model(max_context=4096)
    with torch.no_grad():
        endless.network.text.lm_head.bias[endless.config.tokenizer.eos_id] = -1e6
    return endless


@pytest.fixture(scope="session")
def model() -> LocalModel:
    """Random weights: its replies mean nothing, and are the same every time."""
    return random_model()


@pytest.fixture(scope="session")
def frame() -> np.ndarray:
    """[240, 320, 3] BGR noise of large blots."""
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), np.ones((20, 20, 1), np.uint8))
