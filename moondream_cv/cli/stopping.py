"""SIGTERM and SIGHUP stop a command like Ctrl-C does, so that it completes its files before it exits."""

from __future__ import annotations

import signal
import threading
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP", "SIGBREAK")  # a container or service manager; a terminal that closes; Windows
_INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """Raised in the main thread when a signal asks the process to stop.

    Attributes:
        status: Exit status, 128 plus the signal's number, as shells have it.
    """

    def __init__(self, number: int) -> None:
        """Remember which signal it was."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


def stop_on_signals() -> None:
    """Raise `Terminated` on SIGTERM and SIGHUP, unless the process ignores them, as it does SIGHUP under nohup.

    As process 1 of a container, a process without a handler would not stop at all.
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
