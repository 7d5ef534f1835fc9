"""The notebooks run from top to bottom, with the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_and_shows_its_pictures(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra moondream-cv[notebooks]")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra moondream-cv[notebooks]")
    notebook = nbformat.read(path, as_version=4)
    shown = pictures(notebook)
    assert shown, f"{path.name} was saved without its pictures: run scripts/run_notebooks.py"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert pictures(notebook) == shown


def pictures(notebook: Any) -> int:
    """How many PNGs the outputs hold."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)
