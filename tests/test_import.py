"""Importing the package is light, its names resolve, and every module imports with the base dependencies alone.

Run with `pytest tests/test_import.py`; what counts happens in processes of their own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import moondream_cv

pytestmark = pytest.mark.compat

ROOT = Path(__file__).parents[1]
HEAVY = {"av", "cv2", "huggingface_hub", "numpy", "PIL", "rich", "supervision", "torch", "trackers", "transformers"}
OPTIONAL = {
    "aiohttp",
    "boto3",
    "fal_client",
    "fastapi",
    "hypothesis",
    "inference",
    "inference_sdk",
    "moondream",
    "nbclient",
    "nbformat",
    "openai",
    "playwright",
    "prometheus_client",
    "pytest",
    "pythonjsonlogger",
    "ray",
    "schemathesis",
    "starlette",
    "trustme",
    "uvicorn",
}
WITH_AN_EXTRA = "moondream_cv.server."  # what is in there takes moondream-cv[server], and says so from the command line


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    run_python(
        "import sys, moondream_cv\n"
        "assert moondream_cv.__version__ and dir(moondream_cv)\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_errors_and_requests_need_no_model() -> None:
    run_python(
        "import sys\n"
        "from moondream_cv import Caption, Detect, Gaze, MoondreamError, Point, Query, Settings, UnsupportedSkill\n"
        "heavy = {'cv2', 'supervision', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_the_detector_needs_no_torch_until_a_model_is_loaded() -> None:
    run_python(
        "import sys\n"
        "from moondream_cv import Detector, Pointer\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize("name", moondream_cv.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(moondream_cv, name) is not None
    assert name in dir(moondream_cv)


def test_names_are_sorted_and_complete() -> None:
    assert moondream_cv.__all__ == sorted(moondream_cv.__all__)
    assert set(moondream_cv._SUBMODULES) == set(moondream_cv.__all__) - {"__version__"}
    typed = re.search(r"if TYPE_CHECKING:\n((?:    .*\n)+)", Path(moondream_cv.__file__).read_text())
    assert typed is not None
    assert set(re.findall(r"\b\w+\b(?=,|\n)", re.sub(r"from \S+ import", "", typed[1]))) == set(
        moondream_cv._SUBMODULES
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moondream_cv' has no attribute 'nothing'"):
        moondream_cv.nothing  # noqa: B018


def test_star_import() -> None:
    run_python("from moondream_cv import *; assert Detector and Detect and load and __version__")


def test_the_version_is_that_of_the_distribution() -> None:
    try:
        installed = version("moondream-cv")
    except ModuleNotFoundError:
        pytest.skip("moondream-cv is not installed here, only importable")
    assert installed == moondream_cv.__version__


def test_every_module_imports_with_the_base_dependencies_alone() -> None:
    run_python(
        "import importlib, pkgutil, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None: cannot be imported\n"
        "import moondream_cv\n"
        "for module in pkgutil.walk_packages(moondream_cv.__path__, 'moondream_cv.'):\n"
        f"    if not module.name.endswith('__main__') and not module.name.startswith({WITH_AN_EXTRA!r}):\n"
        "        importlib.import_module(module.name)\n"
    )
