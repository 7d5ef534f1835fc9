"""Memory that glibc keeps after large requests: it is returned to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from functools import lru_cache
from typing import Any

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE_BLOCK = 2**20  # bytes
_TRIM_SECONDS = 1.0  # between two times


def release_large_blocks() -> None:
    """Return blocks of 1 MiB and more to the system when they are freed; by default, glibc starts to keep them."""
    with contextlib.suppress(AttributeError):  # another C library
        _libc().mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


class MemoryTrimmer:
    """Returns what small blocks leave free, at most once per second."""

    def __init__(self) -> None:
        self._last = 0.0

    def trim(self) -> None:
        """Return free memory to the system; takes some milliseconds."""
        if time.monotonic() - self._last >= _TRIM_SECONDS:
            with contextlib.suppress(AttributeError):
                _libc().malloc_trim(0)
            self._last = time.monotonic()


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
