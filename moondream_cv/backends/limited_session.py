"""A requests session for inference-sdk that limits the size of responses.

inference-sdk reads whole bodies into memory and has no size limit, but uses one session per thread. Import this module
only if inference-sdk is installed: requests comes with it.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from moondream_cv.backends import response_body
from moondream_cv.backends.retries import AttemptError

logger = logging.getLogger(__name__)


class LimitedAdapter(HTTPAdapter):
    """Transport adapter that reads response bodies up to the limits of `response_body`."""

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        """Send a request and read its response.

        Raises:
            AttemptError: The body exceeds the limit for its status code, or cannot be decompressed.
        """
        request.headers["Accept-Encoding"] = response_body.ACCEPT_ENCODING
        response = super().send(request, *args, **options)
        status, raw = response.status_code, response.raw
        encoding, length = (response.headers.pop(name, "") for name in ("Content-Encoding", "Content-Length"))
        try:
            body = response_body.read_body(_RawBody(response), encoding, length, response_body.max_body_bytes(status))
        except AttemptError as failure:
            raw.close()  # the rest of the body is not read, so the connection cannot be reused
            raise failure if response.ok else AttemptError(f"{failure}, and status {status}") from failure
        raw.release_conn()
        response.raw = io.BytesIO(body)
        if response.ok:
            response_body.check_value_count(body)
        return response


class _RawBody:
    """Iterates over the body as received, and converts errors to those of requests."""

    def __init__(self, response: requests.Response) -> None:
        self._raw = response.raw

    def __iter__(self) -> Any:
        from urllib3.exceptions import HTTPError

        try:
            yield from self._raw.stream(64 * 2**10, decode_content=False)
        except HTTPError as error:
            raise requests.exceptions.ChunkedEncodingError(error) from error


def limit_current_thread() -> None:
    """Make inference-sdk use a session with size limits in the current thread."""
    from inference_sdk.http.utils import executors

    sessions = getattr(executors, "_REQUESTS_SESSION_LOCAL", None)
    if sessions is None:
        logger.warning("this version of inference-sdk has no session per thread: responses are read without a limit")
        return
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, LimitedAdapter())
    sessions.session = session
