"""Escaping of untrusted text, so that it cannot forge log lines or control a terminal."""

from __future__ import annotations

import logging
import re

# Control characters, line and paragraph separators, marks that change the direction of text, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_UNSAFE_IN_TEXT = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
_INDENT = "    "


def escaped(text: str, multiline: bool = False) -> str:
    r"""Return text with unsafe characters escaped as in a Python string, such as `\x1b`.

    Args:
        text: Untrusted text.
        multiline: Keep tabs and line feeds; a carriage return before a line feed is removed.
    """
    if multiline:
        return _UNSAFE_IN_TEXT.sub(_escape, text.replace("\r\n", "\n"))
    return _UNSAFE.sub(_escape, text)


class EscapingFormatter(logging.Formatter):
    """Formats a log record as one line, followed by the indented lines of a traceback, which may quote client data."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text without unsafe characters."""
        record.message = record.getMessage()
        if self.usesTime():
            record.asctime = self.formatTime(record, self.datefmt)
        # `record.exc_text` may come from another handler's formatter, so it is used only if there is no exception.
        trace = self.formatException(record.exc_info) if record.exc_info else record.exc_text or ""
        stack = self.formatStack(record.stack_info) if record.stack_info else ""
        details = [_INDENT + escaped(line) for text in (trace, stack) if text for line in text.split("\n")]
        return "\n".join([escaped(self.formatMessage(record)), *details])


def _escape(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]
