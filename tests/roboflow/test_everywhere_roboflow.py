"""Test that a local model, Roboflow's inference server and `moondream-cv serve` return the same detections.

Both servers run the local model. Run with `make test-roboflow`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moondream_cv import connect
from moondream_cv.backends import DIALECTS, RoboflowInference
from moondream_cv.engine.local_model import LocalModel
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.served import served

pytest.register_assert_rewrite("tests.helpers.detector_suite")

from tests.helpers.detector_suite import Deployment, DetectorSuite, deployment_on  # noqa: E402

skip_without_server()
pytestmark = pytest.mark.roboflow


@pytest.fixture(scope="module")
def served_url(tiny: LocalModel) -> Iterator[str]:
    """Return the URL of `moondream-cv serve` with the tiny model."""
    with served(tiny) as server:
        yield server.url


def roboflow(url: str, image_format: str) -> Deployment:
    """Return Roboflow's server, which rounds corners and has no real confidences."""
    model = RoboflowInference(url, api_key="", image_format=image_format)
    return Deployment(model, compressed=image_format == "jpeg", rounded=True, has_scores=False, points=False)


def connected(url: str) -> Deployment:
    """Return Roboflow's server, connected by its URL."""
    return Deployment(connect(url), address=url, compressed=True, rounded=True, has_scores=False, points=False)


@pytest.fixture(
    scope="module",
    params=["local", "Roboflow's png", "Roboflow's jpeg", "connect", *(f"our {dialect}" for dialect in DIALECTS)],
)
def deployment(request: pytest.FixtureRequest, tiny: LocalModel, url: str, served_url: str) -> Iterator[Deployment]:
    kind, _, which = request.param.partition(" ")
    if kind == "local":
        yield Deployment(tiny)
        return
    opened = {
        "connect": lambda: connected(url),
        "Roboflow's": lambda: roboflow(url, which),
        "our": lambda: deployment_on(served_url, which, "png"),
    }[kind]()
    with opened.model:
        yield opened


@pytest.fixture(scope="module")
def addressable(url: str) -> Iterator[Deployment]:
    opened = connected(url)
    with opened.model:
        yield opened


class TestEverywhere(DetectorSuite):
    """Run the detector tests on the local model, Roboflow's server, and all dialects of `moondream-cv serve`."""
