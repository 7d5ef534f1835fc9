"""A checkpoint of a few kilobytes for tests of file formats, with random weights and a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.moondream import MoondreamNetwork

CONTROL_TOKENS = [f"<|control_{i}|>" for i in range(10)]


def small_config(dim: int = 64, layers: int = 2) -> MoondreamConfig:
    """Return a config with two query heads per key-value head, and widths for 4-bit groups of 128."""
    return MoondreamConfig.from_dict(
        {
            "text": {
                "dim": dim,
                "ff_dim": 128,
                "n_layers": layers,
                "vocab_size": 272,
                "max_context": 64,
                "n_heads": 2,
                "n_kv_heads": 1,
                "prefix_attn": 10,
            },
            "vision": {
                "enc_dim": 16,
                "enc_patch_size": 14,
                "enc_n_layers": 1,
                "enc_ff_dim": 32,
                "enc_n_heads": 2,
                "proj_out_dim": dim,
                "crop_size": 42,
                "max_crops": 2,
                "overlap_margin": 1,
                "proj_inner_dim": 32,
            },
            "region": {
                "dim": dim,
                "coord_feat_dim": 8,
                "coord_out_dim": 32,
                "size_feat_dim": 12,
                "size_out_dim": 64,
                "inner_dim": 16,
            },
            "tokenizer": {
                "templates": {
                    "caption": {"short": [1, 20, 2, 21, 3], "normal": [1, 20, 2, 22, 3], "long": [1, 20, 2, 23, 3]},
                    "query": {"prefix": [1, 24, 2], "suffix": [3]},
                    "detect": {"prefix": [1, 25, 2], "suffix": [3]},
                    "point": {"prefix": [1, 26, 2], "suffix": [3]},
                }
            },
        }
    )


def small_network(config: MoondreamConfig, seed: int = 0) -> MoondreamNetwork:
    """Return a network with random weights."""
    network = MoondreamNetwork(config)
    network.initialize(torch.Generator().manual_seed(seed))
    return network


def byte_tokenizer(control_tokens: list[str] | None = None, special: bool = True) -> Tokenizer:
    """Return a tokenizer whose vocabulary is the control tokens followed by the 256 bytes."""
    control_tokens = CONTROL_TOKENS if control_tokens is None else control_tokens
    letters = [*control_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(token, special=special, normalized=False) for token in control_tokens]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return tokenizer


def write_small(folder: Path, config: MoondreamConfig | None = None, seed: int = 0) -> MoondreamNetwork:
    """Write a complete checkpoint folder and return the network."""
    config = config or small_config()
    network = small_network(config, seed)
    save_checkpoint(network, config, byte_tokenizer(), folder)
    return network
