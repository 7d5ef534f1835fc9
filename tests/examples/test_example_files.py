"""Every example is short, has a usage line, and is run by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.mjs")])
COMMANDS = {".py": "python", ".mjs": "node"}
MAX_LINES = 59


def files_that_name(name: str) -> list[Path]:
    """Return the other test files with a name among the strings of their code, without docstrings and comments."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if name not in text or path == Path(__file__):
            continue
        nodes = [node for node in ast.walk(ast.parse(text)) if not isinstance(node, ast.Expr)]
        if any(_is_string(child, name) for node in nodes for child in ast.iter_child_nodes(node)):
            found.append(path)
    return found


def _is_string(node: ast.AST, value: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def header(path: Path) -> str:
    """Return the docstring of a Python example, or the first comment of a JavaScript example."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    comment = re.match(r"/\*\*(.*?)\*/", text, re.DOTALL)
    return re.sub(r"^ \* ?", "", comment[1], flags=re.MULTILINE) if comment else ""


def test_examples_are_found() -> None:
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_documented_and_tested(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    usage = rf"^    .*{COMMANDS[path.suffix]} examples/{re.escape(path.name)}"
    assert re.search(usage, header(path), re.MULTILINE), "the docstring has no indented usage line"
    assert files_that_name(path.name), "no test runs it"
