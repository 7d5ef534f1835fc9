"""Supported releases of Moondream 2, with their sizes, token IDs and templates.

A published `config.json` may not contain them, because the published code does. A release is therefore identified by
its repository and revision. Every other checkpoint is identified by its files: by a `config.json` with the sections
`text`, `vision`, `region` and `tokenizer`, or otherwise by the sizes of its weights.
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

# Prompts of the releases before 2025-05-31: plain words ("\n\nShort caption:"), no reasoning. 2025-03-27 added long
# captions. The end is the only control token; the IDs of the others keep their defaults, which are punctuation in the
# vocabulary of these releases.
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
        repo: Repository on the hub.
        revision: Revision of the repository.
        config: Configuration of the checkpoint.
        tokenizer_repo: Repository with the tokenizer; None: the same repository.
    """

    repo: str
    revision: str
    config: MoondreamConfig
    tokenizer_repo: str | None = None

    @property
    def name(self) -> str:
        """Name in the form "repo@revision"."""
        return f"{self.repo}@{self.revision}"


# 2025-06-21 follows the published code. The prompts and sizes of the earlier three are known as well; the spelling of
# their revisions, and that each has its own tokenizer.json, come from the repository's change log and are untested,
# because their weights were not available. 2025-05-31 is omitted: it changed the kind of prompts. Releases before
# 2025-01-09 have another architecture.
RELEASES = (
    Release(DEFAULT_REPO, DEFAULT_REVISION, MOONDREAM_2B, STARMIE_TOKENIZER),
    Release(DEFAULT_REPO, "2025-04-14", MOONDREAM_2B_EARLIER),
    Release(DEFAULT_REPO, "2025-03-27", MOONDREAM_2B_EARLIER),
    Release(DEFAULT_REPO, "2025-01-09", MOONDREAM_2B_FIRST),
)
# Assumed release of a checkpoint without a name or config, by its sizes
_BY_SIZE = (RELEASES[0], Release("", "0.5B", MOONDREAM_05B, None))


def find_release(repo: str, revision: str) -> Release | None:
    """Return the release with this repository and revision; None if it is not supported."""
    return next((r for r in RELEASES if (r.repo, r.revision) == (repo, revision)), None)


def release_by_date(repo: str) -> Release | None:
    """Return the release whose date is in a repository's name, such as "moondream/moondream-2b-2025-04-14-4bit"."""
    return next((r for r in RELEASES if r.revision in repo), None)


def has_sizes_of(shapes: Mapping[str, tuple[int, ...]], config: MoondreamConfig) -> bool:
    """Return whether weights have the sizes of a configuration.

    Args:
        shapes: Shapes of the weights by their names in the network.
        config: Configuration with the sizes.
    """
    return _outline(shapes) == _outline_of(config)


def known_releases() -> str:
    """Return the names of the supported releases, for messages."""
    return ", ".join(release.name for release in RELEASES)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a `config.json`.

    Args:
        path: Path of the file.

    Raises:
        CheckpointError: The file cannot be read or is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must contain a JSON object, got {type(values).__name__}")
    return values


def explicit_config(values: Mapping[str, Any], where: str = "config.json") -> MoondreamConfig | None:
    """Return the configuration in a `config.json`, at the top level or under `config`.

    Args:
        values: Content of the file.
        where: Name of the file in error messages.

    Returns:
        The configuration; None if the file has no sections with sizes.

    Raises:
        CheckpointError: Sections are missing or have invalid values.
    """
    nested = values.get("config")
    for section in (values, nested if isinstance(nested, Mapping) else {}):
        present = [name for name in _SECTIONS if name in section]
        missing = [name for name in _SECTIONS[:3] if name not in section]
        if present and missing:
            raise CheckpointError(f"{where} has the sections {', '.join(present)}; missing: {', '.join(missing)}")
        if present:
            try:
                return MoondreamConfig.from_dict(section)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {error}") from error
    return None


def release_by_size(shapes: Mapping[str, tuple[int, ...]], where: str) -> Release:
    """Return the release with the sizes of a checkpoint that has no name or config.

    Several releases have the sizes of 2B; for these, the default release is returned.

    Args:
        shapes: Shapes of the weights by their names in the network.
        where: Name of the checkpoint in error messages.

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
        f"({sizes}). Put its config.json next to the weights, or use one of {known_releases()}"
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
