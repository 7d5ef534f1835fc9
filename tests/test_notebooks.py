"""The notebooks run completely with the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_notebooks_are_found() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_and_shows_its_images(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra moondream-cv[notebooks]")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra moondream-cv[notebooks]")
    notebook = nbformat.read(path, as_version=4)
    shown = count_images(notebook)
    assert shown, f"{path.name} was saved without its images: run scripts/run_notebooks.py"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert count_images(notebook) == shown


def count_images(notebook: Any) -> int:
    """Return the number of PNG images in the outputs of a notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)
