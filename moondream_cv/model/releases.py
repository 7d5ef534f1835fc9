"""The releases of Moondream 2 whose sizes, token ids and templates are known here.

A published `config.json` may contain none of that: the published code does. So a release is identified by its
repository and revision, and every other checkpoint by its files: by a `config.json` with the sections `text`, `vision`,
`region` and `tokenizer`, or else by the sizes of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig, RegionConfig, TextConfig, TokenizerConfig, VisionConfig

DEFAULT_REPO = "vikhyatk/moondream2"
DEFAULT_REVISION = "2025-06-21"
STARMIE_TOKENIZER = "moondream/starmie-v1"

_SECTIONS = ("text", "vision", "region", "tokenizer")

# Prompts of the releases before 2025-05-31: plain words ("\n\nShort caption:"), no reasoning. Long captions came with
# 2025-03-27. There are no control tokens but the end; the ids of the others are left at their defaults, where this
# vocabulary has punctuation.
_FIRST_TOKENS = TokenizerConfig(
    bos_id=50256,
    eos_id=50256,
    templates={
        "caption": {"short": [198, 198, 16438, 8305, 25], "normal": [198, 198, 24334, 1159, 25]},
        "query": {"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]},
        "detect": {"prefix": [198, 198, 47504, 25], "suffix": [628]},
        "point": {"prefix": [198, 198, 12727, 25], "suffix": [628]},
    },
)
_LATER_CAPTIONS = {"long": [198, 198, 14617, 8305, 25]}
_EARLIER_TOKENS = replace(
    _FIRST_TOKENS,
    templates={**_FIRST_TOKENS.templates, "caption": {**(_FIRST_TOKENS.templates["caption"] or {}), **_LATER_CAPTIONS}},
)

MOONDREAM_2B = MoondreamConfig()
MOONDREAM_2B_EARLIER = MoondreamConfig(tokenizer=_EARLIER_TOKENS)
MOONDREAM_2B_FIRST = MoondreamConfig(tokenizer=_FIRST_TOKENS)
MOONDREAM_05B = MoondreamConfig(
    text=TextConfig(dim=1024, ff_dim=4096, n_heads=16, n_kv_heads=16),
    vision=VisionConfig(enc_dim=720, enc_ff_dim=2690, enc_n_heads=10, proj_out_dim=1024),
    region=RegionConfig(dim=1024),
    tokenizer=_FIRST_TOKENS,
)


@dataclass(frozen=True)
class Release:
    """A published checkpoint.

    Attributes:
        tokenizer_repo: The hub repository with its tokenizer; None: its own.
    """

    repo: str
    revision: str
    config: MoondreamConfig
    tokenizer_repo: str | None = None

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision}"


# Of 2025-06-21 everything is known from its code. For the earlier three the prompts are known, and that they have the
# sizes of 2B; that their revisions are spelt like this, and that each carries its own tokenizer.json, is taken from the
# repository's change log and untested: nobody here has their weights. 2025-05-31 lies between the two kinds of prompts
# and is left out, as is everything before 2025-01-09, which had another architecture.
RELEASES = (
    Release(DEFAULT_REPO, DEFAULT_REVISION, MOONDREAM_2B, STARMIE_TOKENIZER),
    Release(DEFAULT_REPO, "2025-04-14", MOONDREAM_2B_EARLIER),
    Release(DEFAULT_REPO, "2025-03-27", MOONDREAM_2B_EARLIER),
    Release(DEFAULT_REPO, "2025-01-09", MOONDREAM_2B_FIRST),
)
# What a checkpoint is taken for that says nothing of itself and has these sizes.
_BY_SIZE = (RELEASES[0], Release("", "0.5B", MOONDREAM_05B, None))


def find_release(repo: str, revision: str) -> Release | None:
    """The release of this name, or None."""
    return next((r for r in RELEASES if (r.repo, r.revision) == (repo, revision)), None)


def release_by_date(repo: str) -> Release | None:
    """Return the release whose date is part of a repository's name, as in "moondream/moondream-2b-2025-04-14-4bit"."""
    return next((r for r in RELEASES if r.revision in repo), None)


def has_sizes_of(shapes: Mapping[str, tuple[int, ...]], config: MoondreamConfig) -> bool:
    """Return whether weights have the sizes of a config.

    Args:
        shapes: Shapes of the weights by their names in the network.
        config: The sizes.
    """
    return _outline(shapes) == _outline_of(config)


def known_releases() -> str:
    """The releases that work, for messages."""
    return ", ".join(release.name for release in RELEASES)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a `config.json`.

    Raises:
        CheckpointError: It is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def explicit_config(values: Mapping[str, Any], where: str = "config.json") -> MoondreamConfig | None:
    """The config that a `config.json` spells out, at its top or under `config`; None if it says no sizes.

    Raises:
        CheckpointError: Its sections are incomplete, or their values are wrong.
    """
    nested = values.get("config")
    for section in (values, nested if isinstance(nested, Mapping) else {}):
        present = [name for name in _SECTIONS if name in section]
        missing = [name for name in _SECTIONS[:3] if name not in section]
        if present and missing:
            raise CheckpointError(f"{where} has the sections {', '.join(present)} and lacks {', '.join(missing)}")
        if present:
            try:
                return MoondreamConfig.from_dict(section)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {error}") from error
    return None


def release_by_size(shapes: Mapping[str, tuple[int, ...]], where: str) -> Release:
    """Take a checkpoint that says nothing of itself for the release of its sizes.

    Several releases have the sizes of 2B; it is then taken for the default one.

    Args:
        shapes: Shapes of its weights by their names in the network.
        where: What it is called in errors.

    Raises:
        CheckpointError: No release has these sizes.
    """
    found = _outline(shapes)
    for release in _BY_SIZE:
        if found == _outline_of(release.config):
            return release
    sizes = ", ".join(f"{name} {list(shape) if shape else 'missing'}" for name, shape in found.items())
    raise CheckpointError(
        f"{where} has no config.json with the sections {', '.join(_SECTIONS)}, and no known release has its sizes "
        f"({sizes}). Put its config.json beside the weights, or use one of {known_releases()}"
    )


def _outline_of(config: MoondreamConfig) -> dict[str, tuple[int, ...] | None]:
    text, vision = config.text, config.vision
    patch = vision.in_channels * vision.enc_patch_size**2
    return {
        "text.wte": (text.vocab_size, text.dim),
        "vision.patch_emb.weight": (vision.enc_dim, patch),
        "vision.pos_emb": (1, vision.num_patches, vision.enc_dim),
    }


def _outline(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...] | None]:
    return {name: shapes.get(name) for name in _outline_of(MOONDREAM_2B)}
