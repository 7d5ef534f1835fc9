"""Wait for events instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    condition: Callable[[], bool], seconds: float = 240, message: str = "the condition never became true"
) -> None:
    """Wait until a condition is true that another thread or process brings about.

    Args:
        condition: Called every few milliseconds.
        seconds: Limit that only ends a test that hangs.
        message: Text of the error.

    Raises:
        AssertionError: The limit has passed.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.005)
