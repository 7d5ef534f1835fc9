"""Fixtures that several folders share."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

from tests.helpers.signals import default_signals
from tests.helpers.system_tests import is_system_test

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel


# Without deadlines, which fail on busy machines
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make test-quick`."""
    parser.addoption("--cpu-limit", type=float, default=None, help="Maximum CPU time of a test in seconds.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start a server, a browser or another process; `make test-quick` leaves them out."""
    known: dict[object, bool] = {}
    for item in items:
        if is_system_test(item, known):
            item.add_marker("system")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test that exceeds the CPU limit. CPU time does not depend on the load of the machine."""
    limit = item.config.getoption("--cpu-limit")
    started = time.process_time()
    yield
    seconds = time.process_time() - started
    if limit is not None and seconds > limit:
        pytest.fail(f"took {seconds:.1f} s of CPU time, limit {limit:g} s: speed it up or mark it as slow")


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
