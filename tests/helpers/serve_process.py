"""`moondream-cv serve` in a separate process, for tests that stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import httpx

LIMIT_SECONDS = 900  # Ray starts several processes, which takes minutes on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServeProcess:
    """A process that runs `moondream-cv serve`."""

    def __init__(self, *arguments: str, key: str | None = None, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open while the process runs
        self._finetunes = tempfile.TemporaryDirectory()
        environment = {"MOONDREAM_CV_FINETUNES": self._finetunes.name, **os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("MOONDREAM_CV_API_KEYS", None)
        if key is not None:
            environment["MOONDREAM_CV_API_KEYS"] = key
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moondream_cv", "serve", "--port", str(self.port), *arguments],
            stderr=self._log,  # an unread pipe would block the server when it is full
            stdout=subprocess.DEVNULL,
            env=environment,
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.finish()[1]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not become ready")

    def end(self, sig: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit status and the standard error output."""
        self.process.send_signal(sig)
        return self.finish()

    def finish(self) -> tuple[int, str]:
        """Wait until the process exits; return the exit status and the standard error output."""
        status = self.process.wait(timeout=LIMIT_SECONDS)
        self._log.seek(0)
        return status, self._log.read().decode()


@contextlib.contextmanager
def serving(*arguments: str, key: str | None = None) -> Iterator[ServeProcess]:
    running = ServeProcess(*arguments, key=key)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.process.kill()
        running.process.wait()
