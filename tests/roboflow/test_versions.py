"""Test that the installed versions of Roboflow's engine are those that users get."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.roboflow_app import skip_without_server

skip_without_server()
pytestmark = pytest.mark.roboflow

ROOT = Path(__file__).parents[2]
NEWER = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints/roboflow_newer.txt").read_text(), re.MULTILINE))
EXTRA = re.findall(r'^workflows = \["([^"]+)", "([^"]+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["roboflow-workflows", "streamvision", "inference-models"])
def test_pinned_version_of_the_engine_is_installed(name: str) -> None:
    assert version(name) == NEWER[name]


def test_extra_allows_the_pinned_versions_and_those_of_the_server() -> None:
    ((engine, runner),) = EXTRA
    for requirement, pinned in ((Requirement(engine), "0.2.13"), (Requirement(runner), "0.1.3")):
        assert requirement.specifier.contains(NEWER[requirement.name])
        assert requirement.specifier.contains(pinned)  # the version that inference 1.8.3 requires
