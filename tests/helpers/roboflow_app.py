"""Roboflow's inference server in this process: its HTTP app under uvicorn, with the tiny model as Moondream 2.

Roboflow's code handles routes, validation, image decoding, the model manager, the registry and the adapter for
Moondream 2. Only the network is replaced, by a `LocalModel` with the same methods. The published model accepts some
requests that a `LocalModel` rejects, such as empty or very long prompts.

Tests with the marker roboflow use it, in the environment that `make venv-roboflow` creates.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel

MODEL_IDS = ("moondream2", "moondream2/moondream2_2b_jul24", "moondream2/moondream2-2b")
MODEL_ID = MODEL_IDS[-1]

# No network, no telemetry and no other models.
ENVIRONMENT = {
    "CORE_MODELS_ENABLED": "False",
    "DISABLE_VERSION_CHECK": "True",
    "LOG_LEVEL": "CRITICAL",
    "METRICS_ENABLED": "False",
    "OFFLINE_MODE": "True",
    "TELEMETRY_OPT_OUT": "True",
    "WORKFLOWS_PLUGINS": "moondream_cv_blocks",
}
_STATIC_FOLDERS = ("static", "_next/static")  # the app requires the landing page, which the wheel lacks
_START_SECONDS = 240
_torchvision_schemas: list[Any] = []  # keeps each Library alive, because its schemas are removed with it


def skip_without_server() -> None:
    """Skip the calling module if Roboflow's server is not installed."""
    if find_spec("inference") is None:
        pytest.skip("Roboflow's inference server is not installed; run make test-roboflow", allow_module_level=True)


@contextmanager
def serve(model: LocalModel, folder: Path) -> Iterator[str]:
    """Run the app on a free local port.

    Args:
        model: Model for every ID in `MODEL_IDS`.
        folder: Folder for the files that the server writes.

    Yields:
        URL of the server, without a trailing slash.
    """
    import uvicorn

    config = uvicorn.Config(create_app(model, folder), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="roboflow-app", daemon=True)
    thread.start()
    try:
        end = time.monotonic() + _START_SECONDS
        while not server.started:
            assert thread.is_alive(), "the app stopped while starting"
            assert time.monotonic() < end, f"the app did not start within {_START_SECONDS} s"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_START_SECONDS)


def create_app(model: LocalModel, folder: Path) -> Any:
    """Return the FastAPI app of Roboflow's CPU container, without usage tracking and active learning.

    Args:
        model: Model for every ID in `MODEL_IDS`.
        folder: Folder for the files that the server writes.
    """
    prepare(folder)
    from inference.core.interfaces.http.http_api import HttpInterface

    manager = model_manager(model)
    landing = folder / "inference" / "landing" / "out"
    for name in _STATIC_FOLDERS:
        (landing / name).mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        app = HttpInterface(manager).app
    finally:
        os.chdir(before)
    _make_absolute(app, folder)
    return app


def model_manager(model: LocalModel) -> Any:
    """Return Roboflow's model manager with a model as Moondream 2. Call `prepare` first."""
    from inference.core.managers.base import ModelManager
    from inference.core.managers.decorators.fixed_size_cache import WithFixedSizeCache
    from inference.core.registries.roboflow import RoboflowModelRegistry
    from inference.models.utils import ROBOFLOW_MODEL_TYPES

    registry = RoboflowModelRegistry({**ROBOFLOW_MODEL_TYPES, ("lmm", "moondream2"): adapter_of(model)})
    return WithFixedSizeCache(ModelManager(model_registry=registry), max_size=8)


def adapter_of(model: LocalModel) -> type:
    """Return Roboflow's adapter for Moondream 2 with a model instead of a download."""
    import torch
    from inference.core.models.base import Model
    from inference.models.moondream2.moondream2_inference_models import InferenceModelsMoondream2Adapter
    from inference_models.entities import ResolvedModelMetadata
    from inference_models.models.moondream2.moondream2_hf import MoonDream2HF

    class TinyMoondream2(InferenceModelsMoondream2Adapter):  # type: ignore[misc]
        def __init__(self, model_id: str, api_key: str | None = None, **options: Any) -> None:
            if model_id not in MODEL_IDS:
                super().__init__(model_id, api_key, **options)
                return
            Model.__init__(self)
            self.metrics = {"num_inferences": 0, "avg_inference_time": 0.0}
            self.api_key, self.task_type = api_key, "llm"
            self._model = MoonDream2HF(model=model, device=torch.device("cpu"))
            self._model.resolved_model = ResolvedModelMetadata(model_id, "tiny", "hugging-face", "fp32")

    return TinyMoondream2


def prepare(folder: Path) -> None:
    """Set the environment for Roboflow's packages and import `inference`.

    The workflows engine is configured once per process. If `roboflow_workflows` is imported before `inference`, the
    configuration differs from that of the server, and the import of `inference` fails.

    Args:
        folder: Folder for the files that the packages write.
    """
    if "inference.core" not in sys.modules:
        os.environ.update(ENVIRONMENT, MODEL_CACHE_DIR=str(folder / "cache"))
    declare_torchvision_schemas()
    import_module("inference.core")


def declare_torchvision_schemas() -> None:
    """Declare the operators of torchvision if they cannot be loaded, so that torchvision can be imported.

    PyPI's torchvision for Linux is built for CUDA. With a CPU build of torch, its operators do not load, and the import
    fails, because its Python code refers to two of them. The tests do not call them.
    """
    import torch

    if _torchvision_schemas or _operators_load():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.append(library)


def encoded(rgb: np.ndarray, form: str = "PNG", **options: Any) -> str:
    """Return an image as a base64 file of a format."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, form, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def expected_boxes(tiny: LocalModel, image: Any, name: str = "dog") -> list[list[float]]:
    """Return the boxes that the server is expected to return: center x, center y, width and height in pixels.

    The server rounds corners to whole pixels.

    Args:
        tiny: Model of the server.
        image: [H, W, 3] RGB.
        name: Class name.
    """
    width, height = Image.fromarray(image).size
    boxes = []
    for found in tiny.detect(Image.fromarray(image), name)["objects"]:
        left, right = (float(round(found[key] * width)) for key in ("x_min", "x_max"))
        top, bottom = (float(round(found[key] * height)) for key in ("y_min", "y_max"))
        boxes.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    return boxes


def boxes_of(reply: dict[str, Any]) -> list[list[float]]:
    """Return the boxes of a response: center x, center y, width and height in pixels."""
    return [[found[key] for key in ("x", "y", "width", "height")] for found in reply["predictions"]]


def _operators_load() -> bool:
    import torch

    spec = find_spec("torchvision")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for path in (path for folder in folders for path in Path(folder).glob("_C.*")):
        try:
            torch.ops.load_library(path)
        except OSError:
            return False
        return True
    return False


def _make_absolute(app: Any, folder: Path) -> None:
    """Make the static folders of the app absolute, because the working directory is restored after its creation."""
    from starlette.staticfiles import StaticFiles

    for route in app.routes:
        static = getattr(route, "app", None)
        if isinstance(static, StaticFiles):
            static.directory = folder / str(static.directory)
            static.all_directories = [static.directory]
