"""Imports go only downwards through the layers of `docs/architecture.md`.

The tables of that page are the only list of layers. Sources are parsed instead of imported, and an import inside a
function or for type checkers counts like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = "moondream_cv"
PLUGIN = "moondream_cv_blocks"
if not PAGE.exists():
    pytest.skip("the page is not part of a source distribution", allow_module_level=True)


class Layers(NamedTuple):
    """The rules of the page.

    Attributes:
        levels: Level of each layer of the package; imports go from higher to lower levels.
        forbidden: Modules that each layer must not import.
        inner: Level of each module of the packages that have an order of their modules.
    """

    levels: dict[str, int]
    forbidden: dict[str, set[str]]
    inner: dict[str, dict[str, int]]


def read_layers(page: str) -> Layers:
    """Read the tables "Layers", "Groups of libraries" and "Order inside packages" of the page."""
    groups = {cells[0]: set(names(cells[1])) for cells in table(page, "Groups of libraries")}
    rows = [(names(cells[0]), cells[2]) for cells in table(page, "Layers")]
    levels = {layer: -number for number, (layers, _) in enumerate(rows) for layer in layers}
    forbidden: dict[str, set[str]] = {}
    for layers, cell in rows:
        modules = {f"{PACKAGE}.{name}" if name in levels else name for name in names(cell)}
        modules.update(*(libraries for group, libraries in groups.items() if group in cell.replace("`", "")))
        forbidden.update(dict.fromkeys(layers, modules))
    inner = {
        names(cells[0])[0]: {
            module: -number for number, cell in enumerate(cells[1].split("→")) for module in names(cell)
        }
        for cells in table(page, "Order inside packages")
    }
    return Layers(levels, forbidden, inner)


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    section = re.split(rf"^#+ {heading}$", page, flags=re.MULTILINE)[1]
    rows = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert rows is not None, f"no table under {heading!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[0].splitlines()[2:]]


def names(cell: str) -> list[str]:
    """Return the names in code style of a cell, without the suffixes of files and folders."""
    found = (name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([^`]+)`", cell))
    return [name.rpartition("/")[2] for name in found]


def find_modules() -> dict[str, Path]:
    """Return the modules of the package and of the plugin by their full names."""
    found = {}
    for top in (ROOT / PACKAGE, ROOT / "blocks" / PLUGIN):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()
LAYERS = read_layers(PAGE.read_text(encoding="utf-8"))


def lazy_names() -> dict[str, str]:
    """Return the module of each name that the package itself exports."""
    for node in ast.walk(ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_SUBMODULES":
            return {name: f"{PACKAGE}.{module}" for name, module in ast.literal_eval(node.value).items()}
    raise AssertionError("no _SUBMODULES in the package's __init__.py")


EXPORTED = lazy_names()


def imports_of(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each import; `from a import b` gives a.b if that is a module, else a."""
    is_package = module in MODULES and MODULES[module].name == "__init__.py"
    libraries = set().union(*LAYERS.forbidden.values())
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
                if base == PACKAGE:
                    yield node.lineno, EXPORTED.get(alias.name, full)
                else:
                    yield node.lineno, full if full in MODULES or full in libraries else base


def layer_of(module: str) -> str | None:
    """Return the layer of a module, or None for the package itself and for other libraries."""
    parts = module.split(".")
    if parts[0] == PLUGIN:
        return PLUGIN
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def violations(module: str, source: str) -> list[str]:
    """Return the imports of a module that break the rules, and a line if the module is in no layer."""
    if module == PACKAGE:
        return []
    layer = layer_of(module)
    if layer not in LAYERS.levels:
        return [f"{module} is in no layer; add it to the table in docs/architecture.md"]
    order = LAYERS.inner.get(layer, {})
    inner = module.split(".")[2:3]
    if order and inner and inner[0] not in order:
        return [f"{module} is not in the order of {layer}; add it to the table in docs/architecture.md"]

    found = []
    for line, target in dict.fromkeys(imports_of(module, source)):
        other = layer_of(target)
        if target == f"{PACKAGE}.__version__":
            continue
        if target == PACKAGE:
            found.append(f"{module}, line {line}: imports the package itself instead of a module")
        elif other is not None and LAYERS.levels.get(other, 0) > LAYERS.levels[layer]:
            found.append(f"{module}, line {line}: {layer} imports {target}, which is above it")
        elif other == layer and order and inner:
            name = target.split(".")[2:3]
            if not name or order.get(name[0], order[inner[0]]) > order[inner[0]]:
                found.append(f"{module}, line {line}: imports {target}, which is above it")
        for name in LAYERS.forbidden[layer]:
            if target == name or target.startswith(f"{name}."):
                found.append(f"{module}, line {line}: {layer} must not import {name}")
    return found


def missing_modules() -> list[str]:
    """Return the entries of the tables that are no longer modules."""
    listed = [f"{PACKAGE}.{layer}" for layer in LAYERS.levels if layer != PLUGIN]
    listed += [f"{PACKAGE}.{layer}.{module}" for layer, order in LAYERS.inner.items() for module in order]
    return [f"{name} is in docs/architecture.md but does not exist" for name in listed if name not in MODULES]


def test_imports_go_only_downwards() -> None:
    found = missing_modules()
    found += [line for name, path in MODULES.items() for line in violations(name, path.read_text(encoding="utf-8"))]
    assert "\n".join(found) == ""


def test_checker_reports_violations_and_nothing_else() -> None:
    engine, video, server = (
        f"{PACKAGE}.engine.local_model",
        f"{PACKAGE}.video.tracking.tracker",
        f"{PACKAGE}.server.bodies",
    )
    for module, source, reported in [
        (engine, "from moondream_cv.detector import Detector", "is above it"),
        (engine, "def f():\n    from ..detector import Detector", "line 2: engine imports"),
        (engine, "from moondream_cv import Detector", "is above it"),
        (engine, "from .. import loading", "is above it"),
        (engine, "import moondream_cv", "the package itself"),
        (engine, "import supervision as sv", "must not import supervision"),
        (f"{PACKAGE}.model.vision", "from PIL import Image", "must not import PIL"),
        (f"{PACKAGE}.model.vision", "import cv2.dnn", "must not import cv2"),
        (f"{PACKAGE}.backends.openai", "import torch.nn as nn", "must not import torch"),
        (f"{PACKAGE}.geometry", "from moondream_cv.scenes import Scene", "is above it"),
        (f"{PACKAGE}.arguments", "from moondream_cv.geometry import to_xyxy", "is above it"),
        (f"{PACKAGE}.images", "import torch", "must not import torch"),
        (
            f"{PACKAGE}.detector",
            "from moondream_cv.engine.local_model import LocalModel",
            "must not import moondream_cv.eng",
        ),
        (f"{PACKAGE}.server.app", "from moondream_cv.video import track", "must not import moondream_cv.video"),
        (f"{PACKAGE}.server.apis.openai.routes", "import moondream_cv_blocks.v1", "is above it"),
        (f"{PLUGIN}.v1", "from moondream_cv.cli import app", "is above it"),
        (video, "from urllib import request", "must not import urllib.request"),
        (video, "from moondream_cv.video.stream import track", "video.stream, which is above it"),
        (video, "from ..drawing import annotation", "which is above it"),
        (video, "from .. import track", "video, which is above it"),
        (server, "from .apis.openai import routes", "which is above it"),
        (f"{PACKAGE}.newcomer", "", "is in no layer"),
        (f"{PACKAGE}.video.newcomer", "", "is not in the order of video"),
    ]:
        found = violations(module, source)
        assert len(found) == 1, (module, source, found)
        assert reported in found[0], (module, source, found)
    for module, source in [
        (f"{PACKAGE}.cli.detect", "from . import options\nfrom moondream_cv import __version__, Detector"),
        (f"{PACKAGE}.detector", "from moondream_cv.loading import load\nimport supervision, numpy"),
        (engine, "from moondream_cv.model.moondream import X\nfrom .crops import cut_crops"),
        (f"{PACKAGE}.vision_model", "from moondream_cv.requests import Detect\nfrom PIL import Image"),
        (f"{PACKAGE}.video", "from .pipeline import annotate_video\nfrom urllib.parse import quote"),
        (f"{PACKAGE}.video.stream", "from .tracking import tracker\nfrom .sources.base import Source"),
        (f"{PACKAGE}.server.apis.openai.routes", "from ...service import Service\nfrom . import body"),
        (PACKAGE, "from .detector import Detector"),
    ]:
        assert violations(module, source) == [], (module, source)
