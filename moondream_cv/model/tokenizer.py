"""The tokenizer of a checkpoint: reading, checks against the config, and control tokens treated as text in prompts."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer

from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig, TokenizerConfig

logger = logging.getLogger(__name__)


def read_tokenizer(path: str | Path, config: MoondreamConfig) -> Tokenizer:
    """Read a `tokenizer.json`.

    The text of a control token within a prompt is encoded as plain text.

    Args:
        path: Path of the file.
        config: Configuration of the checkpoint.

    Raises:
        CheckpointError: The file cannot be read, or is not the tokenizer that the checkpoint was trained with.
    """
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
    return prepare_tokenizer(tokenizer, config, str(path))


def prepare_tokenizer(tokenizer: Tokenizer, config: MoondreamConfig, where: str = "the tokenizer") -> Tokenizer:
    """Check a tokenizer against a config and set it to encode prompts as plain text.

    Args:
        tokenizer: Tokenizer; it is modified.
        config: Configuration of the checkpoint.
        where: Name of the tokenizer in error messages.

    Returns:
        The same tokenizer.

    Raises:
        CheckpointError: It is not the tokenizer that the checkpoint was trained with.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.text.vocab_size:
        raise CheckpointError(
            f"{where} belongs to another model: its largest ID is {largest}, and the vocabulary of the checkpoint has "
            f"{config.text.vocab_size} tokens"
        )
    added = tokenizer.get_added_tokens_decoder()
    for name, token_id in control_ids(config.tokenizer).items():
        text = tokenizer.id_to_token(token_id)
        if text is None or (token_id not in added and not (text.startswith("<") and text.endswith(">"))):
            raise CheckpointError(
                f"{where} belongs to another model: ID {token_id} must be a control token ({name}), got {text!r}"
            )
    unspecial = [added[i] for i in control_ids(config.tokenizer).values() if i in added and not added[i].special]
    if unspecial:
        tokenizer.add_special_tokens(unspecial)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def control_ids(config: TokenizerConfig) -> dict[str, int]:
    """Return the IDs of the control tokens, by their names in the config.

    Releases whose prompts do not end with the answer token have only the tokens for beginning and end.
    """
    ids = {"bos_id": config.bos_id, "eos_id": config.eos_id}
    if config.has_control_tokens:
        names = ("answer_id", "thinking_id", "coord_id", "size_id", "start_ground_points_id", "end_ground_id")
        ids |= {name: getattr(config, name) for name in names}
    return ids
