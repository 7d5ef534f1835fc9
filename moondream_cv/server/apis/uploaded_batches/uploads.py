"""`Upload`: the parts of one file, which clients send in any order and in parallel."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, Iterable, Iterator
from typing import NamedTuple

from moondream_cv.server.apis.uploaded_batches.files import RandomAccessFile
from moondream_cv.server.errors import ServerError

MAX_BYTES = 2 * 2**30  # maximum size of one file
MAX_PARTS = 1000
BLOCK = 2**20  # bytes that are read or written at once


class Part(NamedTuple):
    """A received part.

    Attributes:
        offset: Position in the file on the disk.
        size: Size in bytes.
        etag: MD5 hash in hexadecimal digits.
    """

    offset: int
    size: int
    etag: str


class Upload:
    """The parts of one file, in a file on the disk.

    Parts are stored in the order of their arrival. Space of failed and replaced parts is used again, so that retries do
    not fill the disk.
    """

    def __init__(self) -> None:
        """Create an upload without parts.

        Raises:
            OSError: The file cannot be created.
        """
        self._file = RandomAccessFile()
        self._parts: dict[int, Part] = {}
        self._free: list[tuple[int, int]] = []  # offsets and sizes
        self._end = 0
        self._complete: list[Part] = []

    async def add_part(self, number: int, size: int, content: AsyncIterable[bytes]) -> Part:
        """Store a part. It replaces an earlier part with the same number.

        Args:
            number: Number of the part, at least 1.
            size: Size of the part in bytes.
            content: Content of the part in pieces of any size.

        Raises:
            ServerError: 413; the file is too large.
            FileClosedError: The upload was closed.
            OSError: The part cannot be written.
        """
        offset = self._reserve(size)
        digest, position = hashlib.md5(usedforsecurity=False), offset
        try:
            async for block in _join_pieces(content):
                digest.update(block)
                await asyncio.to_thread(self._file.write, position, block)
                position += len(block)
            if position != offset + size:
                raise ServerError(400, f"the part must have {size:,} bytes, got {position - offset:,}")
        except BaseException:
            self._free.append((offset, size))
            raise
        if number in self._parts:
            self._free.append(self._parts[number][:2])
        part = self._parts[number] = Part(offset, size, digest.hexdigest())
        return part

    def complete(self, etags: dict[int, str]) -> int:
        """Set the parts of the file, in the order of their numbers. Parts that arrive later are not used.

        Args:
            etags: ETag of each part, by number.

        Returns:
            Size of the file in bytes.

        Raises:
            ServerError: 400; a part is missing or has another ETag.
        """
        if not etags:
            raise ServerError(400, "parts must not be empty", param="parts")
        for number, etag in etags.items():
            if number not in self._parts:
                raise ServerError(400, f"part {number} was not uploaded; upload it again", param="parts")
            if etag.strip('"') != self._parts[number].etag:
                message = f"part {number} has the ETag {self._parts[number].etag!r}, got {etag!r:.80}; upload it again"
                raise ServerError(400, message, param="parts")
        self._complete = [self._parts[number] for number in sorted(etags)]
        return sum(part.size for part in self._complete)

    def blocks(self) -> Iterator[bytes]:
        """Yield the content of the complete file.

        Raises:
            FileClosedError: The upload was closed.
            OSError: The file cannot be read.
        """
        for offset, size, _ in self._complete:
            for start in range(0, size, BLOCK):
                yield self._file.read(offset + start, min(BLOCK, size - start))

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def _reserve(self, size: int) -> int:
        """Return the offset of free space for a part."""
        for index, (offset, free) in enumerate(self._free):
            if size <= free:
                self._free[index] = (offset + size, free - size)
                return offset
        if self._end + size > MAX_BYTES:
            raise ServerError(413, f"the file must have at most {MAX_BYTES:,} bytes; send several batches")
        self._end += size
        return self._end - size


def split_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a file that are not blank; None in place of a line that is too long.

    Args:
        blocks: Content of the file.
        max_bytes: Maximum size of a line in bytes.
    """
    line, is_long, is_first = bytearray(), False, True
    for block in _with_final_newline(blocks):
        if is_first:
            block, is_first = block.removeprefix(b"\xef\xbb\xbf"), False
        *ended, rest = block.split(b"\n")
        for piece in ended:
            if is_long or len(line) + len(piece) > max_bytes:
                yield None
            elif stripped := bytes(line + piece).strip():
                yield stripped
            line, is_long = bytearray(), False
        if is_long or len(line) + len(rest) > max_bytes:
            line, is_long = bytearray(), True
        else:
            line += rest


def _with_final_newline(blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b"\n"


async def _join_pieces(pieces: AsyncIterable[bytes]) -> AsyncIterable[bytes]:
    """Yield blocks of at least `BLOCK` bytes, because each is written by a thread."""
    block = bytearray()
    async for piece in pieces:
        block += piece
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
