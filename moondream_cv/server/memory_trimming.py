"""Returns memory that glibc keeps after large requests to the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from functools import lru_cache
from typing import Any

_M_MMAP_THRESHOLD = -3  # from malloc.h of glibc
_LARGE_BLOCK = 2**20  # bytes
_TRIM_SECONDS = 1.0  # minimum time between two calls of malloc_trim


def release_large_blocks() -> None:
    """Return blocks of 1 MiB and more to the system when they are freed; by default, glibc starts to keep them."""
    with contextlib.suppress(AttributeError):  # another C library
        _libc().mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


class MemoryTrimmer:
    """Returns free memory between small blocks to the system, at most once per second."""

    def __init__(self) -> None:
        self._last = 0.0

    def trim(self) -> None:
        """Return free memory to the system. This takes a few milliseconds."""
        if time.monotonic() - self._last >= _TRIM_SECONDS:
            with contextlib.suppress(AttributeError):
                _libc().malloc_trim(0)
            self._last = time.monotonic()


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
