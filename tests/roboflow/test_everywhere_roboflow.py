"""The same boxes everywhere: in this process, from Roboflow's real server, and from ours beside it.

The local model is what runs behind both servers. Run with `make test-roboflow`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moondream_cv import connect
from moondream_cv.backends import DIALECTS, RoboflowInference
from moondream_cv.engine.local import LocalModel
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.served import served

pytest.register_assert_rewrite("tests.helpers.detector_suite")

from tests.helpers.detector_suite import DetectorBehaviour, Place, place_on  # noqa: E402

skip_without_server()
pytestmark = pytest.mark.roboflow


@pytest.fixture(scope="module")
def ours(tiny: LocalModel) -> Iterator[str]:
    """The URL of a server of ours."""
    with served(tiny) as server:
        yield server.url


def roboflow(url: str, image_format: str) -> Place:
    """Roboflow's server, which rounds corners and invents confidences."""
    model = RoboflowInference(url, api_key="", image_format=image_format)
    return Place(model, compressed=image_format == "jpeg", rounded=True, has_scores=False, points=False)


def connected(url: str) -> Place:
    """The same by its URL alone."""
    return Place(connect(url), address=url, compressed=True, rounded=True, has_scores=False, points=False)


@pytest.fixture(
    scope="module",
    params=["local", "Roboflow's png", "Roboflow's jpeg", "connect", *(f"our {dialect}" for dialect in DIALECTS)],
)
def place(request: pytest.FixtureRequest, tiny: LocalModel, url: str, ours: str) -> Iterator[Place]:
    kind, _, which = request.param.partition(" ")
    if kind == "local":
        yield Place(tiny)
        return
    opened = {
        "connect": lambda: connected(url),
        "Roboflow's": lambda: roboflow(url, which),
        "our": lambda: place_on(ours, which, "png"),
    }[kind]()
    with opened.model:
        yield opened


@pytest.fixture(scope="module")
def named(url: str) -> Iterator[Place]:
    opened = connected(url)
    with opened.model:
        yield opened


class TestEverywhere(DetectorBehaviour):
    """Local, Roboflow's server, and four dialects of ours."""
