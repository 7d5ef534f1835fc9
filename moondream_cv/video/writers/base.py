"""What takes frames and detections: the `Writer` protocol, and what the writers of files share.

The writers themselves: `video_file` (H.264), `json_lines`, `mot` and `window`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.frame import Frame

if TYPE_CHECKING:
    import supervision as sv

logger = logging.getLogger(__name__)

STANDARD_OUTPUT = "-"

_Self = TypeVar("_Self", bound="Writer")


class Writer(Protocol):
    """Takes frames one after another, each with what was found on it.

    As a context manager it closes itself, after an exception as well; whoever derives from it inherits that.
    """

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Take one frame.

        Args:
            frame: Its image is what is to be seen: already annotated.
            detections: What was found on it, in pixels of the image, with `data["class_name"]`.

        Raises:
            VideoError: The frame cannot be written; the message names the target.
        """
        ...

    def close(self) -> None:
        """Complete what was written. A second call does nothing.

        Raises:
            VideoError: It cannot be completed. After a `write` that failed, close logs this instead.
        """
        ...

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except VideoError as second:
            if error is None:
                raise
            logger.warning("%s", second)  # the first error is the one to be seen


class TextTarget:
    """A text file, standard output or an open text stream, whose reader sees every line at once."""

    def __init__(self, target: str | Path | TextIO) -> None:
        """Open the target; an existing file is written anew.

        Args:
            target: A path (`~` is expanded), "-" for standard output, or a text stream, which is not closed.

        Raises:
            VideoError: The file cannot be written.
        """
        self._closed = self._failed = False
        if target == STANDARD_OUTPUT:
            self.name, self._stream, self._owned = "standard output", sys.stdout, False
        elif isinstance(target, (str, Path)):
            self.name, self._owned = str(target), True
            try:
                self._stream = Path(target).expanduser().open("w", encoding="utf-8", newline="\n")
            except (OSError, RuntimeError, ValueError) as error:  # "~nobody", a NUL in the path
                raise VideoError(f"{self.name} {cannot_be_written(Path(target), error)}") from error
        else:
            self.name, self._stream, self._owned = str(getattr(target, "name", "the text stream")), target, False

    def write(self, text: str) -> None:
        """Write lines, which end in a newline each.

        Raises:
            VideoError: They cannot be written, or the target is closed.
        """
        if self._closed:
            raise VideoError(f"{self.name} is closed; make a new writer")
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed by whoever opened it
            self._failed = True
            raise VideoError(f"{self.name} cannot be written on: {reason(error)}") from error

    def close(self) -> None:
        """Close a file that was opened here. A second call does nothing.

        Raises:
            VideoError: The file cannot be completed, and no `write` failed before.
        """
        if self._closed:
            return
        self._closed = True
        if not self._owned:
            return
        try:
            self._stream.close()
        except OSError as error:
            if not self._failed:
                raise VideoError(f"{self.name} cannot be completed: {reason(error)}") from error


class TextWriter(Writer):
    """A writer of lines of text."""

    def __init__(self, target: str | Path | TextIO) -> None:
        """Open the target; an existing file is written anew.

        Args:
            target: A path, "-" for standard output, or a text stream, which is flushed but not closed.

        Raises:
            VideoError: The file cannot be written.
        """
        self._target = TextTarget(target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target.name!r})"

    def close(self) -> None:
        """Close the file. A second call does nothing.

        Raises:
            VideoError: The file cannot be completed, and no `write` failed before.
        """
        self._target.close()


def cannot_be_written(path: Path, error: Exception | None = None) -> str:
    """Say why a file cannot be written at a path, and the way out; to follow the file's name in a message."""
    full = os.path.expanduser(path)  # os.path: Path's own methods raise where a name is too long
    folder = os.path.dirname(full) or "."
    if os.path.isdir(full):
        return f"is a folder; name a file in it, such as {path / 'output'}{path.suffix}"
    if not os.path.lexists(folder) and "\0" not in full:
        return f"cannot be written: there is no folder {folder}; make it first (mkdir -p)"
    if not os.path.isdir(folder):
        return f"cannot be written: {folder} is not a folder; choose another place"
    why = "it is not a regular file" if error is None else reason(error)
    return f"cannot be written: {why}; choose another name or place, or mend the permissions of {folder}"


def reason(error: BaseException) -> str:
    """Return what an error says, without the path that a message already names."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text or type(error).__name__
