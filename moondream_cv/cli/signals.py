"""Signal handling: Ctrl-C at any point; SIGTERM and SIGHUP stop a command like Ctrl-C.

Python runs signal handlers only between operators of PyTorch or calls of other libraries, and it takes up to a second
to unload PyTorch. `exit_on_interrupt` does not wait for either.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_NAMES = ("SIGTERM", "SIGHUP", "SIGBREAK")  # container or service manager, closed terminal, Windows
_INTERRUPTED = 130
_SHOW_CURSOR = "\x1b[?25h"
_CLEAR_LINE = "\r\x1b[2K"
_is_command_line = False  # whether this process runs a command and nothing else


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
    global _is_command_line
    if threading.current_thread() is not threading.main_thread():
        return
    _is_command_line = True
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)


@contextmanager
def exit_on_interrupt(seconds: float = 0.5) -> Iterator[None]:
    """End the process when Ctrl-C interrupts the `with` statement, with one line and without unloading libraries.

    If a long operator prevents Python from raising `KeyboardInterrupt` in time, the process ends without cleanup.
    Commands that complete files after Ctrl-C must not use this. It does nothing unless `stop_on_signals` was called.

    Args:
        seconds: Time for Python to raise `KeyboardInterrupt`.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not _is_command_line or threading.current_thread() is not threading.main_thread() or not is_default:
        yield
        return
    handled = threading.Event()

    def handle(*_: Any) -> None:
        handled.set()
        raise KeyboardInterrupt

    def watch() -> None:
        with receiver:
            while received := receiver.recv(1):  # empty at the end of the `with` statement
                if received[0] != signal.SIGINT:
                    continue
                if not handled.wait(seconds):
                    _exit_interrupted()

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, handle)
    threading.Thread(target=watch, name="moondream-cv interrupts", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Terminated):
            raise
        _exit_interrupted()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(descriptor)
        sender.close()


def interrupted_line() -> str:
    """Return the line that a command prints after Ctrl-C. On a terminal it replaces a status line."""
    try:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        is_terminal = False
    return f"{_CLEAR_LINE}{_SHOW_CURSOR}Interrupted" if is_terminal else "Interrupted"


def exit_process(status: int) -> NoReturn:
    """End the process without waiting for its threads and without unloading libraries.

    It raises `SystemExit` unless `stop_on_signals` was called.

    Args:
        status: Exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if _is_command_line:
        os._exit(status)
    sys.exit(status)


def _exit_interrupted() -> NoReturn:
    with suppress(OSError):
        os.write(2, f"{interrupted_line()}\n".encode())
    exit_process(_INTERRUPTED)


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status after Ctrl-C (130) or a signal (128 plus its number)."""
    return error.status if isinstance(error, Terminated) else _INTERRUPTED


def _stop(number: int, _frame: Any) -> None:
    raise Terminated(number)
