"""Fixtures of the server tests: one server of the tiny model for all tests that only send requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from moondream_cv import scenes
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.loading import load
from tests.helpers.served import Served, data_uri, served


@pytest.fixture(scope="session", autouse=True)
def _finetunes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep finetunes out of the data folder of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONDREAM_CV_FINETUNES", str(tmp_path_factory.mktemp("finetunes")))
        yield


@pytest.fixture(scope="session")
def tiny() -> LocalModel:
    return load("tiny", cache_images=8)


@pytest.fixture(scope="session")
def server(tiny: LocalModel) -> Iterator[Served]:
    with served(tiny) as running:
        yield running


@pytest.fixture(scope="session")
def scene() -> scenes.Scene:
    """A scene that the tiny model detects correctly: a red circle, a blue square and a cat."""
    return scenes.render_scene(5, resolution_wh=(320, 240), names=("red circle", "blue square", "cat"), style="plain")


@pytest.fixture(scope="session")
def scene_image(scene: scenes.Scene) -> Image.Image:
    return Image.fromarray(scene.image)


@pytest.fixture(scope="session")
def uri(scene_image: Image.Image) -> str:
    """The scene as a lossless data URI."""
    return data_uri(scene_image)
