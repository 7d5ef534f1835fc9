"""Hooks of mkdocs.yml: addresses of pyproject.toml, generated content, and links that work on the site.

Markdown in `docs` has relative links to files of the repository, so that they work in a repository browser. On the
site, they lead to the repository's address, and the name of a page as the text of a link is replaced by its title.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

sys.path.insert(0, str(Path(__file__).parent))
from command_line_reference import command_line_reference
from http_reference import http_reference
from workflow_block_reference import workflow_block_reference

log = get_plugin_logger("site_hooks")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PLACEHOLDER_HOST = "example.com"
PAGES_OF_FILES = {ROOT / "CHANGELOG.md": "changelog.md"}
"""Files outside docs that are pages of the site."""
GENERATED = {
    "<!-- generated: command line -->": command_line_reference,
    "<!-- generated: HTTP -->": http_reference,
    "<!-- generated: workflow blocks -->": workflow_block_reference,
}
"""Functions whose Markdown replaces a comment of a page."""

FENCED = re.compile(r"^( *)(```+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


@functools.cache
def project_urls() -> dict[str, str]:
    """Return `[project.urls]` of pyproject.toml."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    urls: dict[str, str] = document["project"]["urls"]
    return urls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the address of the site and, if the repository is public, of its edit links."""
    urls = project_urls()
    if urlsplit(urls["Repository"]).hostname != PLACEHOLDER_HOST:
        config.site_url = urls["Documentation"].rstrip("/") + "/"
        config.repo_url = repository_url()
        config.edit_uri = "edit/main/docs/"
        config.theme["features"].append("content.action.edit")
    return config


def repository_url() -> str:
    """Return the address of the repository's page."""
    return project_urls()["Repository"].removesuffix(".git").rstrip("/")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the Markdown of a page with its generated content and links to the repository."""
    if page.file.src_uri.startswith(("reference/", "changelog")):
        page.meta["search"] = {"boost": 0.4}  # these pages have many words, and would hide tutorials and guides
    folder = DOCS / os.path.dirname(page.file.src_uri)
    for file, uri in PAGES_OF_FILES.items():
        if page.file.src_uri == uri:
            markdown, folder = file.read_text(encoding="utf-8"), file.parent
    for comment, generate in GENERATED.items():
        if comment in markdown:
            markdown = markdown.replace(comment, generate())
    return with_site_links(markdown, page.file.src_uri, folder)


def with_site_links(markdown: str, page: str, folder: Path) -> str:
    """Return Markdown whose links work on the site.

    Args:
        markdown: Text of the page.
        page: Path of the page in docs.
        folder: Folder that the links are relative to.
    """

    def replace(match: re.Match[str]) -> str:
        bang, text, path, anchor = match[1], match[2], match[3], match[4] or ""
        target = (folder / path).resolve()
        if target in PAGES_OF_FILES:
            target = DOCS / PAGES_OF_FILES[target]
        if target.is_relative_to(DOCS) and target.suffix:
            if re.fullmatch(r"[\w./-]+\.md", text) and target.exists():
                text = title(target)
            return f"{bang}[{text}]({os.path.relpath(target, (DOCS / page).parent)}{anchor})"
        if not target.exists():
            log.warning(f"Doc file '{page}' contains a link '{path}', but {target} does not exist.")
        kind = "tree" if target.is_dir() else "blob"
        return f"{bang}[{text}]({repository_url()}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor})"

    parts: list[str] = []
    end = 0
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(replace, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(replace, markdown[end:])])


def title(page: Path) -> str:
    """Return the title of a page."""
    match = re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else page.stem
