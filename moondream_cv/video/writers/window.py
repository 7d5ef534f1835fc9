"""Show frames in a window, with OpenCV."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING

from moondream_cv.errors import VideoError
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.writers.base import Writer

if TYPE_CHECKING:
    import supervision as sv

_CLOSING_KEYS = (ord("q"), ord("Q"), 27)  # 27 is Esc
_MAX_INITIAL_SIZE = (1280, 800)  # maximum initial width and height in pixels; the user can enlarge the window


class Window(Writer):
    """Window that shows frames until the user closes it with q, Esc or its close button.

    Create and use it on one thread, which must be the main thread on macOS. Frames after closing are ignored.
    """

    def __init__(self, title: str) -> None:
        """Open the window. The first frame sets its size, limited to common screen sizes.

        Args:
            title: Title of the window, which must be unique.

        Raises:
            VideoError: There is no screen, or OpenCV has no window support.
        """
        self.title = title
        self._sized = self._closed = False
        _check_screen(title)
        try:
            import cv2
        except ImportError as error:
            raise VideoError(f"the window {title!r} needs OpenCV ({error}); pip install opencv-python") from error
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        except cv2.error as error:
            raise self._error(error) from error

    def __repr__(self) -> str:
        return f"Window({self.title!r}{', closed' if self._closed else ''})"

    @property
    def closed(self) -> bool:
        """Whether the window is closed, by the user or by `close`."""
        return self._closed

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Show an image, and process the events of the window. The detections are ignored.

        Raises:
            VideoError: The window cannot be shown.
        """
        if self._closed:
            return
        import cv2

        try:
            if not self._sized:
                self._resize(*frame.image.shape[1::-1])
            cv2.imshow(self.title, frame.image)
            key = cv2.waitKey(1) & 0xFF  # also runs the event loop, which draws the window
            visible = cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) >= 1
        except cv2.error as error:
            raise self._error(error) from error
        if key in _CLOSING_KEYS or not visible:
            self.close()

    def close(self) -> None:
        """Close the window. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        import cv2

        with contextlib.suppress(cv2.error):  # the close button has destroyed it already
            cv2.destroyWindow(self.title)
            cv2.waitKey(1)

    def _resize(self, width: int, height: int) -> None:
        import cv2

        self._sized = True
        scale = min(1.0, _MAX_INITIAL_SIZE[0] / width, _MAX_INITIAL_SIZE[1] / height)
        cv2.resizeWindow(self.title, max(1, round(width * scale)), max(1, round(height * scale)))

    def _error(self, error: Exception) -> VideoError:
        return VideoError(
            f"the window {self.title!r} cannot be shown: {' '.join(str(error).split())[:200]}; if "
            "opencv-python-headless is installed, pip uninstall it and pip install --force-reinstall opencv-python; "
            "otherwise write a file"
        )


def _check_screen(title: str) -> None:
    """Raise VideoError if there is no X server on Linux: without it, Qt aborts the process instead of raising."""
    if not sys.platform.startswith("linux") or os.environ.get("QT_QPA_PLATFORM", "xcb") != "xcb":
        return
    display = os.environ.get("DISPLAY")
    if not display and not os.environ.get("WAYLAND_DISPLAY"):
        raise VideoError(
            f"the window {title!r} cannot be shown: there is no screen (DISPLAY is not set); "
            "write a file instead, or connect with ssh -X"
        )
    if display and not _x_server_answers():
        raise VideoError(
            f"the window {title!r} cannot be shown: no screen answers at DISPLAY={display}; "
            "write a file instead, or fix DISPLAY"
        )


def _x_server_answers() -> bool:
    try:
        xcb = ctypes.CDLL("libxcb.so.1")
    except OSError:
        return True  # no library to check with; OpenCV bundles one
    xcb.xcb_connect.restype = ctypes.c_void_p
    connection = ctypes.c_void_p(xcb.xcb_connect(None, None))
    answers: bool = xcb.xcb_connection_has_error(connection) == 0
    xcb.xcb_disconnect(connection)
    return answers
