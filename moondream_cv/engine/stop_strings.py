"""Detection of stop strings in text that is generated piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Truncates text before the first stop string, and holds back text that could be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Start with empty text.

        Args:
            stop: Non-empty strings that end the text.
        """
        self._stop = tuple(stop)
        self._held = ""

    def add(self, piece: str, pending: str = "") -> tuple[str, bool]:
        """Append a piece of text.

        Args:
            piece: Text that follows the earlier pieces.
            pending: Text after `piece` that the caller does not emit yet. It is only searched, and is part of the next
                piece.

        Returns:
            Text that can be emitted, and whether a stop string was found. If so, the text ends before it.
        """
        held = self._held + piece
        text = held + pending
        found = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        safe = min([len(held), *(_partial_match(text, stop) for stop in self._stop)])
        self._held = held[safe:]
        return held[:safe], False

    def flush(self) -> str:
        """Return the text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _partial_match(text: str, stop: str) -> int:
    """Return the index from which the rest of `text` is a prefix of `stop`, or the length of `text`."""
    for start in range(max(0, len(text) - len(stop) + 1), len(text)):
        if stop.startswith(text[start:]):
            return start
    return len(text)
