"""Loads the images of clients, which are data URIs, base64 text or URLs.

Input of clients is never interpreted as a file path.
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
from moondream_cv.server.fetching import Fetcher
from moondream_cv.server.image_decoding import DecoderPool, FairSlots
from moondream_cv.server.logs import client_address

_DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,30}:[/\\]{2}", re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class ImageLoader:
    """Loads and preprocesses images outside the event loop, fairly between clients.

    Files are decoded in separate processes with a time limit, and preprocessed in threads. Recent images are cached,
    because clients ask several questions about the same image.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        max_pixels: int,
        preprocess: Callable[[np.ndarray], Any] = Image.fromarray,
        keep: int = 256 * 2**20,
        timeout: float = 10.0,
    ) -> None:
        """Create a loader; processes and threads are started when they are needed.

        Args:
            fetcher: Downloads image URLs.
            max_pixels: Maximum number of pixels of an image, checked before decoding.
            preprocess: Converts [H, W, 3] uint8 RGB to the form that the model uses. It is called in a thread.
            keep: Size of the cache in bytes.
            timeout: Time limit for decoding one image, in seconds.
        """
        self._fetcher, self._preprocess = fetcher, preprocess
        self._cache: LRUCache[bytes, Any] = LRUCache(keep, getsizeof=_nbytes)
        self._lock = threading.Lock()
        count = max(2, (os.cpu_count() or 1) - 1)
        self._slots, self._decoders = FairSlots(count), DecoderPool(max_pixels, timeout)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="moondream-cv decoding")

    async def open(self, value: str) -> Any:
        """Return an image of a client, upright, in RGB and preprocessed.

        Args:
            value: A data URI, base64 text, or an http or https URL.

        Returns:
            The image as `preprocess` returns it; `size` is its (width, height) in pixels.

        Raises:
            ImageError: The value has another form, or the image cannot be downloaded or read or has too many pixels.
        """
        text = value.strip()
        if not text:
            raise ImageError("the image must not be empty; send a data URI, base64 text or a URL")
        if _URL.match(text):
            encoded = await self._fetcher.fetch(text)
            return await self._run_in_thread(lambda: self._load(encoded))
        return await self._run_in_thread(lambda: self._load(decode_base64(text)))

    async def close(self) -> None:
        """Stop the threads, the decoder processes and the downloads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoders.close()
        await self._fetcher.close()

    async def _run_in_thread(self, work: Callable[[], Any]) -> Any:
        """Run a function in a thread, in the client's turn."""
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

        running.add_done_callback(release)  # not earlier, even if the caller is cancelled: the thread is still busy
        return await asyncio.wrap_future(running)

    def _load(self, encoded: bytes) -> Any:
        """Return the preprocessed image of a file, from the cache if possible."""
        key = hashlib.blake2b(encoded, digest_size=32).digest()
        with self._lock:
            image = self._cache.get(key)
        if image is None:
            image = self._preprocess(self._decoders.decode(encoded))
            with self._lock, contextlib.suppress(ValueError):  # the image is larger than the cache
                self._cache[key] = image
        return image


def _nbytes(image: Any) -> int:
    return int(getattr(image, "nbytes", 3 * image.size[0] * image.size[1]))


def decode_base64(text: str) -> bytes:
    """Return the bytes of a data URI or of base64 text.

    Args:
        text: A data URI or base64 text, in the standard or the URL-safe alphabet, with or without line breaks.

    Raises:
        ImageError: The text is neither.
    """
    head = _DATA_URI.match(text)
    if head is not None and ";base64" not in head[0].lower():
        raise ImageError("a data URI must be in base64: data:image/jpeg;base64,...")
    body = text[head.end() :] if head else text
    try:
        try:
            return base64.b64decode(body, validate=True)
        except ValueError:  # most clients send standard base64, and normalizing takes several times as long
            normalized = body.encode("ascii").translate(_URL_SAFE, delete=b" \t\r\n\f\v").rstrip(b"=")
            return base64.b64decode(normalized + b"=" * (-len(normalized) % 4), validate=True)
    except ValueError as error:
        shown = text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
        raise ImageError(f"{shown!r} is neither a data URI, base64 text nor an http(s) URL") from error
