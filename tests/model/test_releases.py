"""Published releases and `config.json` files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.releases import (
    MOONDREAM_05B,
    MOONDREAM_2B,
    RELEASES,
    explicit_config,
    find_release,
    known_releases,
    read_config_file,
    release_by_size,
)
from tests.helpers.small_checkpoint import small_config

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SIZES_2B = {
    "text.wte": (51200, 2048),
    "vision.patch_emb.weight": (1152, 588),
    "vision.pos_emb": (1, 729, 1152),
}


def test_default_release_has_the_published_config() -> None:
    release = find_release("vikhyatk/moondream2", "2025-06-21")
    assert release is RELEASES[0]
    assert release.tokenizer_repo == "moondream/starmie-v1"
    tokens = release.config.tokenizer
    assert (tokens.bos_id, tokens.eos_id, tokens.answer_id, tokens.thinking_id) == (0, 0, 3, 4)
    assert (tokens.coord_id, tokens.size_id, tokens.start_ground_points_id, tokens.end_ground_id) == (5, 6, 7, 9)
    assert tokens.templates == {
        "caption": {"short": [1, 32708, 2, 12492, 3], "normal": [1, 32708, 2, 6382, 3], "long": [1, 32708, 2, 4059, 3]},
        "query": {"prefix": [1, 15381, 2], "suffix": [3]},
        "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
        "point": {"prefix": [1, 2581, 2], "suffix": [3]},
    }


@pytest.mark.parametrize("revision", ["2025-01-09", "2025-03-27", "2025-04-14"])
def test_earlier_releases_have_their_prompts(revision: str) -> None:
    release = find_release("vikhyatk/moondream2", revision)
    assert release is not None
    assert release.config.text == MOONDREAM_2B.text
    assert release.config.tokenizer.bos_id == release.config.tokenizer.eos_id == 50256
    assert release.config.tokenizer.templates["detect"] == {"prefix": [198, 198, 47504, 25], "suffix": [628]}
    lengths = {"short", "normal"} if revision == "2025-01-09" else {"short", "normal", "long"}
    assert set(release.config.tokenizer.templates["caption"] or ()) == lengths


@pytest.mark.parametrize("revision", ["2024-08-26", "2025-05-31", "main", ""])
def test_unknown_releases_are_not_found(revision: str) -> None:
    assert find_release("vikhyatk/moondream2", revision) is None
    assert known_releases().count("vikhyatk/moondream2@") == len(RELEASES) == 4


def test_half_billion_sizes_match_the_release() -> None:
    text, vision = MOONDREAM_05B.text, MOONDREAM_05B.vision
    assert (text.dim, text.ff_dim, text.n_layers, text.n_heads, text.n_kv_heads) == (1024, 4096, 24, 16, 16)
    assert (vision.enc_dim, vision.enc_ff_dim, vision.enc_n_layers, vision.enc_n_heads) == (720, 2690, 27, 10)
    assert MOONDREAM_05B.tokenizer.bos_id == 50256
    found = release_by_size(
        {"text.wte": (51200, 1024), "vision.patch_emb.weight": (720, 588), "vision.pos_emb": (1, 729, 720)}, "x"
    )
    assert found.config is MOONDREAM_05B


def test_release_is_found_by_size() -> None:
    assert release_by_size(SIZES_2B, "x") is RELEASES[0]
    with pytest.raises(CheckpointError, match=r"^x has no config\.json.*text\.wte \[51200, 7\].*2025-06-21"):
        release_by_size(SIZES_2B | {"text.wte": (51200, 7)}, "x")
    with pytest.raises(CheckpointError, match=r"text\.wte missing"):
        release_by_size({}, "x")


def test_config_is_read_at_the_top_level_and_nested() -> None:
    config = small_config()
    assert explicit_config(config.to_dict()) == config
    assert explicit_config({"model_type": "moondream1", "config": config.to_dict()}) == config
    assert explicit_config({"model_type": "moondream1", "config": {}, "auto_map": {"AutoConfig": "x.Y"}}) is None
    assert explicit_config({"text_config": {"model_type": "phi"}}) is None


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_golden_configs_have_all_sections(name: str) -> None:
    values = read_config_file(GOLDEN / name / "config.json")
    assert explicit_config(values) == MoondreamConfig.from_dict(values)


def test_incomplete_configs_raise() -> None:
    values = small_config().to_dict()
    del values["region"]
    with pytest.raises(CheckpointError, match=r"here has the sections text, vision, tokenizer; missing: region"):
        explicit_config(values, "here")
    with pytest.raises(CheckpointError, match=r"here: config: text\.dim must be an integer, got '64'"):
        explicit_config(small_config().to_dict() | {"text": {"dim": "64"}}, "here")
    with pytest.raises(CheckpointError, match="here: config: section 'text' must be an object"):
        explicit_config(small_config().to_dict() | {"text": 3}, "here")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null"])
def test_invalid_config_files_raise(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config_file(path)


def test_configs_round_trip_through_json() -> None:
    for release in RELEASES:
        assert MoondreamConfig.from_dict(json.loads(json.dumps(release.config.to_dict()))) == release.config
