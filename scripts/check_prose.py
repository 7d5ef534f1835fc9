"""Check the English of docstrings, comments, messages and Markdown, and the share of documented functions.

Counts the constructions of `prose_markers.txt` and fails if a kind of text has more than LIMIT of them per 1,000 words.
Fails as well if fewer than DOCUMENTED of the public functions have a docstring, since deleting docstrings must not be a
way to pass.

    python scripts/check_prose.py              the rates, and the lines above the target
    python scripts/check_prose.py FILE...      only these files
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 2.0  # markers per 1,000 words
DOCUMENTED = 0.86  # share of public functions, methods and classes with a docstring
SOURCES = ("moondream_cv/", "blocks/", "scripts/", "benchmarks/", "examples/")
TESTS = ("tests/",)


class Text(NamedTuple):
    """One paragraph and where it begins."""

    kind: str
    path: str
    line: int
    text: str


def main(names: list[str]) -> int:
    """Print the rates and return the exit status."""
    files = names or tracked_files()
    patterns = read_markers(ROOT / "scripts" / "prose_markers.txt")
    words: dict[str, int] = {}
    hits: dict[str, list[str]] = {}
    for text in (text for name in files for text in texts_of(name)):
        words[text.kind] = words.get(text.kind, 0) + len(re.findall(r"[A-Za-z']+", text.text))
        found = [match.group().strip() for pattern in patterns for match in pattern.finditer(text.text)]
        hits.setdefault(text.kind, []).extend(f"{text.path}:{text.line}: {phrase}" for phrase in found)
    failed = False
    for kind in sorted(words):
        rate = 1000 * len(hits.get(kind, ())) / max(1, words[kind])
        failed |= rate > LIMIT
        if rate > LIMIT or names:
            print(*hits.get(kind, ()), sep="\n")
        print(f"{kind}: {rate:.2f} markers per 1,000 words of {words[kind]:,} (limit {LIMIT:g})")
    documented, public = documentation(files)
    if public:
        share = documented / public
        failed |= not names and share < DOCUMENTED
        print(f"documented: {share:.1%} of {public:,} public functions and classes (limit {DOCUMENTED:.0%})")
    return int(failed)


def tracked_files() -> list[str]:
    """Return the files of the repository that have prose in them, without test data and the change log."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    endings = (".py", ".md", ".ipynb")
    return [name for name in listed if name.endswith(endings) and "/data/" not in name and (ROOT / name).exists()]


def read_markers(path: Path) -> list[re.Pattern[str]]:
    """Compile the patterns of a file, one per line; lines that are empty or start with # are skipped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [re.compile(line, re.IGNORECASE) for line in lines if line.strip() and not line.startswith("#")]


def texts_of(name: str) -> Iterator[Text]:
    """Yield the paragraphs of one file."""
    source = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        yield from paragraphs("Markdown", name, 1, re.sub(r"(?ms)^```.*?^```", _blank, source))
    elif name.endswith(".ipynb"):
        cells = json.loads(source)["cells"]
        for cell in cells:
            if cell["cell_type"] == "markdown":
                yield from paragraphs("Markdown", name, 1, "".join(cell["source"]))
    else:
        kind = "tests" if name.startswith(TESTS) else ""
        yield from python_texts(name, source, kind)


def python_texts(name: str, source: str, kind: str) -> Iterator[Text]:
    """Yield docstrings, comments and messages of a module, all as `kind` if that is not empty."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docstrings.add(statement.value)
                if isinstance(statement.value.value, str):
                    text = re.sub(r"``?[^`\n]*``?", "X", statement.value.value)
                    yield from paragraphs(kind or "docstrings", name, statement.lineno, text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node in docstrings or kind:
            continue
        if len(node.value.split()) >= 4:
            yield from paragraphs("messages", name, node.lineno, node.value)
    comment: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = start if comment else token.start[0]
            comment.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and comment:
            yield from paragraphs(kind or "comments", name, start, " ".join(comment))
            comment = []


def paragraphs(kind: str, name: str, line: int, text: str) -> Iterator[Text]:
    """Split text at blank lines, list items, table cells and the arguments of docstrings."""
    start = line
    current: list[str] = []
    for number, row in enumerate(text.split("\n"), line):
        begins = re.match(r"\s*([-*|>#]|\d+\.\s|\w[\w, *]*:\s)", row)
        if (not row.strip() or begins) and current:
            yield Text(kind, name, start, " ".join(current))
            current = []
        if row.strip():
            start = start if current else number
            current.append(re.sub(r"^\s*(\||[-*>#]+\s|\d+\.\s)?\s*", "", row).replace("|", "\n").strip())
    if current:
        yield Text(kind, name, start, " ".join(current))


def documentation(files: list[str]) -> tuple[int, int]:
    """Return how many public functions and classes have a docstring, and how many there are."""
    documented = public = 0
    for name in files:
        if name.endswith(".py") and name.startswith(("moondream_cv/", "blocks/")):
            for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name[0] != "_":
                    public += 1
                    documented += ast.get_docstring(node) is not None
    return documented, public


def _blank(match: re.Match[str]) -> str:
    return "\n" * match.group().count("\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
