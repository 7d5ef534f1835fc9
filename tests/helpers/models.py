"""Models with random weights."""

from __future__ import annotations

import dataclasses

import torch

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.training.tiny import tiny_config, tiny_templates
from moondream_cv.training.tokenizer import build_tokenizer


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


def endless_model(max_context: int = 4096) -> LocalModel:
    """A random model whose texts go on until the context is full, which takes many seconds."""
    endless = random_model(max_context=max_context)
    with torch.no_grad():
        endless.network.text.lm_head.bias[endless.config.tokenizer.eos_id] = -1e6
    return endless
