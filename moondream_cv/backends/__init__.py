"""Remote models: servers of four dialects as `VisionModel`s.

    from moondream_cv import Detector, connect

    detections = Detector(connect("http://localhost:9001"))(frame, "dog")

A model in this process is left to `moondream_cv.load`.
"""

from moondream_cv.backends.addresses import is_url
from moondream_cv.backends.base import RemoteModel
from moondream_cv.backends.connecting import DIALECTS, connect
from moondream_cv.backends.fal import Fal
from moondream_cv.backends.moondream import MoondreamAPI
from moondream_cv.backends.openai import OpenAICompatible
from moondream_cv.backends.roboflow import RoboflowInference

__all__ = [
    "DIALECTS",
    "Fal",
    "MoondreamAPI",
    "OpenAICompatible",
    "RemoteModel",
    "RoboflowInference",
    "connect",
    "is_url",
]
