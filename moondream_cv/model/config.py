"""Configuration of a Moondream 2 checkpoint: sizes, token IDs and prompt templates, with the names of `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from moondream_cv.errors import CheckpointError

T = TypeVar("T")
Templates = dict[str, "dict[str, list[int]] | None"]


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text decoder; the defaults are those of Moondream 2B."""

    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 32
    prefix_attn: int = 730
    group_size: int | None = None

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """Number of leading dimensions of a head that the rotary embedding rotates: half of them."""
        return self.head_dim // 2


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision encoder; the defaults are those of Moondream 2B."""

    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int = 2048
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    overlap_margin: int = 4
    proj_inner_dim: int = 8192

    @property
    def grid(self) -> int:
        """Number of patches along one side of a crop."""
        return self.crop_size // self.enc_patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches of a crop."""
        return self.grid**2


@dataclass(frozen=True)
class RegionConfig:
    """Sizes of the region heads for coordinates and sizes; the defaults are those of Moondream 2B."""

    dim: int = 2048
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192
    group_size: int | None = None


def _default_templates() -> Templates:
    return {
        "caption": {"short": [1, 32708, 2, 12492, 3], "normal": [1, 32708, 2, 6382, 3], "long": [1, 32708, 2, 4059, 3]},
        "query": {"prefix": [1, 15381, 2], "suffix": [3]},
        "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
        "point": {"prefix": [1, 2581, 2], "suffix": [3]},
    }


@dataclass(frozen=True)
class TokenizerConfig:
    """IDs of the control tokens, and prompt templates; the defaults are those of the 2025-06-21 release."""

    bos_id: int = 0
    eos_id: int = 0
    answer_id: int = 3
    thinking_id: int = 4
    coord_id: int = 5
    size_id: int = 6
    start_ground_points_id: int = 7
    end_ground_id: int = 9
    templates: Templates = field(default_factory=_default_templates)

    @property
    def has_control_tokens(self) -> bool:
        """Whether prompts end with the answer token; prompts of releases before 2025-05-31 are plain words."""
        query = self.templates.get("query")
        return query is not None and self.answer_id in query.get("suffix", ())


@dataclass(frozen=True)
class MoondreamConfig:
    """Configuration of a checkpoint.

    Attributes:
        text: Sizes of the text decoder.
        vision: Sizes of the vision encoder.
        region: Sizes of the region heads.
        tokenizer: Control tokens and prompt templates.
    """

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def prefix_length(self) -> int:
        """Positions of the context that an image takes: one bos token and the image tokens."""
        return 1 + self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoondreamConfig:
        """Create a config from the sections of a published `config.json`.

        Args:
            values: Mapping with the sections `text`, `vision`, `region` and `tokenizer`.

        Raises:
            CheckpointError: A section or a value is unknown, has the wrong type, or does not fit the others.
        """
        return cls(
            text=_section(TextConfig, values, "text"),
            vision=_section(VisionConfig, values, "vision"),
            region=_section(RegionConfig, values, "region"),
            tokenizer=_section(TokenizerConfig, values, "tokenizer"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the sections as `from_dict` reads them."""
        return asdict(self)


def _section(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    section = values.get(name, {})
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config: section {name!r} must be an object, got {section!r}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(section) - set(known))
    if unknown:
        raise CheckpointError(f"config: unknown keys in section {name!r}: {', '.join(unknown)}")
    for key, value in section.items():
        optional = key == "group_size" and value is None
        if key != "templates" and not optional and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"config: {name}.{key} must be an integer, got {value!r}")
    return kind(**section)


def _check_sizes(config: MoondreamConfig) -> None:
    text, vision, region = config.text, config.vision, config.region
    for name, section in (("text", text), ("vision", vision), ("region", region)):
        for key, value in asdict(section).items():
            if value is not None and value < (0 if key == "overlap_margin" else 1):
                raise CheckpointError(f"config: {name}.{key} must be positive, got {value}")
    rules = {
        f"text.dim {text.dim} must be a multiple of 4 × text.n_heads {text.n_heads}": text.dim % (4 * text.n_heads)
        == 0,
        f"text.n_heads {text.n_heads} must be a multiple of text.n_kv_heads {text.n_kv_heads}": (
            text.n_heads % text.n_kv_heads == 0
        ),
        f"vision.enc_dim {vision.enc_dim} must be a multiple of vision.enc_n_heads {vision.enc_n_heads}": (
            vision.enc_dim % vision.enc_n_heads == 0
        ),
        f"vision.crop_size {vision.crop_size} must be a multiple of vision.enc_patch_size {vision.enc_patch_size}": (
            vision.crop_size % vision.enc_patch_size == 0
        ),
        f"vision.overlap_margin {vision.overlap_margin} must leave a window in {vision.grid} patches": (
            2 * vision.overlap_margin < vision.grid
        ),
        f"vision.proj_out_dim {vision.proj_out_dim} must equal text.dim {text.dim}": vision.proj_out_dim == text.dim,
        f"region.dim {region.dim} must equal text.dim {text.dim}": region.dim == text.dim,
        f"region.size_out_dim {region.size_out_dim} must be even": region.size_out_dim % 2 == 0,
        "region.coord_feat_dim and region.size_feat_dim must be even": (
            region.coord_feat_dim % 2 == 0 and region.size_feat_dim % 2 == 0
        ),
        f"text.max_context {text.max_context} must exceed the image prefix of {config.prefix_length}": (
            text.max_context > config.prefix_length
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise CheckpointError("config: " + "; ".join(broken))
    _check_tokens(config.tokenizer, text.vocab_size)


def _check_tokens(tokenizer: TokenizerConfig, vocab_size: int) -> None:
    if not isinstance(tokenizer.templates, Mapping):
        raise CheckpointError(f"config: tokenizer.templates must be an object, got {tokenizer.templates!r}")
    ids = [value for key, value in asdict(tokenizer).items() if key != "templates"]
    for skill, template in tokenizer.templates.items():
        if template is None:
            continue
        if not isinstance(template, Mapping):
            raise CheckpointError(f"config: tokenizer.templates.{skill} must be an object, got {template!r}")
        for part, tokens in template.items():
            if not isinstance(tokens, list | tuple) or not all(isinstance(t, int) for t in tokens):
                raise CheckpointError(
                    f"config: tokenizer.templates.{skill}.{part} must be a list of token IDs, got {tokens!r}"
                )
            ids.extend(tokens)
    outside = sorted({i for i in ids if not 0 <= i < vocab_size or not math.isfinite(i)})
    if outside:
        raise CheckpointError(f"config: token IDs must be below the vocabulary size of {vocab_size}, got {outside}")
