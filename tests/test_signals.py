"""Tests start processes with default signals. Run with `pytest tests/test_signals.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.signals import default_signals

REPORT = """
import signal
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no signal masks")


def signals_of_a_child() -> list[str]:
    return subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def ignored() -> Iterator[None]:
    """SIGINT ignored, as `nohup ... &` does, and blocked."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGINT, before)


def test_test_run_has_default_signals() -> None:
    assert signals_of_a_child() == ["True", "0"]


def test_default_signals_reach_child_processes(ignored: None) -> None:
    assert signals_of_a_child() == ["False", "1"]
    with default_signals():
        assert signals_of_a_child() == ["True", "0"]
    assert signals_of_a_child() == ["False", "1"]
