"""Moondream 2 as a computer-vision component: frames in, `sv.Detections` out.

    from moondream_cv import Detector

    detections = Detector("moondream2")(frame, ["person", "red car"])

Names are imported when they are first used: `import moondream_cv` alone imports neither torch nor supervision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moondream_cv._lazy import lazy_names

if TYPE_CHECKING:
    from .backends import connect
    from .detector import Detector, Pointer
    from .errors import BackendError, CheckpointError, ImageError, MoondreamError, UnsupportedSkill, VideoError
    from .loading import download, load
    from .requests import Caption, Chat, Detect, ErrorResult, Gaze, Point, Query, Settings, Turn
    from .vision_model import VisionModel

__version__ = "0.1.0"
"""Version of the package."""

__all__ = [
    "BackendError",
    "Caption",
    "Chat",
    "CheckpointError",
    "Detect",
    "Detector",
    "ErrorResult",
    "Gaze",
    "ImageError",
    "MoondreamError",
    "Point",
    "Pointer",
    "Query",
    "Settings",
    "Turn",
    "UnsupportedSkill",
    "VideoError",
    "VisionModel",
    "__version__",
    "connect",
    "download",
    "load",
]

_SUBMODULES = {
    "BackendError": "errors",
    "Caption": "requests",
    "Chat": "requests",
    "CheckpointError": "errors",
    "Detect": "requests",
    "Detector": "detector",
    "ErrorResult": "requests",
    "Gaze": "requests",
    "ImageError": "errors",
    "MoondreamError": "errors",
    "Point": "requests",
    "Pointer": "detector",
    "Query": "requests",
    "Settings": "requests",
    "Turn": "requests",
    "UnsupportedSkill": "errors",
    "VideoError": "errors",
    "VisionModel": "vision_model",
    "connect": "backends",
    "download": "loading",
    "load": "loading",
}

__getattr__, __dir__ = lazy_names(__name__, _SUBMODULES)
