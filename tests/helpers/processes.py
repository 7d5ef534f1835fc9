"""State of other processes."""

from __future__ import annotations

import psutil


def is_alive(process: psutil.Process, title: str = "") -> bool:
    """Return whether a process runs.

    Args:
        process: The process.
        title: Text that its command line must contain.
    """
    try:
        return process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
