"""Fixtures for the tests with labeling tools."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moondream_cv import load
from moondream_cv.engine.local_model import LocalModel


@pytest.fixture(scope="session")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


@pytest.fixture(scope="session")
def fiftyone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for FiftyOne's database and models. FiftyOne reads its settings on import, once per process."""
    folder = tmp_path_factory.mktemp("fiftyone")
    os.environ |= {
        "FIFTYONE_CONFIG_PATH": str(folder / "config.json"),
        "FIFTYONE_DATABASE_DIR": str(folder / "database"),
        "FIFTYONE_DATABASE_VALIDATION": "false",
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_MODEL_ZOO_DIR": str(folder / "models"),
        "FIFTYONE_SHOW_PROGRESS_BARS": "false",
    }
    return folder
