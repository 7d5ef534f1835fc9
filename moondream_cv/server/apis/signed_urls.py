"""Signed URLs of downloads, which need no API key and expire."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import urlencode

from fastapi import Request as HttpRequest

from moondream_cv.server.errors import ServerError

EXPIRES_IN = 3600  # seconds
CHECKPOINTS_PATH = "/v1/tuning/downloads"
BATCH_OUTPUTS_PATH = "/v1/batch/outputs"


class UrlSigner:
    """Signs URLs. They are valid until the server restarts, or for an hour."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def url(self, base_url: str, path: str) -> str:
        """Return the signed URL of a path.

        Args:
            base_url: URL of the server.
            path: Path of the route, which starts with a slash.
        """
        expires = int(time.time()) + EXPIRES_IN
        query = urlencode({"expires": expires, "signature": self.signature(path, expires)})
        return f"{base_url.rstrip('/')}{path}?{query}"

    def check(self, path: str, expires: int, signature: str) -> None:
        """Check a signed URL.

        Args:
            path: Path of the route, which starts with a slash.
            expires: Time in seconds since 1970.
            signature: Signature of the URL.

        Raises:
            ServerError: 403; the signature is wrong, or the URL has expired.
        """
        expected = self.signature(path, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            raise ServerError(403, "the signature of the URL is wrong; request another URL", kind="permission_error")
        if time.time() > expires:
            raise ServerError(403, "the URL has expired; request another URL", kind="permission_error")

    def signature(self, path: str, expires: int) -> str:
        """Return the signature of a path.

        Args:
            path: Path of the route, which starts with a slash.
            expires: Time in seconds since 1970.
        """
        return hmac.new(self._key, f"{path}:{expires}".encode(), hashlib.sha256).hexdigest()


def is_signed(path: str) -> bool:
    """Return whether the URLs of a path are signed."""
    return path.startswith((f"{CHECKPOINTS_PATH}/", f"{BATCH_OUTPUTS_PATH}/"))


def get_url_signer(http: HttpRequest) -> UrlSigner:
    """Return the signer of the application that received a request."""
    state = http.app.state
    if not hasattr(state, "url_signer"):
        state.url_signer = UrlSigner()
    signer: UrlSigner = state.url_signer
    return signer
