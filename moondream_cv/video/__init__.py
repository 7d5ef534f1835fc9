"""Video: sources, detection on keyframes, tracking, annotation and writers.

    from moondream_cv.video import annotate_video, track

    for frame, detections in track("in.mp4", ["dog", "person"], model="moondream2", every=5):
        ...
    annotate_video("in.mp4", "out.mp4", ["face"], annotate="blur")

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moondream_cv._lazy import lazy_names

if TYPE_CHECKING:
    from .drawing.annotation import Annotator
    from .drawing.zones import Zones
    from .online import OnlineTracker
    from .pipeline import Summary, annotate_video
    from .sources.frame import Frame
    from .sources.opening import Source, open_source
    from .stream import track, track_streams
    from .stream_context import TrackedFrame
    from .tracking.settings import Tracking

__all__ = [
    "Annotator",
    "Frame",
    "OnlineTracker",
    "Source",
    "Summary",
    "TrackedFrame",
    "Tracking",
    "Zones",
    "annotate_video",
    "open_source",
    "track",
    "track_streams",
]

_SUBMODULES = {
    "Annotator": "drawing.annotation",
    "Frame": "sources.frame",
    "OnlineTracker": "online",
    "Source": "sources.opening",
    "Summary": "pipeline",
    "TrackedFrame": "stream_context",
    "Tracking": "tracking.settings",
    "Zones": "drawing.zones",
    "annotate_video": "pipeline",
    "open_source": "sources.opening",
    "track": "stream",
    "track_streams": "stream",
}

__getattr__, __dir__ = lazy_names(__name__, _SUBMODULES, renamed={"Tracked": "TrackedFrame", "watch": "track_streams"})
