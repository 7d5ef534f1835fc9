"""The check of the prose finds markers in every kind of text and cannot be passed by deleting docstrings."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.scripts import import_file

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_prose.py"
MARKED = "It lies in the cache and is made anew."  # two markers
if not SCRIPT.exists():
    pytest.skip("scripts/ is not part of a source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    """Return scripts/check_prose.py as a module."""
    return import_file("scripts/check_prose.py")


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [
        ("moondream_cv/a.py", f'"""{MARKED}"""', "docstrings"),
        ("moondream_cv/a.py", f'def f():\n    """Return it.\n\n    Args:\n        x: {MARKED}\n    """', "docstrings"),
        ("moondream_cv/a.py", f"# {MARKED}\nx = 1", "comments"),
        ("moondream_cv/a.py", f"x = 1  # {MARKED}", "comments"),
        ("moondream_cv/a.py", "# It lies\n# in the cache and is made anew.\nx = 1", "comments"),
        ("moondream_cv/a.py", f'x = Option(help="{MARKED}")', "help"),
        ("moondream_cv/a.py", f'raise ValueError("{MARKED}")', "messages"),
        ("moondream_cv/a.py", f'raise ValueError(f"{{x}}: {MARKED}")', "messages"),
        ("tests/test_a.py", f'"""{MARKED}"""', "tests"),
        ("tests/test_a.py", "def test_entry_lies_in_the_cache_anew(): ...", "tests"),
        ("docs/a.md", f"# Title\n\n{MARKED}", "Markdown"),
        ("docs/a.md", "- It lies\n  in the cache and is made anew.", "Markdown"),
        ("docs/a.md", f"| a | b |\n|---|---|\n| c | {MARKED} |", "Markdown"),
        ("a.ipynb", json.dumps({"cells": [{"cell_type": "markdown", "source": [MARKED]}]}), "Markdown"),
    ],
)
def test_markers_are_found_in_every_kind_of_text(prose: ModuleType, name: str, source: str, kind: str) -> None:
    report = prose.check({name: source})
    assert {kind: len(found) for kind, found in report.markers.items() if found} == {kind: 2}
    assert kind in report.failures()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("docs/a.md", f"```\n{MARKED}\n```"),
        ("docs/a.md", f"Ask `{MARKED}` or [this](beside.md)."),
        ("docs/a.md", f'Ask "{MARKED}".'),
        ("docs/a.md", "It lies\n\nin the cache."),
        ("moondream_cv/a.py", f'"""Answer ``{MARKED}``."""'),
        ("moondream_cv/a.py", 'x = "made anew"'),  # too short for a message
        ("moondream_cv/a.py", '"""What is the color of the car?"""'),
    ],
)
def test_code_quotations_and_questions_are_not_counted(prose: ModuleType, name: str, source: str) -> None:
    assert [found for found in prose.check({name: source}).markers.values() if found] == []


def test_rate_is_limited_per_1000_words_of_each_kind(prose: ModuleType) -> None:
    sentence = "one two three four five six seven eight nine ten. "
    page = sentence * 100 + "\n\nIt is made anew. "
    assert prose.check({"a.md": page + "It is made anew."}).failures() == []
    assert prose.check({"a.md": page + "It is made anew. " * 2}).failures() == ["Markdown"]
    assert prose.check({"a.md": page, "a.py": f'"""{MARKED}"""'}).failures() == ["docstrings"]


def test_deleting_docstrings_does_not_pass_the_check(prose: ModuleType) -> None:
    documented = 'def f{}():\n    """Return it."""\n'
    marked = f'def g():\n    """{MARKED}"""\n'
    undocumented = "def g{}(): ...\n"
    functions = "".join(documented.format(number) for number in range(5))
    assert prose.check({"moondream_cv/a.py": functions + marked}).failures() == ["docstrings"]
    assert prose.check({"moondream_cv/a.py": functions + undocumented.format(0)}).failures() == ["documented"]
    assert prose.check({"moondream_cv/a.py": 2 * functions + undocumented.format(0)}).failures() == []


def test_share_counts_public_functions_methods_properties_and_classes(prose: ModuleType) -> None:
    source = '''
def documented():
    """Return it."""
    def nested(): ...
def bare(): ...
def _private(): ...
@overload
def bare(x): ...
class Public:
    """A class."""
    def method(self): ...
    def __len__(self): ...
    def _private(self): ...
    @property
    def size(self): ...
    @size.setter
    def size(self, value): ...
class _Private:
    def method(self): ...
'''
    report = prose.check({"moondream_cv/a.py": source, "moondream_cv/_b.py": source, "tests/test_a.py": source})
    assert (report.documented, report.public) == (2, 5)
    assert prose.check({"moondream_cv/__init__.py": source}).public == 5


def test_command_lists_markers_of_named_files(prose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{MARKED}\n")
    assert prose.main([str(page)]) == 1
    printed = capsys.readouterr().out
    assert f"{page}:3: lies in" in printed
    assert "Above the limit: Markdown" in printed
