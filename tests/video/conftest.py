"""Fixtures for tests of videos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.clips import deadline, numbered_image, write_clip
from tests.helpers.streams import FPS, SIZE


@pytest.fixture(autouse=True)
def _time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("slow") else deadline(240):
        yield


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """250 numbered frames."""
    return [numbered_image(number, SIZE) for number in range(250)]


@pytest.fixture(scope="session")
def clip(images: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Video of 48 frames, of which the last one is no keyframe at intervals of 5 and 15."""
    return write_clip(tmp_path_factory.mktemp("clips") / "street.mp4", images[:48], fps=FPS)
