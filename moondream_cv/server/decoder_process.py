"""The program of a decoder process: image files in, RGB pixels out, over standard input and output.

It runs apart from the server so that a decoder that hangs, crashes or takes too much memory can be ended alone.
`decoding` starts it and describes the messages.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from typing import IO

from moondream_cv.errors import ImageError
from moondream_cv.images import readable_formats, to_rgb

REQUEST = struct.Struct(">Q")  # bytes of the file, which follows
REPLY = struct.Struct(">BII")  # PIXELS, width, height, then [H, W, 3] uint8 RGB; or FAILURE, bytes of the message, 0
PIXELS, FAILURE = 0, 1
READY = b"\x02"  # sent once, when everything is imported
_BASE_MEMORY = 2 * 2**30  # bytes of address space: interpreter, libraries, and the file itself
_BYTES_PER_PIXEL = 24  # of address space, while 16-bit samples are converted


def main() -> None:
    """Decode files until standard input ends. The first argument is the maximum number of pixels."""
    max_pixels = int(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server closes the pipe when it stops
        signal.signal(number, signal.SIG_IGN)
    _limit_memory(_BASE_MEMORY + _BYTES_PER_PIXEL * max_pixels)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    readable_formats()
    replies.write(READY)
    replies.flush()
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        (size,) = REQUEST.unpack(header)
        file = requests.read(size)
        if len(file) < size:
            return
        _answer(file, max_pixels, replies)
        file = b""  # not kept while the process waits for the next one


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
