"""Roboflow's real inference server in this process: its HTTP app under uvicorn, with the tiny model for Moondream 2.

Everything a client sees is computed by Roboflow's own code: routes, validation of requests, decoding of images, model
manager, registry, the adapter for Moondream 2 and what it makes of boxes. Only the network that would be fetched is
replaced, by a `LocalModel`, which has the same methods. What that refuses, the published model may answer: an empty or
very long prompt.

Tests marked roboflow use it, in the environment that `make venv-roboflow` creates.
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

from moondream_cv.engine.local import LocalModel

MODEL_IDS = ("moondream2", "moondream2/moondream2_2b_jul24", "moondream2/moondream2-2b")
MODEL_ID = MODEL_IDS[-1]

# No network, no telemetry, no model but this one.
ENVIRONMENT = {
    "CORE_MODELS_ENABLED": "False",
    "DISABLE_VERSION_CHECK": "True",
    "LOG_LEVEL": "CRITICAL",
    "METRICS_ENABLED": "False",
    "OFFLINE_MODE": "True",
    "TELEMETRY_OPT_OUT": "True",
    "WORKFLOWS_PLUGINS": "moondream_cv_blocks",
}
_STATIC_FOLDERS = ("static", "_next/static")  # of the landing page, which the wheel leaves out and the app insists on
_START_SECONDS = 240
_torchvision_schemas: list[Any] = []  # a Library takes its schemas with it when it is collected


def skip_without_server() -> None:
    """Skip the module that calls this where Roboflow's server is not installed."""
    if find_spec("inference") is None:
        pytest.skip("Roboflow's inference server is not installed: make test-roboflow", allow_module_level=True)


@contextmanager
def serve(model: LocalModel, folder: Path) -> Iterator[str]:
    """Run the app on a free port of this machine.

    Args:
        model: Answers for every id in `MODEL_IDS`.
        folder: Takes what the server writes.

    Yields:
        Its URL, without a slash at the end.
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
    """The app as Roboflow's container builds it for CPUs, without what watches usage and collects training data.

    Returns:
        A FastAPI app.
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
    """Roboflow's model manager, which has this model for Moondream 2; `prepare` comes first."""
    from inference.core.managers.base import ModelManager
    from inference.core.managers.decorators.fixed_size_cache import WithFixedSizeCache
    from inference.core.registries.roboflow import RoboflowModelRegistry
    from inference.models.utils import ROBOFLOW_MODEL_TYPES

    registry = RoboflowModelRegistry({**ROBOFLOW_MODEL_TYPES, ("lmm", "moondream2"): adapter_of(model)})
    return WithFixedSizeCache(ModelManager(model_registry=registry), max_size=8)


def adapter_of(model: LocalModel) -> type:
    """Roboflow's adapter for Moondream 2, which takes this model instead of fetching one of `MODEL_IDS`."""
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
    """Make this process one in which Roboflow's packages can be imported; they read the environment only then.

    The workflows engine has one configuration in a process: importing `roboflow_workflows` before `inference` sets
    another than the server's, which then refuses to be imported. Hence it is imported here.

    Args:
        folder: Takes what they write.
    """
    if "inference.core" not in sys.modules:
        os.environ.update(ENVIRONMENT, MODEL_CACHE_DIR=str(folder / "cache"))
    declare_torchvision_schemas()
    import_module("inference.core")


def declare_torchvision_schemas() -> None:
    """Let torchvision be imported where its operators cannot be loaded.

    PyPI's torchvision for Linux is built for CUDA. Beside a CPU build of torch its library of operators does not load,
    and the import fails, because its Python code describes two of them. Nothing here calls them.
    """
    import torch

    if _torchvision_schemas or _operators_load():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.append(library)


def encoded(rgb: np.ndarray, form: str = "PNG", **options: Any) -> str:
    """A picture as base64 of a file of this format."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, form, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def expected_boxes(tiny: LocalModel, image: Any, name: str = "dog") -> list[list[float]]:
    """What the server makes of the model's boxes: corners on whole pixels, then (x, y, width, height) about centres.

    Args:
        image: [H, W, 3] RGB.
    """
    width, height = Image.fromarray(image).size
    boxes = []
    for found in tiny.detect(Image.fromarray(image), name)["objects"]:
        left, right = (float(round(found[key] * width)) for key in ("x_min", "x_max"))
        top, bottom = (float(round(found[key] * height)) for key in ("y_min", "y_max"))
        boxes.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    return boxes


def boxes_of(reply: dict[str, Any]) -> list[list[float]]:
    """The same of a reply."""
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
    """The app remembers its static folders as given, relative to the working directory; those stay where they are."""
    from starlette.staticfiles import StaticFiles

    for route in app.routes:
        static = getattr(route, "app", None)
        if isinstance(static, StaticFiles):
            static.directory = folder / str(static.directory)
            static.all_directories = [static.directory]
