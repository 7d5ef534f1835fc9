"""Tokenizers: checks against the config, and control tokens in prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig, TextConfig
from moondream_cv.model.releases import MOONDREAM_2B_EARLIER, read_config_file
from moondream_cv.model.tokenizer import control_ids, prepare_tokenizer, read_tokenizer
from tests.helpers.small_checkpoint import CONTROL_TOKENS, byte_tokenizer, small_config

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def written(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_in_a_prompt_are_plain_text(tmp_path: Path, special: bool) -> None:
    tokenizer = read_tokenizer(written(tmp_path, byte_tokenizer(special=special)), small_config())
    controls = set(control_ids(small_config().tokenizer).values())
    for token in CONTROL_TOKENS:
        ids = tokenizer.encode(f"dog{token} cat").ids
        assert not controls & set(ids), token
        assert tokenizer.decode(ids) == f"dog{token} cat"


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_golden_tokenizers_encode_control_tokens_as_text(name: str) -> None:
    config = MoondreamConfig.from_dict(read_config_file(GOLDEN / name / "config.json"))
    tokenizer = read_tokenizer(GOLDEN / name / "tokenizer.json", config)
    for token in ("<|endoftext|>", "<|answer|>", "<|coord|>"):
        assert min(tokenizer.encode(f" {token}").ids) > 9


def test_truncation_in_the_file_is_disabled(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    ids = read_tokenizer(written(tmp_path, tokenizer), small_config()).encode("a dog").ids
    assert len(ids) == 5


def test_too_large_vocabulary_raises(tmp_path: Path) -> None:
    path = written(tmp_path, byte_tokenizer([*CONTROL_TOKENS, *(f"<|more_{i}|>" for i in range(20))]))
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json belongs to another model: its largest ID is 285.* has 272"
    ):
        read_tokenizer(path, small_config())


def test_tokenizer_without_control_tokens_raises(tmp_path: Path) -> None:
    path = written(tmp_path, byte_tokenizer([]))
    with pytest.raises(CheckpointError, match=r"ID 0 must be a control token \(bos_id\), got '!'"):
        read_tokenizer(path, small_config())
    path = written(tmp_path, byte_tokenizer(CONTROL_TOKENS[:5]))
    with pytest.raises(CheckpointError, match=r"ID 5 must be a control token \(coord_id\), got '!'"):
        read_tokenizer(path, small_config())


def test_earlier_releases_need_only_bos_and_eos() -> None:
    config = MOONDREAM_2B_EARLIER
    assert set(control_ids(config.tokenizer)) == {"bos_id", "eos_id"}
    with pytest.raises(CheckpointError, match=r"ID 50256 must be a control token \(bos_id\), got None"):
        prepare_tokenizer(byte_tokenizer(), config)


@pytest.mark.parametrize("content", ["", "{}", "null", json.dumps({"version": "1.0", "model": {"type": "??"}})])
def test_invalid_tokenizer_files_raise(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(path, small_config())
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tokenizer(tmp_path / "missing.json", small_config())


def test_checkpoint_may_have_a_larger_vocabulary() -> None:
    assert prepare_tokenizer(byte_tokenizer(), MoondreamConfig(text=TextConfig())).encode_special_tokens
