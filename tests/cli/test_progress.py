"""Progress and Ctrl-C of commands and scripts in a terminal, with a model of full width and few layers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moondream_cv
from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.moondream import MoondreamNetwork
from tests.helpers.small_checkpoint import byte_tokenizer, small_config
from tests.helpers.terminal import TerminalProcess, screen_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudoterminals"),
]

FULL_WIDTH = {
    "text": {"dim": 2048, "ff_dim": 8192, "n_layers": 1, "max_context": 2048, "n_heads": 32, "n_kv_heads": 32}
    | {"prefix_attn": 730},
    "vision": {"enc_dim": 1152, "enc_n_layers": 2, "enc_ff_dim": 4304, "enc_n_heads": 16, "proj_out_dim": 2048}
    | {"crop_size": 378, "max_crops": 12, "overlap_margin": 4, "proj_inner_dim": 1024},
    "region": {"dim": 2048, "coord_feat_dim": 256, "coord_out_dim": 1024, "size_feat_dim": 512, "size_out_dim": 2048}
    | {"inner_dim": 512},
}
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")},
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(moondream_cv.__file__).parents[1]),
}
IMMEDIATE = "from moondream_cv import progress\nprogress.DELAY = progress.REFRESH_INTERVAL = 0.0\n"
COMMAND = """
import sys
from moondream_cv.__main__ import main
from moondream_cv.cli import report
report._REFRESHES_PER_SECOND = 1000  # stages are short on a fast machine
sys.argv = {}
main()
"""
SCRIPT = """
from moondream_cv import Detector, load
model = load("model", device="cpu", dtype="float32")
print("loaded", flush=True)
Detector(model, max_objects=400)("small.jpg", "dog")
"""
MODEL = ("-m", "model", "--device", "cpu", "--dtype", "float32")

Start = Callable[[str], TerminalProcess]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `large.jpg` (9 crops), `small.jpg` (1 crop) and `model`, which never ends a list."""
    folder = tmp_path_factory.mktemp("full_width")
    sections = small_config().to_dict()
    for name, sizes in FULL_WIDTH.items():
        sections[name].update(sizes)
    config = MoondreamConfig.from_dict(sections)
    network = MoondreamNetwork(config)
    network.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.text.lm_head.bias[config.tokenizer.eos_id] = -1000
    save_checkpoint(network, config, byte_tokenizer(), folder / "model", dtype=torch.bfloat16)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name, scale in (("large.jpg", 16), ("small.jpg", 6)):
        Image.fromarray(np.kron(noise, np.ones((scale, scale, 1), np.uint8))).save(folder / name)
    return folder


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Return a function that runs Python code in a terminal."""
    started: list[TerminalProcess] = []

    def run(code: str) -> TerminalProcess:
        started.append(TerminalProcess(code, folder, ENVIRONMENT))
        return started[-1]

    yield run
    for process in started:
        process.close()


def command(*arguments: str) -> str:
    """Return the code that runs a command whose progress is shown from its start."""
    return IMMEDIATE + COMMAND.format(["moondream-cv", *arguments, *MODEL])


def without_load_message(screen: list[str]) -> list[str]:
    """Return the lines behind the message about the loaded model, which takes several lines, if it is shown."""
    ends = [i for i, line in enumerate(screen) if line.endswith("with 3 objects")]
    return screen[ends[0] + 1 :] if ends else screen


def detect(*arguments: str, image: str = "small.jpg") -> str:
    """Return the code that detects dogs."""
    return command("detect", image, "-c", "dog", *arguments)


@pytest.mark.parametrize(
    "stage",
    [
        "Checking images",
        "Starting PyTorch",
        "Loading weights: ",
        r"Encoding image: \d\.\d of 9 crops",
        "Prefilling image: 0 of 1 layers",
        r"Detecting 'dog': \d+ object",
    ],
)
def test_ctrl_c_ends_a_command_at_every_stage(start: Start, stage: str) -> None:
    image = "large.jpg" if "Encoding" in stage else "small.jpg"
    process = start(detect("--max-objects", "400", image=image))
    process.wait_for(stage)
    process.interrupt()
    assert process.wait() == 130, process.output
    assert [line for line in without_load_message(process.screen) if line != "^C"] == ["Interrupted"]
    assert process.cursor_is_visible


@pytest.mark.parametrize("stage", ["Loading weights: ", "Encoding image: ", "Detecting 'dog': "])
def test_ctrl_c_ends_a_script_at_every_stage(start: Start, stage: str) -> None:
    process = start(IMMEDIATE + (SCRIPT.replace("small", "large") if "Encoding" in stage else SCRIPT))
    process.wait_for(stage)
    process.interrupt()
    process.wait()
    assert process.screen[-1] == "KeyboardInterrupt"
    assert process.cursor_is_visible


def test_ctrl_c_ends_a_streamed_caption(start: Start) -> None:
    process = start(command("caption", "small.jpg", "--max-tokens", "1000"))
    process.wait_for("Encoding image: ")
    process.wait_for("Captioning: ")
    process.interrupt()
    assert process.wait() == 130, process.output
    assert process.screen[-1] == "Interrupted"
    assert process.cursor_is_visible


def test_status_is_removed_at_the_end_of_a_command(start: Start) -> None:
    process = start(detect("--max-objects", "2"))
    assert process.wait() == 0
    assert re.search(r"small\.jpg  Encoding image: \d\.\d of 1 crops", process.output)
    warning, title, *_ = without_load_message(process.screen)
    assert warning == "'dog': there may be more than max_objects=2"
    assert title.startswith("small.jpg  240×180  ")
    assert "Encoding" not in "\n".join(process.screen)
    assert process.cursor_is_visible


def test_status_is_removed_at_the_end_of_a_script(start: Start) -> None:
    process = start(IMMEDIATE + SCRIPT.replace("400", "2"))
    assert process.wait() == 0
    assert "\rDetecting 'dog': 0 objects" in process.output
    assert process.screen == ["loaded"]


def test_quiet_commands_show_no_progress(start: Start) -> None:
    process = start(detect("--max-objects", "2", "--quiet"))
    assert process.wait() == 0
    assert process.screen[0].startswith("small.jpg  240×180  ")
    assert "Encoding" not in process.output


@pytest.mark.parametrize("option", [None, "--verbose", "--quiet"])
def test_without_a_terminal_progress_is_logged(folder: Path, option: str | None) -> None:
    code = detect("--max-objects", "2", "--json", *([] if option is None else [option]))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert ("Encoding image: " in done.stderr) == (option != "--quiet")
    assert ("run on model took " in done.stderr) == (option == "--verbose")


def test_screen_of_status_lines() -> None:
    assert screen_of("one\r\n\rabcdef\r\rxy    \r\x1b[32mgreen\x1b[0m\r\n") == ["one", "green", ""]
    assert screen_of("status\r\n\x1b[1A\x1b[2Kdone") == ["done", ""]
