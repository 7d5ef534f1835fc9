"""The detector suite for the tiny model in this process, and on `moondream-cv serve` through every dialect.

`tests/roboflow` runs it with Roboflow's own server.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from moondream_cv import Detector, connect, load
from moondream_cv.backends import DIALECTS, MoondreamAPI
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import BackendError
from tests.helpers.color_model import ColorModel, color_frame
from tests.helpers.served import served

pytest.register_assert_rewrite("tests.helpers.detector_suite")

from tests.helpers.detector_suite import Deployment, DetectorSuite, deployment_on, wide  # noqa: E402

pytest.importorskip("inference_sdk")


@pytest.fixture(scope="module")
def tiny() -> Iterator[LocalModel]:
    with load("tiny", device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def url(tiny: LocalModel) -> Iterator[str]:
    """Run `moondream-cv serve` with the tiny model, and return its URL."""
    with served(tiny) as server:
        yield server.url


def open_deployment(name: str, tiny: LocalModel, url: str) -> Deployment:
    """Return a deployment by name; the caller closes its model unless it is the local one."""
    if name == "local":
        return Deployment(tiny, address="tiny")
    if name == "connect":
        return Deployment(connect(url), address=url, compressed=True)
    return deployment_on(url, *name.split())


@pytest.fixture(
    scope="module",
    params=["local", "connect", *(f"{dialect} {form}" for dialect in DIALECTS for form in ("png", "jpeg"))],
)
def deployment(request: pytest.FixtureRequest, tiny: LocalModel, url: str) -> Iterator[Deployment]:
    opened = open_deployment(request.param, tiny, url)
    yield opened
    if opened.model is not tiny:
        opened.model.close()


@pytest.fixture(scope="module", params=["local", "connect"])
def addressable(request: pytest.FixtureRequest, tiny: LocalModel, url: str) -> Iterator[Deployment]:
    opened = open_deployment(request.param, tiny, url)
    yield opened
    if opened.model is not tiny:
        opened.model.close()


class TestDetectorBackends(DetectorSuite):
    """The local model, and the server in four dialects."""


def test_own_server_is_identified_as_moondream(url: str) -> None:
    with connect(url) as model:
        assert type(model) is MoondreamAPI


@pytest.fixture(scope="module")
def limited_url(tiny: LocalModel) -> Iterator[str]:
    """Run a server with a low pixel limit, and return its URL."""
    with served(tiny, max_pixels=100_000) as server:
        yield server.url


@pytest.mark.parametrize("dialect", DIALECTS)
def test_frame_that_the_server_rejects(limited_url: str, tiny: LocalModel, dialect: str) -> None:
    deployment = deployment_on(limited_url, dialect, "png")
    large = np.zeros((400, 400, 3), np.uint8)
    with deployment.model as model:
        with pytest.raises(BackendError, match="400x400 pixels, the limit is 100,000"):
            Detector(model)([wide(), large], "dog")
        first, refused, last = Detector(model, on_error="empty")([wide(), large, wide()], ["object", "dog"])
    exact = Detector(tiny)(wide(), ["object", "dog"])
    for found in (first, last):
        deployment.check(found, exact)
    assert len(refused) == 0


@pytest.fixture(scope="module")
def crowded_url() -> Iterator[str]:
    """Run a server that detects red patches, and return its URL."""
    with served(ColorModel()) as server:
        yield server.url


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("most", [50, 55])
def test_truncated_list_is_marked(crowded_url: str, dialect: str, most: int) -> None:
    frame = color_frame(*[("red", (x, 10, x + 5, 20)) for x in range(0, 600, 10)], size_wh=(600, 40))
    with deployment_on(crowded_url, dialect, "png").model as model:
        found, local = (
            Detector(each, max_objects=most, mark_truncated=True)(frame, "red") for each in (model, ColorModel())
        )
    assert len(local) == most
    assert np.asarray(local.data["truncated"]).all()
    if dialect == "roboflow":  # its requests cannot set a limit above the default of 50
        local = local[:50]
    np.testing.assert_array_equal(found.data["truncated"], local.data["truncated"])
    np.testing.assert_allclose(found.xyxy, local.xyxy, rtol=0, atol=1e-3)
