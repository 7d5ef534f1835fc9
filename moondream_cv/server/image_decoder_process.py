"""The program of a decoder process: it reads image files from standard input and writes RGB pixels to standard output.

It is separate from the server so that a decoder that hangs, crashes or uses too much memory can be killed alone.
`image_decoding.py` starts it.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from typing import IO

from moondream_cv.errors import ImageError
from moondream_cv.images import readable_formats, to_rgb

REQUEST = struct.Struct(">Q")  # size of the file in bytes; then the file
REPLY = struct.Struct(">BII")  # PIXELS, width, height, then [H, W, 3] uint8 RGB; or FAILURE, size of the message, 0
PIXELS, FAILURE = 0, 1
READY = b"\x02"  # sent once, after all imports
_BASE_MEMORY = 2 * 2**30  # bytes of address space for the interpreter, libraries and the file
_BYTES_PER_PIXEL = 24  # address space for the conversion of 16-bit samples


def main() -> None:
    """Decode files until standard input ends. The first command-line argument is the maximum number of pixels."""
    max_pixels = int(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server closes the pipe
        signal.signal(number, signal.SIG_IGN)
    _limit_memory(_BASE_MEMORY + _BYTES_PER_PIXEL * max_pixels)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep output of libraries out of the replies
    readable_formats()
    replies.write(READY)
    replies.flush()
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        (size,) = REQUEST.unpack(header)
        file = requests.read(size)
        if len(file) < size:
            return
        _answer(file, max_pixels, replies)
        file = b""  # free the memory while the process waits


def _answer(file: bytes, max_pixels: int, replies: IO[bytes]) -> None:
    try:
        pixels = to_rgb(file, max_pixels=max_pixels)
    except ImageError as error:
        message = str(error).encode("utf-8", "replace")
        replies.write(REPLY.pack(FAILURE, len(message), 0))
        replies.write(message)
    else:
        replies.write(REPLY.pack(PIXELS, pixels.shape[1], pixels.shape[0]))
        replies.write(pixels.data.cast("B"))
    replies.flush()


def _limit_memory(size: int) -> None:
    if os.name != "posix":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or size < hard:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


if __name__ == "__main__":
    main()
