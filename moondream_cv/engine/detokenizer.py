"""From tokens to text that can be shown at once: never a part of a character, never a part of a word."""

from __future__ import annotations

from tokenizers import Tokenizer


class WordStream:
    """Takes tokens, gives text whenever a word is complete.

    A piece ends behind a space, behind a line, or behind a Chinese character, which is a word by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """Add a token; give back the text that is complete with it, perhaps none."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\n"):
            piece = text[self._given :]
            self._tokens, self._given = [], 0
            return piece
        stop = len(text) if text and _is_chinese(text[-1]) else text.rfind(" ", self._given) + 1
        piece = text[self._given : stop]
        self._given += len(piece)
        return piece

    @property
    def pending(self) -> str:
        """Text of the last, incomplete word, without the bytes of an incomplete character."""
        return self._tokenizer.decode(self._tokens)[self._given :].rstrip("\ufffd")

    def rest(self) -> str:
        """Give back what is left at the end."""
        piece = self._tokenizer.decode(self._tokens)[self._given :]
        self._tokens, self._given = [], 0
        return piece


def _is_chinese(character: str) -> bool:
    code = ord(character)
    return 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x2F800 <= code <= 0x2FA1F
