"""Images as clients send them: a data URI, bare base64, or a URL.

Nothing that a client sends is ever taken for a path of this machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from cachetools import LRUCache
from PIL import Image

from moondream_cv.errors import ImageError
from moondream_cv.server.decoding import Decoders, FairSlots
from moondream_cv.server.fetching import Fetcher
from moondream_cv.server.logs import client_address

_DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,30}:[/\\]{2}", re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class Pictures:
    """Opens images outside the event loop, fairly between clients.

    Files are decoded in processes with a time limit, and cut into crops in threads. The most recent ones are kept
    decoded: clients ask several questions about the same image.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        max_pixels: int,
        prepare: Callable[[np.ndarray], Any] = Image.fromarray,
        keep: int = 256 * 2**20,
        timeout: float = 10.0,
    ) -> None:
        """Start nothing yet.

        Args:
            fetcher: For URLs.
            max_pixels: Maximum width times height of an image, checked before it is decoded.
            prepare: Makes what the model takes of [H, W, 3] uint8 RGB; it is called in a thread.
            keep: Bytes of decoded images to keep.
            timeout: Time limit for decoding one image, in seconds.
        """
        self._fetcher, self._prepare = fetcher, prepare
        self._kept: LRUCache[bytes, Any] = LRUCache(keep, getsizeof=_nbytes)
        self._lock = threading.Lock()
        count = max(2, (os.cpu_count() or 1) - 1)
        self._slots, self._decoders = FairSlots(count), Decoders(max_pixels, timeout)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="moondream-cv decoding")

    async def open(self, value: str) -> Any:
        """The image that a client sent, in RGB and upright, as the model takes it; `size` is its (width, height).

        Args:
            value: A data URI, base64 text, or an http or https URL.

        Raises:
            ImageError: It is none of these, cannot be fetched or read, or has too many pixels.
        """
        text = value.strip()
        if not text:
            raise ImageError("the image is empty; send a data URI, base64 text or a URL")
        if _URL.match(text):
            encoded = await self._fetcher.fetch(text)
            return await self._in_turn(lambda: self._decode(encoded))
        return await self._in_turn(lambda: self._decode(decode_base64(text)))

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoders.close()
        await self._fetcher.close()

    async def _in_turn(self, work: Callable[[], Any]) -> Any:
        """Do something in a thread when it is the client's turn."""
        client, loop = client_address.get(), asyncio.get_running_loop()
        await self._slots.acquire(client)
        try:
            running = self._pool.submit(work)
        except BaseException:
            self._slots.release(client)
            raise

        def release(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._slots.release, client)

        running.add_done_callback(release)  # also if nobody waits any more: the thread is busy until then
        return await asyncio.wrap_future(running)

    def _decode(self, encoded: bytes) -> Any:
        key = hashlib.blake2b(encoded, digest_size=32).digest()
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            found = self._prepare(self._decoders.decode(encoded))
            with self._lock, contextlib.suppress(ValueError):  # one that is larger than all that may be kept
                self._kept[key] = found
        return found


def _nbytes(picture: Any) -> int:
    return int(getattr(picture, "nbytes", 3 * picture.size[0] * picture.size[1]))


def decode_base64(text: str) -> bytes:
    """The bytes of a data URI or of base64 text, with line breaks or without, in the usual or the URL-safe alphabet.

    Raises:
        ImageError: It is something else.
    """
    head = _DATA_URI.match(text)
    if head is not None and ";base64" not in head[0].lower():
        raise ImageError("a data URI must be in base64: data:image/jpeg;base64,...")
    body = text[head.end() :] if head else text
    try:
        try:
            return base64.b64decode(body, validate=True)
        except ValueError:  # what most clients send is in order, and mending takes several times as long
            mended = body.encode("ascii").translate(_URL_SAFE, delete=b" \t\r\n\f\v").rstrip(b"=")
            return base64.b64decode(mended + b"=" * (-len(mended) % 4), validate=True)
    except ValueError as error:
        shown = text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
        raise ImageError(f"{shown!r} is neither a data URI, base64 text nor an http(s) URL") from error
