"""Mapping from the names of tensors in published files to the names of weights in the network.

Three layouts are supported: the current one (`model.vision.*`, `model.text.*`, `model.region.*`, with or without
`model.`), the previous one (`vision_encoder.*`, `text_model.*`, `region_model.*`, optionally with the `_orig_mod` of a
compiled model), and either of them with quantized weights, which consist of several tensors: `weight.packed`,
`weight.scale` and `weight.zero_point` with 4 bits, `weight` and `weight_scale` with 8 bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PACKED_PARTS = ("packed", "scale", "zero_point")  # the tensors of a 4-bit weight
INT8_SCALE = "weight_scale"  # the second tensor of an 8-bit weight; the first one has the name of the weight

_SECTIONS = ("vision.", "text.", "region.")
_OLDER_SECTIONS = ("vision_encoder.", "text_model.", "region_model.")
_RENAMED = (
    ("vision_encoder.encoder.model.visual.patch_embed.linear.", "vision.patch_emb."),
    ("vision_encoder.encoder.model.visual.pos_embed", "vision.pos_emb"),
    ("vision_encoder.encoder.model.visual.norm.", "vision.post_ln."),
    ("vision_encoder.encoder.model.visual.blocks.", "vision.blocks."),
    ("vision_encoder.projection.mlp.", "vision.proj_mlp."),
    ("text_model.transformer.embd.wte.weight", "text.wte"),
    ("text_model.transformer.h.", "text.blocks."),
    ("text_model.lm_head.ln.", "text.post_ln."),
    ("text_model.lm_head.linear.", "text.lm_head."),
    ("region_model.coordinate_encoder.", "region.coord_encoder."),
    ("region_model.coordinate_decoder.", "region.coord_decoder."),
    ("region_model.coordinate_features.weight", "region.coord_features"),
    ("region_model.size_encoder.", "region.size_encoder."),
    ("region_model.size_decoder.", "region.size_decoder."),
    ("region_model.size_features.weight", "region.size_features"),
)
_RENAMED_PARTS = ((".mixer.Wqkv.", ".attn.qkv."), (".mixer.out_proj.", ".attn.proj."))
_RENAMED_NORMS = ((".norm1.", ".ln1."), (".norm2.", ".ln2."))
_TRANSPOSED = ("region_model.coordinate_features.weight", "region_model.size_features.weight")
# Caches and tables in some files, which the network computes itself
_COMPUTED = re.compile(
    r"(^|\.)(attn_mask|causal_mask|freqs_cis|inv_freq|cos_cached|sin_cached|position_ids|k_cache|v_cache|kv_cache)(\.|$)"
)


@dataclass(frozen=True)
class StoredKey:
    """Meaning of a tensor in a file.

    Attributes:
        name: Name of the weight in the network, such as `text.blocks.0.attn.qkv.weight`.
        part: Part of a quantized weight; None for an unquantized weight and for the integers of an 8-bit weight.
        transposed: Whether the file contains the transpose.
    """

    name: str
    part: str | None = None
    transposed: bool = False


def parse_key(key: str) -> StoredKey | None:
    """Return the meaning of a key in a file.

    Args:
        key: Name of a tensor in a file.

    Returns:
        None for caches and tables that are not weights. A key of an unknown layout keeps its name, so that it is
        reported as unexpected.
    """
    if _COMPUTED.search(key):
        return None
    plain = key.replace("._orig_mod", "").removeprefix("_orig_mod.").removeprefix("model.")
    name = _from_older(plain) if plain.startswith(_OLDER_SECTIONS) else plain
    if not name.startswith(_SECTIONS):
        return StoredKey(key)
    stem, _, part = name.rpartition(".")
    if part in PACKED_PARTS and stem.endswith(".weight"):
        return StoredKey(stem, part)
    if part == INT8_SCALE:
        return StoredKey(f"{stem}.weight", part)
    return StoredKey(name, transposed=plain in _TRANSPOSED)


def _from_older(key: str) -> str:
    for old, new in _RENAMED:
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    renamed = _RENAMED_PARTS if key.startswith("text.") else _RENAMED_NORMS
    for old, new in renamed:
        key = key.replace(old, new)
    return key
