"""docs/examples.md lists the examples, and its command lines fit them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file())
PAGE = ROOT / "docs" / "examples.md"
if not PAGE.exists():
    pytest.skip("the pages are not part of a source distribution", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")
LINES = re.findall(r"^(?:python|node) examples/.*$", TEXT, re.MULTILINE)


def test_page_has_a_section_for_each_example() -> None:
    sections = re.findall(r"^## (.*)\n\n\[([\w.]+)\]\(\.\./examples/\2\) ", TEXT, re.MULTILINE)
    assert sorted(name for _, name in sections) == EXAMPLES
    anchors = {name: re.sub(r"[^\w ]", "", heading.lower()).replace(" ", "-") for heading, name in sections}
    assert dict(re.findall(r"\[([\w.]+)\]\(#([\w-]+)\)", TEXT)) == anchors  # the table at the top


def test_page_has_a_command_for_each_example() -> None:
    configured = re.findall(r"/examples/(mcp_server\.py)\"", TEXT)
    assert {shlex.split(line)[1].removeprefix("examples/") for line in LINES} | {*configured} == {*EXAMPLES}


@pytest.mark.parametrize("line", LINES, ids=lambda line: shlex.split(line)[1])
def test_commands_use_existing_options(line: str) -> None:
    path, *arguments = shlex.split(line)[1:]
    source = (ROOT / path).read_text(encoding="utf-8")
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in source, f"{path} has no option {option}"
