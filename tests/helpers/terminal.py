"""A process on a pseudoterminal, and what its screen shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.waiting import until

# Makes the terminal the controlling one, so that Ctrl-C reaches the process.
_ATTACH = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+|\x1b")


class TerminalProcess:
    """A Python process whose standard streams are a terminal.

    Attributes:
        output: Everything that the process has written so far.
    """

    def __init__(self, code: str, cwd: Path, environment: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            code: Python code to run.
            cwd: Working directory.
            environment: Environment variables.
        """
        import pty
        import termios

        master, slave = pty.openpty()
        termios.tcsetwinsize(master, (30, 100)) if hasattr(termios, "tcsetwinsize") else None
        self._master = master
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ATTACH + code],
            cwd=cwd,
            env={**environment, "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        data = b""
        while True:
            try:
                new = os.read(self._master, 65536)
            except OSError:  # the process has ended
                return
            if not new:
                return
            data += new
            self.output = data.decode("utf-8", "replace")

    @property
    def screen(self) -> list[str]:
        """Lines of the screen, without trailing spaces and without empty lines."""
        return [line for line in screen_of(self.output) if line]

    @property
    def cursor_is_visible(self) -> bool:
        """Whether the last control sequence about the cursor shows it."""
        states = re.findall(r"\x1b\[\?25([hl])", self.output)
        return not states or states[-1] == "h"

    def wait_for(self, pattern: str) -> None:
        """Wait until the output contains a pattern.

        Raises:
            AssertionError: The process has ended, or the limit has passed.
        """
        until(
            lambda: re.search(pattern, self.output) is not None or self._process.poll() is not None,
            message=f"{pattern!r} is not in {self.output!r}",
        )
        assert re.search(pattern, self.output), self.output

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self._master, b"\x03")

    def wait(self) -> int:
        """Wait for the end of the process, and return its exit status."""
        status = self._process.wait(timeout=240)
        self._reader.join(timeout=240)
        return status

    def close(self) -> None:
        """Kill the process if it still runs."""
        self._process.kill()
        self.wait()
        os.close(self._master)


def screen_of(output: str) -> list[str]:
    """Return the lines of a terminal after some output: text, line breaks, and the sequences of status lines."""
    lines, row, column = [""], 0, 0
    for match in _CONTROL.finditer(output):
        text, parameters, command = match[0], match[1], match[2]
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif command == "A":
            row = max(0, row - int(parameters or 1))
        elif command == "K":
            lines[row] = "" if parameters == "2" else lines[row][:column]
        elif command is None:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]
