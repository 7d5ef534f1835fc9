"""The marker `system` follows from the code of tests, fixtures and helpers."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.helpers.system_tests import MODULES, uses_processes


def run_python() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def call_helper() -> None:
    run_python()


class Runner:
    def start(self) -> None:
        call_helper()


def compute() -> int:
    return len("subprocess")


@pytest.mark.parametrize("value", [run_python, call_helper, Runner, subprocess, subprocess.run])
def test_code_that_reaches_a_listed_module_is_found(value: object) -> None:
    assert uses_processes(value, {})


@pytest.mark.parametrize("value", [compute, sys, str, 1, None])
def test_other_code_is_not_marked(value: object) -> None:
    assert not uses_processes(value, {})


def test_listed_modules_exist() -> None:
    own = [name for name in MODULES if name.startswith(("moondream_cv.", "tests."))]
    assert [name for name in own if find_spec(name) is None] == []
