"""Imports: the package loads no large library, its names resolve, and every module imports without optional packages.

Checks of imported modules run in separate processes.
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
    "datasets",
    "fal_client",
    "fastapi",
    "fsspec",
    "hypothesis",
    "imagehash",
    "inference",
    "inference_sdk",
    "label_studio_sdk",
    "moondream",
    "nbclient",
    "nbformat",
    "openai",
    "playwright",
    "prometheus_client",
    "pyarrow",
    "pycocotools",
    "pytest",
    "pythonjsonlogger",
    "rapidfuzz",
    "ray",
    "schemathesis",
    "starlette",
    "trustme",
    "uvicorn",
}
SERVER_MODULES = "moondream_cv.server."  # need moondream-cv[server]
TOOLS = ("autodistill", "cvat", "fiftyone")
TOOL_MODULES = [f"moondream_cv.integrations.{tool}" for tool in TOOLS]  # need the tool


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_package_import_loads_no_large_library() -> None:
    run_python(
        "import sys, moondream_cv\n"
        "assert moondream_cv.__version__ and dir(moondream_cv)\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_errors_and_requests_do_not_import_the_model() -> None:
    run_python(
        "import sys\n"
        "from moondream_cv import Caption, Detect, Gaze, MoondreamError, Point, Query, Settings, UnsupportedSkill\n"
        "heavy = {'cv2', 'supervision', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_detector_does_not_import_torch() -> None:
    run_python(
        "import sys\n"
        "from moondream_cv import Detector, Pointer\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize("name", moondream_cv.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(moondream_cv, name) is not None
    assert name in dir(moondream_cv)


def test_public_names_are_sorted_and_typed() -> None:
    assert moondream_cv.__all__ == sorted(moondream_cv.__all__)
    assert set(moondream_cv._SUBMODULES) == set(moondream_cv.__all__) - {"__version__"}
    typed = re.search(r"if TYPE_CHECKING:\n((?:    .*\n)+)", Path(moondream_cv.__file__).read_text())
    assert typed is not None
    assert set(re.findall(r"\b\w+\b(?=,|\n)", re.sub(r"from \S+ import", "", typed[1]))) == set(
        moondream_cv._SUBMODULES
    )


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moondream_cv' has no attribute 'nothing'"):
        moondream_cv.nothing  # noqa: B018


def test_star_import_has_the_public_names() -> None:
    run_python("from moondream_cv import *; assert Detector and Detect and load and __version__")


def test_version_matches_the_distribution() -> None:
    try:
        installed = version("moondream-cv")
    except ModuleNotFoundError:
        pytest.skip("moondream-cv is not installed here, only importable")
    assert installed == moondream_cv.__version__


@pytest.mark.parametrize("tool", TOOLS)
def test_integration_without_its_tool_names_the_command(tool: str) -> None:
    packages = ["autodistill", "cvat_sdk", "fiftyone"]
    run_python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({packages!r}))\n"
        "try:\n"
        f"    import moondream_cv.integrations.{tool}\n"
        "except ImportError as error:\n"
        f"    assert 'run: pip install {tool}' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')"
    )


def test_every_module_imports_without_optional_packages() -> None:
    run_python(
        "import importlib, pkgutil, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None: cannot be imported\n"
        "import moondream_cv\n"
        "for module in pkgutil.walk_packages(moondream_cv.__path__, 'moondream_cv.'):\n"
        f"    if module.name.endswith('__main__') or module.name.startswith({SERVER_MODULES!r}):\n"
        "        continue\n"
        f"    if module.name not in {TOOL_MODULES!r}:\n"
        "        importlib.import_module(module.name)\n"
    )
