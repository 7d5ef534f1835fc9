"""Window for `--show`, which shows annotated images."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from moondream_cv.video.writers.window import Window

_CLOSING_KEYS = (ord("q"), ord("Q"), 27)  # 27 is Esc
_POLL_MS = 50  # interval for checking keys and the window's close button


class ImageWindow:
    """A window that shows one image at a time. Any key shows the next image; q, Esc or the close button closes it."""

    def __init__(self, title: str) -> None:
        """Check that windows are available; the first image opens the window.

        Args:
            title: Title of the window.

        Raises:
            VideoError: There is no screen, or OpenCV has no window support.
        """
        from moondream_cv.video.writers.window import Window

        self._title = title
        self._window: Window | None = None
        self._closed = False
        Window(title).close()

    def show(self, image: Image.Image) -> None:
        """Show an RGB image and wait for a key. Does nothing after the window was closed.

        Raises:
            VideoError: The window cannot be shown.
        """
        if self._closed:
            return
        import cv2
        import numpy as np
        import supervision as sv

        from moondream_cv.video.sources.frame import Frame
        from moondream_cv.video.writers.window import Window

        window = self._window or Window(self._title)
        self._window = window
        frame = Frame(np.ascontiguousarray(np.asarray(image)[..., ::-1]), 0, 0.0)
        while not window.closed:
            window.write(frame, sv.Detections.empty())
            key = -1 if window.closed else cv2.waitKey(_POLL_MS)
            if key != -1 and key & 0xFF not in _CLOSING_KEYS:
                return
            if key != -1:
                window.close()
        self._closed = True

    def close(self) -> None:
        """Close the window. A second call does nothing."""
        self._closed = True
        if self._window is not None:
            self._window.close()
