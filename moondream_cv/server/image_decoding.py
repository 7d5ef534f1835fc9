"""Decoding of images in separate processes, with a time limit and fair turns between clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, deque
from pathlib import Path

import numpy as np

from moondream_cv.errors import ImageError
from moondream_cv.server.image_decoder_process import FAILURE, READY, REPLY, REQUEST

_PIPE_BYTES = 2**20
_F_SETPIPE_SZ = 1031  # Linux fcntl command


class FairSlots:
    """A fixed number of slots that clients acquire in turn.

    With two slots or more, a single client never occupies all of them. Other clients therefore wait for at most one
    piece of work, however many pieces one client has queued.
    """

    def __init__(self, count: int) -> None:
        self._free, self._per_client = count, max(1, count - 1)
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # next client first

    async def acquire(self, client: str) -> None:
        """Wait for a slot. Call `release` once for each slot."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._assign()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # assigned in the same moment
                self.release(client)
            raise

    def release(self, client: str) -> None:
        """Release a slot."""
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._assign()

    def _assign(self) -> None:
        for client in list(self._waiting):
            turns = self._waiting[client]
            while turns and turns[0].done():  # cancelled
                turns.popleft()
            if not turns:
                del self._waiting[client]
            elif self._free and self._held[client] < self._per_client:
                self._free -= 1
                self._held[client] += 1
                turns.popleft().set_result(None)
                self._waiting.move_to_end(client)


class DecoderPool:
    """Decoder processes, which are started on demand. Thread-safe."""

    def __init__(self, max_pixels: int, timeout: float) -> None:
        """Create an empty pool.

        Args:
            max_pixels: Maximum number of pixels of an image.
            timeout: Time limit for one image, in seconds.
        """
        self._max_pixels, self._timeout = max_pixels, timeout
        self._idle: list[_DecoderProcess] = []
        self._lock = threading.Lock()
        self._closed = False

    def decode(self, file: bytes) -> np.ndarray:
        """Return the upright pixels of an image file, [H, W, 3] uint8 RGB.

        Raises:
            ImageError: The file is not a supported image, has too many pixels or takes too long to decode.
        """
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or _DecoderProcess(self._max_pixels)
        try:
            pixels = process.decode(file, self._timeout)
        finally:
            with self._lock:
                keep = process.alive and not self._closed
                if keep:
                    self._idle.append(process)
            if not keep:
                process.stop()
        return pixels

    def close(self) -> None:
        """Stop all idle processes; busy ones stop after their image."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.stop()


class _DecoderProcess:
    """One decoder process, used by one thread at a time."""

    def __init__(self, max_pixels: int) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moondream_cv.server.image_decoder_process", str(max_pixels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # image libraries print data of the files
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        if sys.platform == "linux":
            import fcntl

            for pipe in (self._requests, self._replies):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_BYTES)
        self.alive = True
        self._read_into(
            memoryview(bytearray(len(READY)))
        )  # so that the time limit of the first image excludes the start

    def decode(self, file: bytes, timeout: float) -> np.ndarray:
        """Return the pixels of an image file, like `DecoderPool.decode`. If the process failed, `alive` is False.

        Args:
            file: Content of the image file.
            timeout: Time limit in seconds.

        Raises:
            ImageError: The file cannot be decoded, or decoding took too long.
        """
        # Kill the process when the time is up
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()

        # Decode, and convert failures of the process to errors of the image
        try:
            return self._send_and_receive(file)
        except (EOFError, OSError) as error:
            self.alive = False
            if expired.is_set():
                raise ImageError(
                    f"the image of {len(file)} bytes took longer than {timeout:g} s to decode; send a smaller image"
                ) from error
            raise ImageError(f"the image of {len(file)} bytes cannot be decoded; convert it to PNG") from error
        finally:
            timer.cancel()
            if expired.is_set():
                self.alive = False

    def stop(self) -> None:
        """Kill the process and wait until it has ended."""
        self.alive = False
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.kill()
        self._process.wait()

    def _send_and_receive(self, file: bytes) -> np.ndarray:
        self._write(REQUEST.pack(len(file)))
        self._write(file)
        header = bytearray(REPLY.size)
        self._read_into(memoryview(header))
        kind, first, second = REPLY.unpack(header)
        if kind == FAILURE:
            message = bytearray(first)
            self._read_into(memoryview(message))
            raise ImageError(message.decode("utf-8", "replace"))
        pixels = np.empty((second, first, 3), np.uint8)
        self._read_into(pixels.data.cast("B"))
        return pixels

    def _write(self, data: bytes) -> None:
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[self._requests.write(remaining) :]

    def _read_into(self, buffer: memoryview) -> None:
        while buffer:
            count = self._replies.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise EOFError("the decoder process has ended")
            buffer = buffer[count:]
