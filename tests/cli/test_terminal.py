"""Responses of servers and file names are escaped on the terminal."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moondream_cv import cli
from moondream_cv.cli import app, report
from tests.helpers.remote_server import RemoteServer, Reply, event_stream, remote_server

ODD = "\x1b[31mred\x1b]0;title\x07 [red]markup[/red] :cat: \x9b2J\u202eabc\x7f\ud83d"
SHOWN = "\\x1b[31mred\\x1b]0;title\\x07 [red]markup[/red] :cat: \\x9b2J\\u202eabc\\x7f\\ud83d"


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        running.on("/v1/models", Reply({"models": []}))
        yield running


def call(server: RemoteServer, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--model", server.url])


def safe(text: str) -> bool:
    return all(character == "\n" or character.isprintable() for character in text)


def test_answers_are_escaped_and_keep_line_breaks(server: RemoteServer, folder: Path) -> None:
    server.on("/v1/query", Reply({"answer": f"first\n\r\n{ODD}", "reasoning": {"text": ODD}}))
    server.on("/v1/caption", Reply({"caption": ODD}))
    result = call(server, "query", "one.png", "-q", "What?", "--reasoning")
    assert result.stdout == f"Reasoning: {SHOWN}\n\nfirst\n\n{SHOWN}\n"
    assert call(server, "caption", "one.png").stdout == f"{SHOWN}\n"


def test_answers_in_json_are_unchanged(server: RemoteServer, folder: Path) -> None:
    server.on("/v1/caption", Reply({"caption": ODD}))
    result = call(server, "caption", "one.png", "--json")
    assert result.stdout.isascii()
    assert safe(result.stdout)
    assert json.loads(result.stdout)["images"][0]["caption"] == ODD


def test_streamed_answers_are_escaped(
    server: RemoteServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "_console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=200))
    server.on("/v1/caption", event_stream({"chunk": "\x1b"}, {"chunk": "[31m[red]a :cat:\n"}, {"completed": True}))
    result = call(server, "caption", "one.png")
    assert "\\x1b[31m[red]a :cat:\n" in result.stdout
    assert "\x1b[31m" not in result.stdout


@pytest.mark.parametrize("status", [200, 400, 404])
def test_server_errors_are_escaped(server: RemoteServer, folder: Path, status: int) -> None:
    server.on("/v1/detect", Reply({"error": {"message": ODD}}, status))
    result = call(server, "detect", "one.png", "-c", "cat")
    assert result.exit_code == 1
    assert SHOWN in result.stderr
    assert safe(result.output)
    assert safe(result.stderr)


def test_responses_other_than_json_are_escaped(server: RemoteServer, folder: Path) -> None:
    server.on("/v1/detect", Reply(ODD.encode("utf-8", "surrogatepass"), kind="text/\x1b[31m"))
    result = call(server, "detect", "one.png", "-c", "cat")
    assert "instead of JSON: \\x1b[31mred" in result.stderr
    assert safe(result.stderr)


def test_file_and_class_names_are_escaped(server: RemoteServer, folder: Path) -> None:
    box = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.5}
    server.on("/v1/detect", Reply({"objects": [box]}))
    name = "a\nError: forged \x1b[31m[red] :cat:.png"
    os.rename("one.png", name)
    result = call(server, "detect", name, "no\x1b\n.png", "-c", "c\x1b[31m[red]", "-o", "out\x1b/")
    assert "a\\nError: forged \\x1b[31m[red] :cat:.png" in result.stdout
    assert "c\\x1b[31m[red]" in result.stdout
    assert "no\\x1b\\n.png" in result.stderr
    assert "Saved out\\x1b/a\\nError: forged" in result.stderr
    assert safe(result.stdout)
    assert safe(result.stderr)


def test_log_messages_and_warnings_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("moondream_cv")
    before, level = list(logger.handlers), logger.level
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)

    def use() -> None:
        logger.info("said %s", "a\n\x1b[31m")
        cli.warnings.showwarning("a\n\x1b[31m", UserWarning, "file", 1)

    monkeypatch.setattr(cli, "app", use)
    try:
        cli.main()
    finally:
        logger.handlers = before
        logger.setLevel(level)
    assert capsys.readouterr().err == "said a\\n\\x1b[31m\nWarning: a\\n\\x1b[31m\n"
