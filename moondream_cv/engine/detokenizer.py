"""Incremental detokenization: token IDs to text that can be shown immediately."""

from __future__ import annotations

from tokenizers import Tokenizer


class IncrementalDetokenizer:
    """Converts tokens to text one by one and returns text as soon as a word is complete.

    Returned text never ends within a character or a word. A word ends after a space, after a line break, or after a
    Chinese character, which is a word in itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start with empty text.

        Args:
            tokenizer: Tokenizer of the checkpoint.
        """
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_emitted = 0

    def add(self, token: int) -> str:
        """Add a token and return the text that it completes, which may be empty."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\n"):
            piece = text[self._num_emitted :]
            self._tokens, self._num_emitted = [], 0
            return piece
        stop = len(text) if text and _is_chinese(text[-1]) else text.rfind(" ", self._num_emitted) + 1
        piece = text[self._num_emitted : stop]
        self._num_emitted += len(piece)
        return piece

    @property
    def pending(self) -> str:
        """Text of the last, incomplete word, without the bytes of an incomplete character."""
        return self._tokenizer.decode(self._tokens)[self._num_emitted :].rstrip("\ufffd")

    def flush(self) -> str:
        """Return the remaining text at the end of the reply."""
        piece = self._tokenizer.decode(self._tokens)[self._num_emitted :]
        self._tokens, self._num_emitted = [], 0
        return piece


def _is_chinese(character: str) -> bool:
    code = ord(character)
    return 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x2F800 <= code <= 0x2FA1F
