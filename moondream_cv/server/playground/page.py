"""The playground: one page at `/`, which needs only this server.

The parts of the page are the files of this folder; they are joined on the first request. The page uses the routes of
Moondream's API and `/v1/models`. It loads nothing from other sites, which its headers enforce.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from fastapi import APIRouter, Request, Response

from moondream_cv.server.service import get_service

SCRIPTS = ("recipes.js", "api.js", "image.js", "view.js", "run.js", "main.js")  # joined into one module, in this order

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Page:
    """The page and its headers.

    Attributes:
        html: HTML in UTF-8.
        headers: HTTP headers of the response.
    """

    html: bytes
    headers: dict[str, str]


@router.get("/")
async def playground(http: Request) -> Response:
    """Return the page; 304 if the browser has the current version."""
    page = build_page(get_service(http).settings.max_body)
    if http.headers.get("if-none-match") == page.headers["ETag"]:
        return Response(status_code=304, headers=page.headers)
    return Response(page.html, media_type="text/html", headers=page.headers)


@router.get("/favicon.ico")
async def favicon() -> Response:
    """Return the icon, for clients that request it without reading the page."""
    headers = {"Cache-Control": "max-age=86400"}
    return Response(_part("icon.svg"), media_type="image/svg+xml", headers=headers)


@lru_cache(maxsize=8)
def build_page(max_body: int) -> Page:
    """Join the parts of the page.

    Args:
        max_body: Maximum size of a request body in bytes; the page scales down larger images.
    """
    style, script = _part("style.css"), "\n".join(map(_part, SCRIPTS))
    icon = f"data:image/svg+xml;base64,{_base64(_part('icon.svg').encode())}"
    html = _part("index.html")
    for name, text in {"style": style, "script": script, "icon": icon, "max_body": str(max_body)}.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    encoded = html.encode()
    headers = {
        "Content-Security-Policy": _policy(f"\n{style}\n", f"\n{script}\n"),
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(encoded).hexdigest()[:32]}"',
    }
    return Page(encoded, headers)


def _policy(style: str, script: str) -> str:
    """Return a content security policy that allows only this style and this script, and no HTML from text."""
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
