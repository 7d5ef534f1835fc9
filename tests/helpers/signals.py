"""Default signal handling for the tests and the processes that they start.

Processes started by `nohup ... &` ignore SIGINT, and their children inherit this. So do processes started by many CI
systems.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

NAMES = ("SIGINT", "SIGTERM", "SIGCHLD")  # not SIGHUP: a test run under nohup must survive its terminal


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """Restore the default handling of ignored signals and unblock all signals until the block ends."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ()) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
