"""The detokenizer never splits a character or a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.engine.detokenizer import IncrementalDetokenizer
from moondream_cv.training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
TOKENIZER.encode_special_tokens = True  # as in every loaded tokenizer: "<|size|>" in a prompt is text


def pieces_of(text: str) -> list[str]:
    stream = IncrementalDetokenizer(TOKENIZER)
    pieces = [stream.add(token) for token in TOKENIZER.encode(text).ids]
    return [p for p in [*pieces, stream.flush()] if p]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A red circle and a dog.", ["A ", "red ", "circle ", "and ", "a ", "dog."]),
        ("one\ntwo three", ["one\n", "two ", "three"]),
        ("红色圆形", ["红", "色", "圆", "形"]),
        ("naïve café", ["naïve ", "café"]),
        ("😀😀 ok", ["😀😀 ", "ok"]),
        ("", []),
    ],
)
def test_text_is_emitted_word_by_word(text: str, pieces: list[str]) -> None:
    assert pieces_of(text) == pieces


@given(st.text(max_size=60))
def test_emitted_pieces_concatenate_to_the_text(text: str) -> None:
    assert "".join(pieces_of(text)) == text


@given(st.text(max_size=60))
def test_pieces_contain_no_partial_characters(text: str) -> None:
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces_of(text))
