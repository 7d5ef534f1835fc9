"""One server of the tiny model for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from moondream_cv import scenes
from moondream_cv.engine.local import LocalModel
from moondream_cv.loading import load
from tests.helpers.served import Served, data_uri, served


@pytest.fixture(scope="session")
def tiny() -> LocalModel:
    return load("tiny", cache_images=8)


@pytest.fixture(scope="session")
def server(tiny: LocalModel) -> Iterator[Served]:
    with served(tiny) as running:
        yield running


@pytest.fixture(scope="session")
def scene() -> scenes.Scene:
    """What the tiny model gets right: a red circle, a blue square, a cat."""
    return scenes.render_scene(5, resolution_wh=(320, 240), names=("red circle", "blue square", "cat"), style="plain")


@pytest.fixture(scope="session")
def picture(scene: scenes.Scene) -> Image.Image:
    return Image.fromarray(scene.image)


@pytest.fixture(scope="session")
def uri(picture: Image.Image) -> str:
    """The picture as a lossless data URI."""
    return data_uri(picture)
