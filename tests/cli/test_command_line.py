"""The command line as a whole, in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import moondream_cv
from moondream_cv.cli import app, detect, download

HEAVY = {"torch", "transformers", "cv2", "supervision", "PIL", "huggingface_hub", "numpy"}
COMMANDS = ["demo", "detect", "point", "query", "caption", "video", "serve", "download", "quantize", "finetune"]


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    # GITHUB_ACTIONS and FORCE_COLOR make rich print colors
    kept = {k: v for k, v in os.environ.items() if k not in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS")}
    command = [sys.executable, "-m", "moondream_cv", *arguments]
    root = str(Path(moondream_cv.__file__).parents[1])
    environment = {**kept, "COLUMNS": "100", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, **options)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\n"
        "from moondream_cv.cli import main\n"
        f"sys.argv = ['moondream-cv', *{command.split()!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Usage: moondream-cv" in result.stdout
    assert "moondream-cv demo" in result.stdout if not command else f"$ moondream-cv {command}" in result.stdout


def test_help_lists_the_commands() -> None:
    result = start("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert start("-h").stdout == result.stdout


ROOT_COMMAND = typer.main.get_command(app)
SUBCOMMANDS: dict[str, Any] = ROOT_COMMAND.commands  # type: ignore[attr-defined]
SUBCOMMANDS |= {f"finetune {name}": command for name, command in SUBCOMMANDS["finetune"].commands.items()}
PARAMETERS = [(name, item) for name, one in {"": ROOT_COMMAND, **SUBCOMMANDS}.items() for item in one.params]


@pytest.mark.parametrize(("command", "parameter"), PARAMETERS, ids=[f"{c} {p.opts[0]}" for c, p in PARAMETERS])
def test_every_option_has_a_help_text_and_one_default(command: str, parameter: Any) -> None:
    assert parameter.help
    assert parameter.help.rstrip().endswith((".", "]", "[/]"))
    states_default = "default" in parameter.help.lower()
    shows_default = parameter.show_default and parameter.default not in (None, False)
    assert not (states_default and shows_default)


def test_shell_completion_of_commands_options_and_models() -> None:
    def completed(line: str) -> list[str]:
        words = {"_MOONDREAM_CV_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        code = "import sys; from moondream_cv.cli import main; sys.argv = ['moondream-cv']; main()"
        environment = {**os.environ, **words, "PYTHONPATH": str(Path(moondream_cv.__file__).parents[1])}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        return result.stdout.split()

    assert completed("moondream-cv de") == ["demo", "detect"]
    assert {"--slice", "--save-txt", "--save-crop"} <= {*completed("moondream-cv detect --s")}
    assert completed("moondream-cv detect --model t") == ["tiny"]
    assert completed("moondream-cv detect a.png --dtype b") == ["bfloat16"]


def test_version_prints_the_package_version() -> None:
    assert start("--version").stdout == f"moondream-cv {moondream_cv.__version__}\n"


def test_unknown_command_exits_with_2() -> None:
    result = start("detekt")
    assert result.returncode == 2
    assert "detect" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_model_prints_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = start("detect", "a.png", "-c", "dog", "-m", "no-such-model", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "no-such-model" in result.stderr
    assert result.stderr.count("\n") == 1


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(detect, "run_detect_command", interrupted)
    assert CliRunner().invoke(app, ["detect", "a.png", "-c", "dog"]).exit_code == 130


def test_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(detect, "run_detect_command", broken)
    result = CliRunner().invoke(app, ["detect", "a.png", "-c", "dog"])
    assert isinstance(result.exception, KeyError)


def test_download_prints_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moondream_cv import loading

    monkeypatch.setattr(loading, "download", lambda name, to: tmp_path / name)
    assert CliRunner().invoke(app, ["download", "here"]).stdout == f"{tmp_path / 'here'}\n"
    result = CliRunner().invoke(app, ["download", "here", "--json"])
    assert result.stdout.splitlines()[1:3] == ['  "schema": 1,', '  "model": "here",']
    assert download.SCHEMA == 1
