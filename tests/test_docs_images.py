"""Each picture of the documentation is shown on a page, is small, and is drawn by a script."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS, IMAGES = ROOT / "scripts", ROOT / "docs" / "images"
if not SCRIPTS.exists():
    pytest.skip("the scripts are not part of a source distribution", allow_module_level=True)

SCREENSHOTS = {"playground.png", "workflow.png"}  # taken by hand


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def test_scripts_draw_all_pictures() -> None:
    drawn = {
        name
        for script in ("make_guide_images", "make_howto_images", "make_example_images")
        for name in importlib.import_module(script).PICTURES
    }
    tutorials = importlib.import_module("make_tutorial_images")
    drawn |= {tutorials.picture_path(name).name for name in tutorials.PICTURES}
    assert drawn | SCREENSHOTS == {path.name for path in IMAGES.iterdir()}


def test_pages_show_all_pictures() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    shown = set(re.findall(r"!\[[^\]]+\]\((?:\.\./)?images/([^)]+)\)", pages))
    assert shown == {path.name for path in IMAGES.iterdir()}


def test_pictures_are_small() -> None:
    max_bytes = importlib.import_module("docs_images").MAX_BYTES
    assert [path.name for path in IMAGES.iterdir() if path.stat().st_size > max_bytes] == []


@pytest.mark.parametrize("argument", ["no-such-picture.png", "crops"])
def test_unknown_pictures_are_rejected(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_guide_images.py", argument])
    with pytest.raises(SystemExit, match=re.escape(f"unknown pictures ['{argument}']; known: overview.jpg")):
        importlib.import_module("make_guide_images").main()
