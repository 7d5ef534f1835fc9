"""Escaping of control characters in untrusted text."""

from __future__ import annotations

import logging

import pytest

from moondream_cv.escaping import EscapingFormatter, escaped

UNSAFE = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
UNSAFE += [0xD800, 0xDC80, 0xDFFF, 0xFEFF]


@pytest.mark.parametrize("code", UNSAFE)
def test_unsafe_characters_are_escaped(code: int) -> None:
    text = escaped(f"a{chr(code)}b")
    assert text.isascii()
    assert text.isprintable()
    assert (text[0], text[1], text[-1]) == ("a", "\\", "b")
    if chr(code) not in "\t\n":
        assert escaped(chr(code), multiline=True) == text[1:-1]


def test_other_characters_are_unchanged() -> None:
    text = "Ünïcode ← 猫 🐈 \\x1b [red] :cat: a\u0301 \u200d"
    assert escaped(text) == text
    assert escaped("\x1b[31m") == "\\x1b[31m"
    assert escaped("a\r\n\tb\n\rc", multiline=True) == "a\n\tb\n\\rc"


def text_of(error: BaseException | None = None, message: str = "%s", *args: object) -> str:
    record = logging.LogRecord("x", logging.INFO, "file", 1, message, args, None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
        record.exc_text = "cached\x1b by another formatter"
    return EscapingFormatter("%(levelname)s %(name)s %(message)s").format(record)


def test_messages_are_one_line() -> None:
    assert text_of(None, "%s|%s", "a\nFAKE\x1b[31m", "\u202e") == "INFO x a\\nFAKE\\x1b[31m|\\u202e"
    assert text_of(None, "%(a)s", {"a": "\r\u2028"}) == "INFO x \\r\\u2028"
    assert text_of(None, "bare\x85\ud800") == "INFO x bare\\x85\\ud800"


def test_lines_of_tracebacks_are_escaped_and_indented() -> None:
    try:
        try:
            raise ValueError("inner\n12:00:00 INFO forged\x1b[2J")
        except ValueError as cause:
            raise RuntimeError("outer\r\u2029") from cause
    except RuntimeError as error:
        first, *rest = text_of(error, "failed").split("\n")
    assert first == "INFO x failed"
    assert len(rest) > 6
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert rest[-1] == "    RuntimeError: outer\\r\\u2029"
    assert "    12:00:00 INFO forged\\x1b[2J" in rest


def test_stacks_and_exception_texts_of_other_processes_are_logged() -> None:
    record = logging.LogRecord("x", logging.INFO, "file", 1, "a", (), None, sinfo="Stack\n  line\x07")
    record.exc_text = "ValueError: \x9b"
    assert EscapingFormatter("%(message)s").format(record) == "a\n    ValueError: \\x9b\n    Stack\n      line\\x07"
