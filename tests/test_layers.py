"""Imports go only downwards, and no room knows what it should not. Run with `pytest tests/test_layers.py`.

The rooms and their order are those of CONTRIBUTING.md. Sources are read, never imported; an import within a function or
for type checkers counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "moondream_cv"
PLUGIN = "moondream_cv_blocks"

ROOMS = (  # from the top
    ("cli", "__main__"),
    (PLUGIN,),
    ("server",),
    ("video",),
    ("labelling",),
    ("finetune",),
    ("training",),
    ("evaluation",),
    ("detector", "cleanup"),
    ("hf",),
    ("loading",),
    ("backends",),
    ("engine",),
    ("model",),
    ("tiny",),
    ("scenes",),
    (
        *("vision_model", "requests", "images", "downloads", "urls", "geometry", "fonts", "escaping", "arguments"),
        *("errors", "_lazy", "_deprecation"),
    ),
)
HEIGHT = {room: -level for level, rooms in enumerate(ROOMS) for room in rooms}

HTTP = frozenset({"aiohttp", "fastapi", "flask", "http", "httpx", "requests", "starlette", "urllib.request", "uvicorn"})
PICTURES = frozenset({"PIL", "cv2", "supervision"})
TORCH = frozenset({"torch", "torchvision", "transformers"})

# What a room knows nothing of: libraries, and rooms below it that are none of its business.
KNOWS_NOTHING_OF: dict[str, frozenset[str]] = {
    PLUGIN: frozenset({f"{PACKAGE}.server", "fastapi", "starlette", "uvicorn"}),
    "server": frozenset({f"{PACKAGE}.video"}),
    "video": HTTP,
    "labelling": HTTP,
    "finetune": HTTP,
    "training": HTTP,
    "detector": TORCH | HTTP | {f"{PACKAGE}.{room}" for room in ("backends", "engine", "model", "scenes", "tiny")},
    "backends": TORCH | {f"{PACKAGE}.{room}" for room in ("engine", "model", "scenes", "tiny")},
    "engine": HTTP | {"cv2", "supervision", f"{PACKAGE}.scenes", f"{PACKAGE}.tiny"},
    "model": PICTURES | {f"{PACKAGE}.{room}" for room in ("images", "requests", "scenes", "vision_model")},
    "scenes": TORCH | HTTP | {f"{PACKAGE}.tiny", f"{PACKAGE}.requests", f"{PACKAGE}.vision_model"},
    **{room: TORCH | HTTP | {"cv2", "supervision"} for room in ROOMS[-1]},
    "downloads": TORCH | PICTURES,
}


def modules() -> dict[str, Path]:
    """Every module of the package and of the plugin by its full name."""
    found = {}
    for top in (ROOT / PACKAGE, ROOT / "blocks" / PLUGIN):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str | None:
    """The room that a module lies in; None for the package's own front door, and for other libraries."""
    parts = module.split(".")
    if parts[0] == PLUGIN:
        return PLUGIN
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def imports_of(module: str, source: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports: `from a import b` gives a.b where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_name = base != PACKAGE and full not in MODULES and full not in HTTP
                yield node.lineno, base if is_name else full


def front_door() -> dict[str, str]:
    """The names that the package offers, and the module that each comes from."""
    for node in ast.walk(ast.parse((ROOT / PACKAGE / "__init__.py").read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_SUBMODULES":
            return {name: f"{PACKAGE}.{home}" for name, home in ast.literal_eval(node.value).items()}
    raise AssertionError("no _SUBMODULES in the package's __init__.py")


HOMES = front_door()


def complaints(module: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module."""
    room = room_of(module)
    if room is None:
        return []
    found = []
    for line, target in imports_of(module, source, is_package):
        if target == f"{PACKAGE}.__version__":
            continue
        name = target.removeprefix(f"{PACKAGE}.")
        target = HOMES.get(name, target) if target.startswith(f"{PACKAGE}.") else target
        other = room_of(target)
        if other is not None and other in HEIGHT and HEIGHT[other] > HEIGHT[room]:
            found.append(f"{module}, line {line}: {room} imports {target}, which lies above it")
        elif target == PACKAGE:
            found.append(f"{module}, line {line}: imports the package's front door instead of a room")
        for secret in KNOWS_NOTHING_OF.get(room, ()):
            if target == secret or target.startswith(f"{secret}."):
                found.append(f"{module}, line {line}: {room} should know nothing of {secret}, and imports {target}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_downwards(module: str) -> None:
    path = MODULES[module]
    assert complaints(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


@pytest.mark.parametrize("module", [name for name in MODULES if name != PACKAGE])
def test_every_module_lies_in_a_room(module: str) -> None:
    assert room_of(module) in HEIGHT, f"{module} lies in no room; add it to ROOMS here and in CONTRIBUTING.md"


def test_the_front_door_opens_only_when_a_name_is_asked_for() -> None:
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    outside = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {alias.name for node in outside for alias in node.names} <= {
        "annotations",
        "lazy_names",
        "TYPE_CHECKING",
    }
    assert {target for target in HOMES.values() if target not in MODULES} == set()


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("moondream_cv.engine.local", "from moondream_cv.detector import Detector", "lies above it"),
        ("moondream_cv.engine.local", "def f():\n    from ..detector import Detector", "line 2: engine imports"),
        ("moondream_cv.engine.local", "from moondream_cv import Detector", "lies above it"),
        ("moondream_cv.engine.local", "from .. import loading", "lies above it"),
        ("moondream_cv.engine.local", "import moondream_cv", "front door"),
        ("moondream_cv.engine.local", "import supervision as sv", "should know nothing of supervision"),
        ("moondream_cv.model.vision", "from PIL import Image", "should know nothing of PIL"),
        ("moondream_cv.model.vision", "import cv2.dnn", "should know nothing of cv2"),
        ("moondream_cv.backends.openai", "import torch.nn as nn", "should know nothing of torch"),
        ("moondream_cv.geometry", "from moondream_cv.scenes import Scene", "lies above it"),
        ("moondream_cv.images", "import torch", "should know nothing of torch"),
        ("moondream_cv.video.tracking.tracker", "from urllib import request", "should know nothing of urllib.request"),
        ("moondream_cv_blocks.v1", "from moondream_cv.cli import app", "lies above it"),
        ("moondream_cv.server.apis.openai.routes", "import moondream_cv_blocks.v1", "lies above it"),
        ("moondream_cv.detector", "from moondream_cv.engine.local import LocalModel", "should know nothing of"),
    ],
)
def test_the_checker_finds_what_is_wrong(module: str, source: str, complaint: str) -> None:
    (found,) = complaints(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moondream_cv.cli.detect", "from . import options\nfrom moondream_cv import __version__, Detector"),
        ("moondream_cv.detector", "from moondream_cv.loading import load\nimport supervision, numpy"),
        ("moondream_cv.engine.local", "from moondream_cv.model.moondream import X\nfrom .crops import cut_crops"),
        ("moondream_cv.vision_model", "from moondream_cv.requests import Detect\nfrom PIL import Image"),
        ("moondream_cv.labelling.export", "from urllib.parse import quote"),
        ("moondream_cv", "from .detector import Detector"),
    ],
)
def test_the_checker_allows_what_is_right(module: str, source: str) -> None:
    assert complaints(module, source) == []
