"""Tiny SAM and SAM 2 models with random weights, built from the configs of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZE = 64
"""Width and height of the input of the models in pixels."""

PROMPTS = {"hidden_size": 32, "image_size": SIZE, "patch_size": 16, "mask_input_channels": 4}
DECODER = {
    "hidden_size": 32,
    "mlp_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_depth": 2,
    "iou_head_hidden_dim": 16,
}


def tiny_sam() -> Any:
    """Return a `SamModel`."""
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
            "mlp_dim": 32,
            "num_pos_feats": 16,
        },
        prompt_encoder_config={**PROMPTS, "image_embedding_size": SIZE // 16},
        mask_decoder_config=DECODER,
    )
    return _create(transformers.SamModel, config)


def tiny_sam2() -> Any:
    """Return a `Sam2Model`."""
    config = transformers.Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "num_attention_heads": 1,
                "image_size": [SIZE, SIZE],
                "blocks_per_stage": [1, 1, 1, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 4],
                "window_size_per_stage": [4, 2, 2, 2],
                "global_attention_blocks": [],
                "window_positional_embedding_background_size": [2, 2],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config=PROMPTS,
        mask_decoder_config=DECODER,
    )
    return _create(transformers.Sam2Model, config)


def save_tiny_sam2(folder: Path) -> str:
    """Save a `Sam2Model` to a folder, with the model type of published checkpoints, and return the folder."""
    tiny_sam2().save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "sam2"', '"model_type": "sam2_video"'))
    return str(folder)


def _create(model_class: Any, config: Any) -> Any:
    """Return a model with large random weights, so that its masks depend on the prompts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter[0].numel() ** -0.5)
    return model
