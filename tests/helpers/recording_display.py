"""A display of progress that records what it shows."""

from __future__ import annotations

import re


class Recorder:
    """A display that records its texts; "" is a cleared display."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def show(self, text: str) -> None:
        self.texts.append(text)

    def clear(self) -> None:
        self.texts.append("")

    def matches(self, pattern: str) -> list[str]:
        """Return the texts that match a pattern completely."""
        return [text for text in self.texts if re.fullmatch(pattern, text)]
