"""Fixtures that several folders share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.helpers.signals import default_signals
from tests.helpers.system_tests import is_system_test

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start a server, a browser or another process; `make test-quick` leaves them out."""
    known: dict[object, bool] = {}
    for item in items:
        if is_system_test(item, known):
            item.add_marker("system")


@pytest.fixture(scope="session", autouse=True)
def _default_signals() -> Iterator[None]:
    """Default signals for all tests, whatever signals pytest was started with."""
    with default_signals():
        yield


@pytest.fixture(scope="session")
def model() -> LocalModel:
    """Return a model with random weights, whose meaningless replies are the same every time."""
    from tests.helpers.models import random_model

    return random_model()


@pytest.fixture(scope="session")
def frame() -> np.ndarray:
    """[240, 320, 3] BGR noise of large blots."""
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), np.ones((20, 20, 1), np.uint8))
