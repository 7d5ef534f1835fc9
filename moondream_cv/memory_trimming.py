"""Returns memory that glibc keeps after it was freed to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from functools import lru_cache
from typing import Any

_M_MMAP_THRESHOLD = -3  # from malloc.h of glibc
LOADING_INTERVAL = 0.1  # seconds between trims while weights are loaded or converted
_LARGE_BLOCK = 2**20  # bytes


def release_large_blocks() -> None:
    """Return blocks of 1 MiB and more to the system when they are freed; by default, glibc starts to keep them."""
    with contextlib.suppress(AttributeError):  # another C library
        _libc().mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


class MemoryTrimmer:
    """Returns free memory between used blocks to the system, at limited intervals."""

    def __init__(self, interval_seconds: float = 1.0) -> None:
        """Create a trimmer.

        Args:
            interval_seconds: Minimum time between two trims.
        """
        self._interval_seconds, self._last = interval_seconds, 0.0

    def trim(self) -> None:
        """Return free memory to the system, unless the last trim was too recent."""
        if time.monotonic() - self._last >= self._interval_seconds:
            trim_memory()
            self._last = time.monotonic()


def trim_memory() -> None:
    """Return free memory between used blocks to the system. This takes a few milliseconds."""
    with contextlib.suppress(AttributeError):
        _libc().malloc_trim(0)


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
