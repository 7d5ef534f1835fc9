"""The requests session of inference-sdk, with limits on the size of responses.

inference-sdk reads whole bodies into memory and has no setting against it, but keeps one session per thread. Import
this module only where inference-sdk is installed: requests comes with it.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from moondream_cv.backends import bodies
from moondream_cv.backends.failures import Failure

logger = logging.getLogger(__name__)


class LimitedAdapter(HTTPAdapter):
    """Reads bodies up to the limits of `bodies`, before requests sees them."""

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        """Send a request and read its response.

        Raises:
            Failure: The body exceeds the limit for its status code, or cannot be decompressed.
        """
        request.headers["Accept-Encoding"] = bodies.ACCEPT_ENCODING
        response = super().send(request, *args, **options)
        status, raw = response.status_code, response.raw
        encoding, length = (response.headers.pop(name, "") for name in ("Content-Encoding", "Content-Length"))
        try:
            body = bodies.read_body(_Raw(response), encoding, length, bodies.max_body(status))
        except Failure as failure:
            raw.close()  # what is left of the body is not read, so the connection cannot be used again
            raise failure if response.ok else Failure(f"{failure}, and status {status}") from failure
        raw.release_conn()
        response.raw = io.BytesIO(body)
        if response.ok:
            bodies.check_values(body)
        return response


class _Raw:
    """Iterates over the body as received; errors become those that requests raises itself."""

    def __init__(self, response: requests.Response) -> None:
        self._raw = response.raw

    def __iter__(self) -> Any:
        from urllib3.exceptions import HTTPError

        try:
            yield from self._raw.stream(64 * 2**10, decode_content=False)
        except HTTPError as error:
            raise requests.exceptions.ChunkedEncodingError(error) from error


def limit_this_thread() -> None:
    """Make inference-sdk use a limited session in the current thread."""
    from inference_sdk.http.utils import executors

    sessions = getattr(executors, "_REQUESTS_SESSION_LOCAL", None)
    if sessions is None:
        logger.warning("this version of inference-sdk keeps no session per thread: responses are read without a limit")
        return
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, LimitedAdapter())
    sessions.session = session
