"""Check the English of the repository and the share of documented public functions.

The check counts the constructions of `prose_markers.txt` in docstrings, comments, help texts, messages, tests and
Markdown. It fails if one of these kinds of text has more than MAX_RATE of them per 1,000 words. It also fails if fewer
than MIN_DOCUMENTED of the public functions have a docstring, so deleting docstrings is no way to pass.

    python scripts/check_prose.py              check the repository
    python scripts/check_prose.py FILE...      check these files and list every marker
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeGuard

ROOT = Path(__file__).parents[1]
MARKERS = Path(__file__).with_name("prose_markers.txt")
MAX_RATE = 2.0  # markers per 1,000 words of one kind of text
MIN_DOCUMENTED = 0.86  # share of public functions and classes with a docstring
MIN_MESSAGE_WORDS = 4  # shorter string constants are names and keys
PACKAGES = ("moondream_cv/", "blocks/")  # the folders with a public API

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Paragraph(NamedTuple):
    """One paragraph, list item or table cell, with inline code and quotations replaced by X."""

    kind: str
    file: str
    line: int
    text: str


@dataclass
class Report:
    """Markers and words by kind of text, and the documented public functions.

    Attributes:
        words: Number of words by kind of text.
        markers: Places and phrases that were found, by kind of text.
        documented: Number of public functions and classes with a docstring.
        public: Number of public functions and classes.
    """

    words: dict[str, int] = field(default_factory=dict)
    markers: dict[str, list[str]] = field(default_factory=dict)
    documented: int = 0
    public: int = 0

    def rate(self, kind: str) -> float:
        """Return the number of markers per 1,000 words of one kind of text."""
        return 1000 * len(self.markers[kind]) / max(1, self.words[kind])

    @property
    def documented_share(self) -> float:
        """Return the share of public functions and classes with a docstring, from 0 to 1."""
        return self.documented / self.public if self.public else 1.0

    def failures(self) -> list[str]:
        """Return the names of the limits that are exceeded: kinds of text, and "documented"."""
        kinds = [kind for kind in self.words if self.rate(kind) > MAX_RATE]
        return kinds if self.documented_share >= MIN_DOCUMENTED else [*kinds, "documented"]


def main(names: list[str]) -> int:
    """Check files, print the report and return the exit status.

    Args:
        names: Paths relative to the repository; empty for all tracked files.
    """
    files = names or tracked_files()
    report = check({name: (ROOT / name).read_text(encoding="utf-8") for name in files})
    failures = report.failures()
    for kind in sorted(report.words):
        if report.markers[kind] and (names or kind in failures):
            print(*report.markers[kind], sep="\n")
        print(f"{kind}: {report.rate(kind):.2f} markers per 1,000 words of {report.words[kind]:,} (limit {MAX_RATE:g})")
    print(
        f"documented: {report.documented_share:.1%} of {report.public:,} public functions and classes"
        f" (limit {MIN_DOCUMENTED:.0%})"
    )
    if failures:
        print(f"Above the limit: {', '.join(failures)}. CONTRIBUTING.md (How we write) has the rules.")
    return int(bool(failures))


def tracked_files() -> list[str]:
    """Return the tracked Python files, pages and notebooks, without test data."""
    command = ["git", "ls-files", "*.py", "*.md", "*.ipynb"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if not name.startswith("tests/data/") and (ROOT / name).exists()]


def check(sources: Mapping[str, str]) -> Report:
    """Count the markers and the documented functions of files.

    Args:
        sources: Text by file name; the name decides how the file is parsed.
    """
    patterns = read_patterns(MARKERS.read_text(encoding="utf-8"))
    report = Report()
    for name, source in sources.items():
        for kind, file, line, text in paragraphs_of(name, source):
            phrases = [match.group().strip() for pattern in patterns for match in pattern.finditer(text)]
            report.words[kind] = report.words.get(kind, 0) + len(re.findall(r"[A-Za-z']+", text))
            report.markers.setdefault(kind, []).extend(f"{file}:{line}: {phrase}" for phrase in phrases)
        if name.endswith(".py") and name.startswith(PACKAGES) and "/_" not in name.replace("/__", "/"):
            public = list(public_definitions(ast.parse(source)))
            report.public += len(public)
            report.documented += sum(ast.get_docstring(node) is not None for node in public)
    return report


def read_patterns(text: str) -> list[re.Pattern[str]]:
    """Compile one regular expression per line, ignoring empty lines and lines that start with #."""
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [re.compile(line, re.IGNORECASE) for line in lines]


def paragraphs_of(name: str, source: str) -> Iterator[Paragraph]:
    """Yield the paragraphs of a Python file, a Markdown page or a notebook."""
    if name.endswith(".py"):
        yield from python_paragraphs(name, source)
    elif name.endswith(".ipynb"):
        for cell in json.loads(source)["cells"]:
            if cell["cell_type"] == "markdown":
                yield from split("Markdown", name, 1, "".join(cell["source"]))
    else:
        without_code = re.sub(r"(?ms)^```.*?^```", lambda match: "\n" * match.group().count("\n"), source)
        yield from split("Markdown", name, 1, without_code)


def python_paragraphs(name: str, source: str) -> Iterator[Paragraph]:
    """Yield docstrings, comments, help texts and messages; in tests, docstrings, comments and names of tests."""
    in_tests = name.startswith("tests/")
    for line, comment in comments(source):
        yield from split("tests" if in_tests else "comments", name, line, comment)

    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    helps = {node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "help"}
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if in_tests and isinstance(node, Function) and node.name.startswith("test_"):
            yield Paragraph("tests", name, node.lineno, node.name.removeprefix("test_").replace("_", " "))
        if not is_text(node) or node in parts:
            continue
        if node in docstrings:
            yield from split("tests" if in_tests else "docstrings", name, node.lineno, text_of(node))
        elif node in helps:
            yield from split("help", name, node.lineno, text_of(node))
        elif not in_tests and len(text_of(node).split()) >= MIN_MESSAGE_WORDS:
            yield from split("messages", name, node.lineno, text_of(node))


def is_text(node: ast.AST) -> TypeGuard[ast.expr]:
    """Return whether a node is a string constant or an f-string."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def text_of(node: ast.expr) -> str:
    """Return the text of a string, with X for the values of an f-string."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each comment; consecutive comment lines are one comment."""
    lines: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = start if lines else token.start[0]
            lines.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and lines:
            yield start, "\n".join(lines)
            lines = []


def split(kind: str, name: str, line: int, text: str) -> Iterator[Paragraph]:
    """Split text at blank lines, list items, table cells, headings and the arguments of docstrings."""
    begins = re.compile(r"\s*([-*|>#]|\d+\.\s|\w[\w, *]*:\s)")
    groups: list[tuple[int, list[str]]] = []
    is_open = False
    for number, row in enumerate(text.split("\n"), line):
        if not row.strip() or row.lstrip().startswith("```"):
            is_open = False
            continue
        if not is_open or begins.match(row):
            groups.append((number, []))
            is_open = True
        groups[-1][1].append(re.sub(r"^\s*([-*>#]+\s|\d+\.\s)?\s*", "", row).strip())
    for number, rows in groups:
        joined = " ".join(rows)
        for cell in joined.split("|") if joined.startswith("|") else [joined]:
            yield Paragraph(kind, name, number, without_quotations(cell.strip()))


def without_quotations(text: str) -> str:
    """Replace inline code, quotations and link targets by X."""
    return re.sub(r'``?[^`]+``?|"[^"]*"|(?<=\])\([^)]*\)', "X", text)


def public_definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield the public functions and classes of a module and their public methods and properties."""
    for node in public_only(tree.body):
        yield node
        if isinstance(node, ast.ClassDef):
            yield from (method for method in public_only(node.body) if isinstance(method, Function))


def public_only(body: Iterable[ast.stmt]) -> Iterator[Definition]:
    """Yield the definitions of a body, without private names, overloads and property setters."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
            if not decorators & {"overload", "setter"}:
                yield node


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
