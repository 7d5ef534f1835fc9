"""Signal handling: SIGTERM and SIGHUP stop a command like Ctrl-C, so that it completes its output files."""

from __future__ import annotations

import signal
import threading
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP", "SIGBREAK")  # container or service manager, closed terminal, Windows
_INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """Raised in the main thread on a signal that stops the process.

    Attributes:
        status: Exit status, 128 plus the number of the signal, as in shells.
    """

    def __init__(self, number: int) -> None:
        """Create the exception for a signal number."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


def stop_on_signals() -> None:
    """Raise `Terminated` on SIGTERM and SIGHUP, unless the process ignores them, such as SIGHUP under nohup.

    Without a handler, process 1 of a container would ignore these signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status after Ctrl-C (130) or a signal (128 plus its number)."""
    return error.status if isinstance(error, Terminated) else _INTERRUPTED


def _stop(number: int, _frame: Any) -> None:
    raise Terminated(number)
