"""Remote models: clients for servers in four dialects, each a `VisionModel`.

from moondream_cv import Detector, connect

detections = Detector(connect("http://localhost:9001"))(frame, "dog")
"""

from moondream_cv.backends.base import RemoteModel
from moondream_cv.backends.dialects import DIALECTS, connect
from moondream_cv.backends.fal import Fal
from moondream_cv.backends.moondream import MoondreamAPI
from moondream_cv.backends.openai import OpenAICompatible
from moondream_cv.backends.roboflow import RoboflowInference
from moondream_cv.urls import is_url

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
