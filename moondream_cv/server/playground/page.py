"""The playground: one page at `/` that needs nothing but this server.

Its parts lie in `playground/` and are joined when the page is first asked for; what it does there runs in the browser,
over the routes of `moondream.py` and `/v1/models`. Nothing of it comes from elsewhere, which the headers enforce.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from fastapi import APIRouter, Request, Response

from moondream_cv.server.service import service_of

SCRIPTS = ("recipes.js", "api.js", "image.js", "view.js", "run.js", "main.js")  # one module, in this order

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Page:
    """The page, ready to be sent.

    Attributes:
        html: In UTF-8.
        headers: What goes with it.
    """

    html: bytes
    headers: dict[str, str]


@router.get("/")
async def playground(http: Request) -> Response:
    """The page; 304 for a browser that has it already."""
    page = build_page(service_of(http).options.max_body)
    if http.headers.get("if-none-match") == page.headers["ETag"]:
        return Response(status_code=304, headers=page.headers)
    return Response(page.html, media_type="text/html", headers=page.headers)


@router.get("/favicon.ico")
async def favicon() -> Response:
    """The icon, for browsers and programs that ask for it without having read the page."""
    headers = {"Cache-Control": "max-age=86400"}
    return Response(_part("icon.svg"), media_type="image/svg+xml", headers=headers)


@lru_cache(maxsize=8)
def build_page(max_body: int) -> Page:
    """Join the parts of the page.

    Args:
        max_body: Bytes of a request's body that the server takes; what is larger, the page scales down.
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
    """A policy under which nothing runs but this style and this script, and no HTML is made from text."""
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
