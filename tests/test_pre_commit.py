"""Pre-commit hooks: fixtures stay unchanged, and all typed code is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / ".pre-commit-config.yaml"


@pytest.fixture(scope="module")
def hooks() -> dict[str, dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="reads .pre-commit-config.yaml")
    config = yaml.safe_load(CONFIG.read_text())
    return {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}


@pytest.mark.parametrize("name", ["end-of-file-fixer", "trailing-whitespace"])
def test_hooks_that_rewrite_files_skip_fixtures(name: str, hooks: dict[str, dict[str, Any]]) -> None:
    fixtures = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "data").rglob("*") if path.is_file()]
    assert any("/golden/" in path for path in fixtures)
    exclude = re.compile(hooks[name]["exclude"])
    assert [path for path in fixtures if not exclude.search(path)] == []
    assert not exclude.search("tests/conftest.py")


def test_mypy_runs_for_every_folder_it_checks(hooks: dict[str, dict[str, Any]]) -> None:
    listed = re.search(r"^\[tool\.mypy\]\nfiles = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed is not None
    folders = re.findall(r'"([^"]+)"', listed[1])
    assert len(folders) > 1
    files = re.compile(hooks["mypy"]["files"])
    assert [folder for folder in folders if not files.search(f"{folder}/module.py")] == []
