"""Video: sources of frames, detection now and then, tracking in between, drawing and writing.

    from moondream_cv.video import annotate_video, track

    for frame, detections in track("in.mp4", ["dog", "person"], model="moondream2", every=5):
        ...
    annotate_video("in.mp4", "out.mp4", ["face"], annotate="blur")

Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moondream_cv._lazy import lazy_names

if TYPE_CHECKING:
    from .drawing.annotation import Annotator
    from .drawing.zones import Zones
    from .pipeline import Summary, annotate_video
    from .sources.frame import Frame
    from .sources.opening import Source, open_source
    from .stream import Tracked, Tracking, track, watch

__all__ = [
    "Annotator",
    "Frame",
    "Source",
    "Summary",
    "Tracked",
    "Tracking",
    "Zones",
    "annotate_video",
    "open_source",
    "track",
    "watch",
]

_SUBMODULES = {
    "Annotator": "drawing.annotation",
    "Frame": "sources.frame",
    "Source": "sources.opening",
    "Summary": "pipeline",
    "Tracked": "stream",
    "Tracking": "stream",
    "Zones": "drawing.zones",
    "annotate_video": "pipeline",
    "open_source": "sources.opening",
    "track": "stream",
    "watch": "stream",
}

__getattr__, __dir__ = lazy_names(__name__, _SUBMODULES)
