"""Check the links of the built documentation site.

    python scripts/check_links.py                check build/site, without the network
    python scripts/check_links.py --external     also request every address of another site
    python scripts/check_links.py SITE           check another folder

Fails if a link or an anchor inside the site leads nowhere, an image has no alternative text, or a page loads something
from another site. With --external, it also fails if an address does not answer with a status below 400.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
LOADED = {"audio": "src", "iframe": "src", "img": "src", "script": "src", "source": "src", "video": "src"}
"""Tags that load a file, with the attribute of its address; `link` depends on `rel`."""
LOADED_RELATIONS = {"icon", "modulepreload", "preconnect", "preload", "prefetch", "stylesheet"}
NOT_PUBLIC = {"example.com", "example.org", "localhost", "127.0.0.1", "gpu-box"}
"""Hosts of examples and placeholders."""


class PageLinks(HTMLParser):
    """The links of a page.

    Attributes:
        anchors: Values of `id` and `name`.
        links: Addresses of links.
        loaded: Addresses of files that the page loads.
        without_alt: Addresses of images without alternative text.
    """

    def __init__(self, html: str) -> None:
        """Parse the text of a page."""
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.without_alt: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the addresses and anchors of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and LOADED_RELATIONS & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])
        if tag in LOADED and values.get(LOADED[tag]):
            self.loaded.append(values[LOADED[tag]])
        if tag == "img" and not values.get("alt"):
            self.without_alt.append(values.get("src", ""))


def check_site(site: Path) -> tuple[list[str], set[str]]:
    """Check all pages of a site without the network.

    Args:
        site: Folder of the built site.

    Returns:
        The problems, and the addresses of other sites that the pages link to.
    """
    pages = {path: PageLinks(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems: list[str] = []
    external: set[str] = set()
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        problems += [f"{name}: image without alternative text: {address}" for address in page.without_alt]
        for address in [*page.links, *page.loaded]:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") or parts.netloc:
                if address in page.loaded:
                    problems.append(f"{name}: loads {address}")
                else:
                    external.add(parts._replace(fragment="").geturl())
            elif not parts.scheme:
                problems += _problems_of_link(site, path, pages, address)
    return problems, external


def _problems_of_link(site: Path, path: Path, pages: dict[Path, PageLinks], address: str) -> list[str]:
    """Return the problem of a link inside the site, if it leads nowhere."""
    parts = urlsplit(address)
    place = unquote(parts.path)
    folder = site if place.startswith("/") else path.parent
    target = (folder / place.lstrip("/")).resolve() if place else path
    if target.is_dir():
        target /= "index.html"
    name = path.relative_to(site).as_posix()
    if not target.exists():
        return [f"{name}: {address} does not exist"]
    anchor = unquote(parts.fragment)
    if anchor and not anchor.startswith("__") and target in pages and anchor not in pages[target].anchors:
        return [f"{name}: {address} has no such anchor"]
    return []


def check_external(addresses: set[str]) -> list[str]:
    """Request addresses of other sites, and return those that fail."""
    import httpx

    def problem(address: str) -> str | None:
        try:
            with client.stream("GET", address) as response:
                return f"{address}: status {response.status_code}" if response.status_code >= 400 else None
        except httpx.HTTPError as error:
            return f"{address}: {error}"

    public = sorted(address for address in addresses if urlsplit(address).hostname not in NOT_PUBLIC)
    with httpx.Client(follow_redirects=True, timeout=20) as client, ThreadPoolExecutor(8) as pool:
        return [text for text in pool.map(problem, public) if text]


def main() -> None:
    """Check the links of a site."""
    parser = argparse.ArgumentParser(description="Check the links of the built documentation site.")
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "build" / "site", help="Folder of the built site.")
    parser.add_argument("--external", action="store_true", help="Request every address of another site.")
    options = parser.parse_args()
    if not (options.site / "index.html").exists():
        sys.exit(f"{options.site} has no index.html; build the site with: make docs")
    problems, external = check_site(options.site.resolve())
    if options.external:
        problems += check_external(external)
    if problems:
        sys.exit("\n".join(problems))
    print(f"All links inside the site are valid; {len(external)} addresses of other sites")


if __name__ == "__main__":
    main()
