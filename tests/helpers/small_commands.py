"""Start the command line in a separate process, optionally with a model that the test controls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moondream_cv

_ROOT = str(Path(moondream_cv.__file__).parents[1])

_COLORING = ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")  # make rich color its output

_STAGES = {
    "": "",
    # From the second image on, the model waits until the file "go" exists.
    "wait for the test": """
import pathlib, time
from moondream_cv.cli import models
from tests.helpers.color_model import ColorModel
class Waiting(ColorModel):
    def run(self, requests):
        if self.runs:
            while not pathlib.Path("go").exists():
                time.sleep(0.02)
        return super().run(requests)
models.load_model = lambda *_: Waiting()
""",
}


def command(*arguments: str, cwd: Path, stage: str = "", stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start `moondream-cv` with text pipes.

    Args:
        arguments: Arguments of the command line.
        cwd: Working directory.
        stage: "" for the models of the package, or "wait for the test".
        stdout: As for `subprocess.Popen`.
    """
    start = f"import sys\nfrom moondream_cv.cli import main\nsys.argv = {['moondream-cv', *arguments]!r}\nmain()"
    code = f"{_STAGES[stage]}\n{start}"
    kept = {key: value for key, value in os.environ.items() if key not in _COLORING}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": _ROOT}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )
