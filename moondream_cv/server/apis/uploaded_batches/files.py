"""`RandomAccessFile`: a temporary file that several threads read and write at offsets."""

from __future__ import annotations

import tempfile
import threading


class FileClosedError(Exception):
    """The file was closed, and its content is gone."""


class RandomAccessFile:
    """A temporary file without a name, which disappears with the process, however the process ends. Thread-safe.

    The file is in the folder for temporary files, which the environment variable `TMPDIR` selects.
    """

    def __init__(self) -> None:
        """Create an empty file.

        Raises:
            OSError: The file cannot be created.
        """
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `close`
        self._lock = threading.Lock()

    def write(self, offset: int, content: bytes) -> None:
        """Write bytes.

        Args:
            offset: Position of the first byte.
            content: Bytes to write.

        Raises:
            FileClosedError: The file was closed.
            OSError: The bytes cannot be written, because the disk is full, for example.
        """
        left = memoryview(content)
        with self._lock:
            self._check_open()
            self._file.seek(offset)
            while left:
                left = left[self._file.write(left) or 0 :]

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer than `size` at the end of the file.

        Args:
            offset: Position of the first byte.
            size: Number of bytes.

        Raises:
            FileClosedError: The file was closed.
            OSError: The bytes cannot be read.
        """
        with self._lock:
            self._check_open()
            self._file.seek(offset)
            return self._file.read(size) or b""

    def close(self) -> None:
        """Delete the file. Later calls do nothing."""
        with self._lock:
            self._file.close()

    def _check_open(self) -> None:
        if self._file.closed:
            raise FileClosedError
