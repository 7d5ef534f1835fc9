"""Fixtures for the remote models: a server with prepared replies, a frame, and an environment without API keys."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.helpers.remote_server import RemoteServer, remote_server

KEYS = ("API_KEY", "FAL_KEY", "MOONDREAM_API_KEY", "OPENAI_API_KEY", "ROBOFLOW_API_KEY")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        yield running


@pytest.fixture(scope="session")
def frame() -> np.ndarray:
    """Return [40, 50, 3] BGR: blue, with an orange patch."""
    pixels = np.full((40, 50, 3), (200, 60, 20), np.uint8)
    pixels[10:30, 5:25] = (0, 128, 255)
    return pixels
