"""The documentation site builds without warnings, and its reference is complete."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import decompress

import pytest
from markdown_it import MarkdownIt
from typer.main import get_command

import moondream_cv
from moondream_cv.cli import app
from moondream_cv.server.app import create_app
from tests.helpers.browser import chromium

pytest.importorskip("mkdocs", reason="needs mkdocs-material (make docs)")

ROOT = Path(moondream_cv.__file__).parents[1]
DOCS = ROOT / "docs"
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("the pages are not part of a source distribution", allow_module_level=True)

sys.path.insert(0, str(ROOT / "scripts"))
from check_links import check_site  # noqa: E402

PUBLIC_MODULES = (
    "moondream_cv",
    "moondream_cv.backends",
    "moondream_cv.errors",
    "moondream_cv.finetune",
    "moondream_cv.hf",
    "moondream_cv.labeling",
    "moondream_cv.scenes",
    "moondream_cv.video",
    "moondream_cv_blocks",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site. A warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def inventory(site: Path) -> dict[str, str]:
    """Return the address of each object of the Python reference."""
    content = (site / "objects.inv").read_bytes()
    *_, compressed = content.split(b"\n", 4)
    lines = decompress(compressed).decode().splitlines()
    found = {}
    for line in lines:
        name, _, _, address, _ = line.split(" ", 4)
        found[name] = address.replace("$", name)
    return found


def test_links_images_and_loaded_files_are_valid(site: Path) -> None:
    problems, external = check_site(site)
    assert problems == []
    assert any("://" in address for address in external)


def public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)
    return [name for name, value in vars(module).items() if is_own(value, module) and not name.startswith("_")]


def is_own(value: Any, module: ModuleType) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_reference_has_every_public_name(name: str, inventory: dict[str, str]) -> None:
    module = importlib.import_module(name)
    names = [f"{name}.{public}" for public in public_names(module)]
    assert [public for public in names if public not in inventory] == []


def test_reference_has_every_name_that_pages_and_examples_import(inventory: dict[str, str]) -> None:
    files = [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    imported = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        for module, names in re.findall(r"^from (moondream_cv[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
            imported |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert "moondream_cv.Detector" in imported
    assert sorted(imported - inventory.keys()) == []


class Text(HTMLParser):
    """The text of a page by anchor: from each heading to the next heading with an `id`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self._anchor = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        anchor = dict(attrs).get("id")
        if anchor and re.fullmatch(r"h\d", tag):
            self._anchor = anchor

    def handle_data(self, data: str) -> None:
        self.sections[self._anchor] = self.sections.get(self._anchor, "") + data


def documented(inventory: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the functions and constructors of the reference with their names."""
    for name, address in inventory.items():
        if not address.endswith(f"#{name}"):
            continue  # another name of the same object
        value: Any = sys.modules.get(name.partition(".")[0])
        for part in name.split(".")[1:]:
            value = getattr(value, part, None)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and "__init__" in vars(value) and value.__init__.__doc__:
            yield name, value.__init__


def test_sections_of_docstrings_are_rendered(site: Path, inventory: dict[str, str]) -> None:
    for module in PUBLIC_MODULES:
        importlib.import_module(module)
    pages: dict[Path, Text] = {}
    checked, wrong = 0, []
    for name, function in documented(inventory):
        page, _, anchor = inventory[name].partition("#")
        path = site / page / "index.html"
        text = pages.setdefault(path, Text(path.read_text(encoding="utf-8"))).sections.get(anchor, "")
        docstring = inspect.cleandoc(function.__doc__ or "")
        for heading, rendered in (("Args", "Parameters:"), ("Returns", "Returns:"), ("Raises", "Raises:")):
            section = re.search(rf"^{heading}:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
            if section is None:
                continue
            checked += 1
            entries = re.findall(r"^    (\w+):", section[1], re.MULTILINE) if heading != "Returns" else []
            if rendered not in text or [entry for entry in entries if entry not in text.partition(rendered)[2]]:
                wrong.append(f"{name}: {heading}")
            if f"{heading}:" in text.replace(rendered, ""):
                wrong.append(f"{name}: raw {heading}")
    assert checked > 100
    assert wrong == []


def test_reference_has_all_commands_and_options(site: Path) -> None:
    text = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    page = " ".join(Text(text).sections.values())

    def check(command: Any, path: str) -> None:
        section = Text(text).sections[path.replace(" ", "-")]
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert all(name in section for name in (*parameter.opts, *parameter.secondary_opts)), (path, parameter)
        for name, subcommand in getattr(command, "commands", {}).items():
            check(subcommand, f"{path} {name}")

    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        check(command, name)
    assert not re.search(r"\[/?(bold|dim)?\]|\[default", page)


def test_reference_has_all_paths_and_types_of_the_server(site: Path) -> None:
    document = create_app(lambda: None).openapi()  # type: ignore[arg-type, return-value]
    page = Text((site / "reference" / "http" / "index.html").read_text(encoding="utf-8"))
    text = "".join(page.sections.values())
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in text
            assert operation["summary"] in text
    fields = {
        field
        for name, schema in document["components"]["schemas"].items()
        if not name.endswith("ValidationError")  # FastAPI's own, which the server does not return
        for field in schema.get("properties", {})
    }
    assert [field for field in sorted(fields) if field not in text] == []


def test_changelog_page_has_all_releases(site: Path) -> None:
    page = (site / "changelog" / "index.html").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?(\w[\w.]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings
    assert all(re.search(rf"<h2[^>]*>[^<]*(<a[^>]*>)?{re.escape(heading)}", page) for heading in headings)


class Structure(HTMLParser):
    """Numbers of headings, list items, table rows, code blocks and images in the content of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("h1", "h2", "h3", "h4", "li", "tr", "pre", "img", "blockquote"):
            self.counts[tag] += 1


GENERATED = {"reference/cli.md", "reference/http.md", "changelog.md"}
PAGES = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))]
WRITTEN = [
    page for page in PAGES if page not in GENERATED and "\n::: " not in (DOCS / page).read_text(encoding="utf-8")
]


@pytest.mark.parametrize("page", WRITTEN)
def test_pages_have_the_same_structure_as_in_a_repository_browser(page: str, site: Path) -> None:
    expected = Structure(MarkdownIt("gfm-like", {"linkify": False}).render((DOCS / page).read_text(encoding="utf-8")))
    folder = page.removesuffix(".md").removesuffix("index")
    html = (site / folder / "index.html").read_text(encoding="utf-8")
    content = re.search(r"<article.*?</article>", html, re.DOTALL)
    assert content is not None
    assert Structure(content[0]).counts == expected.counts


@pytest.mark.slow
def test_pages_fit_into_windows_and_load_nothing_from_other_sites(site: Path) -> None:
    requested: list[str] = []
    wide: list[str] = []
    with chromium() as browser:
        for width in (360, 1280):
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.on("request", lambda request: requested.append(request.url))
            for path in sorted(site.rglob("*.html")):
                page.goto(path.as_uri())
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    wide.append(f"{path.relative_to(site)} at {width} pixels")
            page.close()
    assert wide == []
    assert requested
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
