"""Child processes with default signals, whatever this process was started with.

Started by `nohup` or in the background of a shell, a process ignores SIGINT, and its children inherit that.
"""

from __future__ import annotations

import signal


def default_signals() -> None:
    """Restore default signals; for `preexec_fn=` of `subprocess`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
