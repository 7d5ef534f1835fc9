"""The pictures of docs/tutorials show results of the code on the pages (`scripts/make_tutorial_images.py`)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.helpers.serve_process import free_port

MAX_BYTES = 300_000
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "make_tutorial_images.py"
if not SCRIPT.exists():
    pytest.skip("the scripts are not part of a source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module(SCRIPT.stem)


@pytest.fixture(scope="module")
def reader(script: ModuleType) -> Iterator[Path]:
    """Change to a folder with the files of `moondream-cv demo` that the pages use."""
    with script.reader_folder() as folder:
        yield folder


def test_each_tutorial_has_a_picture(script: ModuleType) -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert set(script.PICTURES) == set(pages)
    for name, page in pages.items():
        assert f"](../images/{script.picture_path(name).name})" in page
        assert script.picture_path(name).stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("name", ["images", "video", "redaction"])
def test_pictures_are_current(name: str, script: ModuleType, reader: Path) -> None:
    script.save_picture(script.PICTURES[name](), reader / "drawn.jpg")
    drawn, committed = (
        np.asarray(Image.open(path), dtype=np.int16) for path in (reader / "drawn.jpg", script.picture_path(name))
    )
    assert drawn.shape == committed.shape
    differs = np.abs(drawn - committed).max(axis=2) > 64  # encoders of other versions differ by less
    assert differs.mean() < 0.001, "run PYTHONPATH=. python scripts/make_tutorial_images.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine-tuning", "labeling", "serving"])
def test_pictures_are_drawn(name: str, script: ModuleType, reader: Path) -> None:
    """Their pixels depend on the processor or the browser."""
    drawn = script.draw_serving(free_port()) if name == "serving" else script.PICTURES[name]()
    with Image.open(script.picture_path(name)) as committed:
        assert drawn.size == committed.size
    assert np.asarray(drawn).std() > 30  # an empty page is almost white
