"""HTTP client for JSON: pooled connections, timeouts, retries with backoff, and server-sent events."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from moondream_cv.arguments import check_integer, check_not_negative, check_positive
from moondream_cv.backends import response_body
from moondream_cv.backends.credentials import redact, shorten
from moondream_cv.backends.error_body import error_message, raise_for_error
from moondream_cv.backends.retries import RETRIED_STATUSES, AttemptError, parse_retry_after, retry_delay
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import BackendError, BackendTimeout

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
PROBE_TIMEOUT = 5.0
_EXCERPT_BYTES = 8192  # decoded for the error message if a response is not JSON


T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """Response to a probe of a route.

    Attributes:
        status: Status code; 0 if the server accepted the request and did not respond.
        body: JSON object of a successful response; None if there is none.
    """

    status: int
    body: dict[str, Any] | None = None


class HttpClient:
    """Connection to one server. Thread-safe.

    Attributes:
        server: URL of the server.
        timeout: Time limit in seconds for the server to respond.
        retries: Maximum number of retries.
        backoff: Delay before the first retry in seconds.
        retry_timeouts: Retry connections that could not be opened in time.
    """

    def __init__(
        self,
        server: ServerURL,
        *,
        headers: Mapping[str, str] | None = None,
        secrets: tuple[str | None, ...] = (),
        key_advice: str = "",
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_idle: int = 8,
    ) -> None:
        """Create a client; connections are opened by the first request.

        Args:
            server: URL to which every path is appended.
            headers: Headers of every request.
            secrets: Keys and passwords to redact in messages.
            key_advice: Advice on API keys, appended to the errors 401 and 403.
            timeout: Time limit in seconds for the server to respond, and between two chunks of a stream.
            retries: Maximum number of retries.
            backoff: Approximate delay before the first retry in seconds, doubled for each further one.
            max_idle: Maximum number of idle connections to keep open.

        Raises:
            ValueError: An argument is out of range.
        """
        self.server = server
        self.timeout = check_positive("timeout", timeout, "seconds")
        self.retries = check_integer("retries", retries, 0)
        self.backoff = check_not_negative("backoff", backoff, "seconds")
        self.retry_timeouts = True
        self._secrets = (*secrets, *server.secrets)
        self._key_advice = key_advice
        self._client = httpx.Client(
            headers={
                "Accept": "application/json",
                "Accept-Encoding": response_body.ACCEPT_ENCODING,
                "User-Agent": "moondream-cv",
                **(headers or {}),
            },
            auth=server.auth,
            timeout=self._timeouts(self.timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_idle),
        )

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a JSON object and return the JSON object of the response.

        Args:
            path: Path of the route.
            body: Object to send.

        Raises:
            BackendError: The server is unreachable, returns an error, or returns no JSON object.
        """
        request = self._build_request(path, body)
        return self.with_retries(path, lambda: self._parse_object(self._send(request)))

    def stream_events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any] | None]:
        """Send a JSON object and yield the server-sent events of the response; None stands for `[DONE]`.

        The response of a server that does not stream is yielded as one event. The request is sent, and retried, when
        the first event is requested. The sizes of lines and of the whole stream are limited.

        Args:
            path: Path of the route.
            body: Object to send.

        Raises:
            BackendError: As for `post`, or the stream ends early or contains an error.
        """
        request = self._build_request(path, body, Accept="text/event-stream")
        response = self.with_retries(path, lambda: self._send(request, stream=True))
        message, timed_out = None, False
        try:
            if "event-stream" in response.headers.get("content-type", ""):
                yield from _parse_events(response)
            else:
                yield self._parse_object(_read_response(response))
        except AttemptError as failure:
            message = str(failure)
        except httpx.HTTPError as error:
            message, timed_out = self._describe(error), isinstance(error, httpx.TimeoutException)
        finally:
            response.close()
        if message is not None:
            raise self.error(path, message, timed_out)

    def probe(self, path: str) -> Probe:
        """Send one GET request with a short timeout and without retries.

        Raises:
            BackendError: The server is unreachable.
        """
        url = f"{self.server.url}{path}"
        try:
            with self._client.stream("GET", url, timeout=self._timeouts(min(self.timeout, PROBE_TIMEOUT))) as response:
                try:
                    body = self._parse_object(_read_response(response)) if response.is_success else None
                except AttemptError:
                    body = None
                return Probe(response.status_code, body)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            return Probe(0)
        except httpx.HTTPError as error:
            message = self._describe(error)
        raise self.error(path, message)

    def with_retries(self, path: str, attempt: Callable[[], T]) -> T:
        """Call a function, and call it again while it raises a retryable `AttemptError`.

        Args:
            path: Path of the route, for error messages.
            attempt: Function that makes one attempt.

        Raises:
            BackendTimeout: The server did not respond in time.
            BackendError: The last attempt failed.
        """
        retrying = Retrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=self._retry_delay,
            retry=retry_if_exception(self._is_retried),
            before_sleep=lambda state: self._log_retry(path, state),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except AttemptError as failure:
            message, timed_out = str(failure), failure.timed_out
        # Outside of the handler, so that no error of a library, with a request in it, is chained to this one.
        raise self.error(path, message, timed_out)

    def error(self, path: str, message: str, timed_out: bool = False) -> BackendError:
        """Return an error with the URL and without keys; a `BackendTimeout` if `timed_out`."""
        kind = BackendTimeout if timed_out else BackendError
        return kind(self.redact(f"{self.server.url}{path} {message}"))

    def timeout_message(self) -> str:
        """Return the message for a request that timed out."""
        return f"did not respond within {self.timeout:g} s; increase timeout="

    def redact(self, text: str) -> str:
        """Return a text without keys and passwords."""
        return redact(text, self._secrets)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def status_error(self, status: int, message: str, retry_after: float | None = None) -> AttemptError:
        """Return the error for a status code.

        Args:
            status: Status code other than success.
            message: Message from the body.
            retry_after: Delay in seconds that the server requests.
        """
        advice = {401: self._key_advice, 403: self._key_advice, 404: "; check the URL of the server"}.get(status, "")
        text = f"returned status {status}{message and f': {message}'}{advice}"
        return AttemptError(text, status in RETRIED_STATUSES, retry_after)

    def _build_request(self, path: str, body: Mapping[str, Any], **headers: str) -> httpx.Request:
        content = json.dumps(body).encode()  # once for all attempts
        headers["Content-Type"] = "application/json"
        return self._client.build_request("POST", f"{self.server.url}{path}", content=content, headers=headers)

    def _send(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        try:
            response = self._client.send(request, stream=True)
            if not stream or not response.is_success:
                response = _read_response(response)
        except httpx.ReadTimeout as error:
            raise AttemptError(self.timeout_message(), timed_out=True) from error
        except httpx.HTTPError as error:
            raise AttemptError(
                self._describe(error),
                retryable=isinstance(error, httpx.TransportError),
                timed_out=isinstance(error, httpx.TimeoutException),
            ) from error
        if response.is_success:
            return response
        if response.has_redirect_location:
            raise AttemptError(
                f"returned status {response.status_code}, and redirects are not followed; use the target URL"
            )
        retry_after = parse_retry_after(response.headers)
        raise self.status_error(response.status_code, error_message(response), retry_after)

    def _parse_object(self, response: httpx.Response) -> dict[str, Any]:
        response_body.check_value_count(response.content)
        try:
            body = response.json()
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("content-type", "content").split(";")[0]
            text = shorten(response.content[:_EXCERPT_BYTES].decode(errors="replace"))
            raise AttemptError(f"returned {kind} instead of JSON: {text or 'empty'}") from error
        if not isinstance(body, dict):
            raise AttemptError(f"returned no JSON object: {shorten(repr(body))}")
        raise_for_error(body)
        return body

    def _describe(self, error: httpx.HTTPError) -> str:
        """Return the message for an error of httpx."""
        text = shorten(str(error)) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return f"has an untrusted certificate ({text}); set SSL_CERT_FILE to the file of a certificate to trust"
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return f"is unreachable ({text}); check that the server is running"
        if isinstance(error, httpx.TimeoutException):
            return self.timeout_message()
        return f"closed the connection early ({text})"

    def _is_retried(self, error: BaseException) -> bool:
        """Return whether an error is retryable; timeouts only with `retry_timeouts`."""
        return isinstance(error, AttemptError) and error.retryable and (self.retry_timeouts or not error.timed_out)

    def _retry_delay(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        delay = retry_delay(state.attempt_number, self.backoff, getattr(failure, "retry_after", None))
        return delay * random.uniform(1.0, 1.25)  # clients that failed together must not retry together

    def _log_retry(self, path: str, state: RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome else None
        delay = state.next_action.sleep if state.next_action else 0.0
        logger.info("%s; retrying in %.1f s", self.redact(f"{self.server.url}{path} {failure}"), delay)

    @staticmethod
    def _timeouts(seconds: float) -> httpx.Timeout:
        return httpx.Timeout(seconds, connect=min(CONNECT_TIMEOUT, seconds), pool=None)


def _parse_events(response: httpx.Response) -> Iterator[dict[str, Any] | None]:
    chunks = response_body.decompressed(
        response.iter_raw(), response.headers.get("content-encoding", ""), response_body.MAX_STREAM_BYTES, "stream"
    )
    # httpx's own line splitter also splits at U+2028 and similar characters, which JSON may contain.
    for line in response_body.split_lines(chunks):
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            yield None
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise AttemptError(f"streamed invalid JSON: {shorten(data.decode(errors='replace'))}") from error
        if not isinstance(event, dict):
            raise AttemptError(f"streamed no JSON object: {shorten(repr(event))}")
        raise_for_error(event)
        yield event


def _read_response(response: httpx.Response) -> httpx.Response:
    """Read the body of a response and close it.

    Raises:
        AttemptError: The body exceeds the limit for its status code, or cannot be decompressed.
    """
    headers, status = response.headers.copy(), response.status_code
    encoding, length = headers.pop("content-encoding", ""), headers.pop("content-length", "")
    try:
        body = response_body.read_body(response.iter_raw(), encoding, length, response_body.max_body_bytes(status))
    except AttemptError as failure:
        raise failure if response.is_success else AttemptError(f"{failure}, and status {status}") from failure
    finally:
        response.close()
    return httpx.Response(status, headers=headers, content=body)
