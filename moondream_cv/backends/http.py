"""JSON over HTTP: pooled connections, time-outs, retries with back-off, server-sent events, and errors that say why.

What is asked and what the replies mean is left to the dialects.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from moondream_cv.backends import bodies
from moondream_cv.backends.addresses import Address, redacted, shortened
from moondream_cv.backends.failures import RETRIED, Failure, refuse_errors, retry_after, said_by, wait_seconds
from moondream_cv.errors import BackendError, BackendTimeout

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
PROBE_TIMEOUT = 5.0
_EXCERPT = 8192  # bytes of a reply that is no JSON which are decoded for the error message


T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """What a look at a route gave.

    Attributes:
        status: The status code; 0 where the server took the request and never answered.
        reply: The JSON object of a successful answer; None where there is none.
    """

    status: int
    reply: dict[str, Any] | None = None


class Http:
    """One server, spoken to from any number of threads.

    Attributes:
        retry_timeouts: Whether a connection that could not be opened in time is tried again.
    """

    def __init__(
        self,
        address: Address,
        *,
        headers: Mapping[str, str] | None = None,
        secrets: tuple[str | None, ...] = (),
        key_advice: str = "",
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_idle: int = 8,
    ) -> None:
        """Open no connection yet.

        Args:
            address: What every path is appended to.
            headers: Sent with every request.
            secrets: What no message may contain.
            key_advice: Where to put a key, for when the server refuses.
            timeout: Seconds that the server may take to answer, and between two pieces of a stream.
            retries: Tries after the first at the most.
            backoff: Seconds before the first retry, about; doubled with each.
            max_idle: Connections that are kept open at the most.

        Raises:
            ValueError: An argument is out of range.
        """
        check_seconds("timeout", timeout)
        check_integer("retries", retries, 0)
        check_seconds("backoff", backoff, zero=True)
        self.address = address
        self.timeout, self.retries, self.backoff = float(timeout), retries, float(backoff)
        self.retry_timeouts = True
        self._secrets = (*secrets, *address.secrets)
        self._key_advice = key_advice
        self._client = httpx.Client(
            headers={
                "Accept": "application/json",
                "Accept-Encoding": bodies.ACCEPT_ENCODING,
                "User-Agent": "moondream-cv",
                **(headers or {}),
            },
            auth=address.auth,
            timeout=self._limits(self.timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_idle),
        )

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send an object and give the object that comes back.

        Raises:
            BackendError: The server is unreachable, refuses, fails, or answers something else.
        """
        request = self._request(path, body)
        return self.retried(path, lambda: self._object(self._answer(request)))

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any] | None]:
        """Send an object and give the events that come back; None stands for `[DONE]`.

        A server that answers in one piece gives that as the only event. The request is sent, and retried, when the
        first event is asked for. The size of a line and of the whole stream is limited.

        Raises:
            BackendError: As `post`; or the stream breaks off, or says that something failed.
        """
        request = self._request(path, body, Accept="text/event-stream")
        response = self.retried(path, lambda: self._answer(request, stream=True))
        message, timed_out = None, False
        try:
            if "event-stream" in response.headers.get("content-type", ""):
                yield from _events(response)
            else:
                yield self._object(_read(response))
        except Failure as failure:
            message = str(failure)
        except httpx.HTTPError as error:
            message, timed_out = self._reason(error), isinstance(error, httpx.TimeoutException)
        finally:
            response.close()
        if message is not None:
            raise self.error(path, message, timed_out)

    def probe(self, path: str) -> Probe:
        """Look at a route, once and not for long.

        Raises:
            BackendError: There is no server.
        """
        url = f"{self.address.url}{path}"
        try:
            with self._client.stream("GET", url, timeout=self._limits(min(self.timeout, PROBE_TIMEOUT))) as response:
                try:
                    return Probe(response.status_code, self._object(_read(response)) if response.is_success else None)
                except Failure:
                    return Probe(response.status_code)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            return Probe(0)
        except httpx.HTTPError as error:
            message = self._reason(error)
        raise self.error(path, message)

    def retried(self, path: str, once: Callable[[], T]) -> T:
        """Do something, and again while it raises a `Failure` that may pass.

        Raises:
            BackendTimeout: The server did not answer in time.
            BackendError: It failed for good.
        """
        retrying = Retrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=self._wait,
            retry=retry_if_exception(self._is_retried),
            before_sleep=lambda state: self._tell(path, state),
            reraise=True,
        )
        try:
            return retrying(once)
        except Failure as failure:
            message, timed_out = str(failure), failure.timed_out
        # Outside of the handler, so that no error of a library, with a request in it, is chained to this one.
        raise self.error(path, message, timed_out)

    def error(self, path: str, message: str, timed_out: bool = False) -> BackendError:
        """Return an error that names the URL, and no key; `BackendTimeout` if the server did not answer in time."""
        kind = BackendTimeout if timed_out else BackendError
        return kind(self.safe(f"{self.address.url}{path} {message}"))

    def no_answer(self) -> str:
        """Return the message of a request that timed out."""
        return f"did not answer within {self.timeout:g} s; allow more with timeout="

    def safe(self, text: str) -> str:
        """A text without keys and passwords."""
        return redacted(text, self._secrets)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def refusal(self, status: int, said: str, again: bool = False, after: float | None = None) -> Failure:
        """What a status code other than a success means."""
        advice = {401: self._key_advice, 403: self._key_advice, 404: "; is this the server's URL?"}.get(status, "")
        return Failure(f"answered {status}{said and f': {said}'}{advice}", again or status in RETRIED, after)

    def _request(self, path: str, body: Mapping[str, Any], **headers: str) -> httpx.Request:
        content = json.dumps(body).encode()  # once for all tries
        headers["Content-Type"] = "application/json"
        return self._client.build_request("POST", f"{self.address.url}{path}", content=content, headers=headers)

    def _answer(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        try:
            response = self._client.send(request, stream=True)
            if not stream or not response.is_success:
                response = _read(response)
        except httpx.ReadTimeout as error:
            raise Failure(self.no_answer(), timed_out=True) from error
        except httpx.HTTPError as error:
            timed_out = isinstance(error, httpx.TimeoutException)
            raise Failure(
                self._reason(error), again=isinstance(error, httpx.TransportError), timed_out=timed_out
            ) from error
        if response.is_success:
            return response
        if response.has_redirect_location:
            raise Failure(f"answered {response.status_code}: a redirection, which is not followed; give its target")
        raise self.refusal(response.status_code, said_by(response), after=retry_after(response.headers))

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        bodies.check_values(response.content)
        try:
            reply = response.json()
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("content-type", "something").split(";")[0]
            text = shortened(response.content[:_EXCERPT].decode(errors="replace"))
            raise Failure(f"answered {kind} that is no JSON: {text or 'nothing'}") from error
        if not isinstance(reply, dict):
            raise Failure(f"answered no JSON object but {shortened(repr(reply))}")
        refuse_errors(reply)
        return reply

    def _reason(self, error: httpx.HTTPError) -> str:
        text = shortened(str(error)) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return f"is not reachable ({text}); is the server running?"
        if isinstance(error, httpx.TimeoutException):
            return self.no_answer()
        return f"broke off ({text})"

    def _is_retried(self, error: BaseException) -> bool:
        """Return whether another try may succeed; after a time-out only with `retry_timeouts`."""
        return isinstance(error, Failure) and error.again and (self.retry_timeouts or not error.timed_out)

    def _wait(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        wait = wait_seconds(state.attempt_number, self.backoff, getattr(failure, "after", None))
        return wait * random.uniform(1.0, 1.25)  # clients that failed together do not come again together

    def _tell(self, path: str, state: RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome else None
        wait = state.next_action.sleep if state.next_action else 0.0
        logger.info("%s; trying again in %.1f s", self.safe(f"{self.address.url}{path} {failure}"), wait)

    @staticmethod
    def _limits(seconds: float) -> httpx.Timeout:
        return httpx.Timeout(seconds, connect=min(CONNECT_TIMEOUT, seconds), pool=None)


def check_seconds(name: str, value: object, zero: bool = False) -> None:
    """Refuse what is no finite number above 0; 0 is accepted where it has a meaning.

    Raises:
        ValueError: Names the value.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or (value == 0 and not zero):  # type: ignore[operator]
        raise ValueError(f"{name} must be a number of seconds {'from' if zero else 'above'} 0, not {value!r}")


def check_integer(name: str, value: object, low: int) -> None:
    """Refuse what is no integer of at least `low`.

    Raises:
        ValueError: Names the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, not {value!r}")


def _events(response: httpx.Response) -> Iterator[dict[str, Any] | None]:
    pieces = bodies.decoded(
        response.iter_raw(), response.headers.get("content-encoding", ""), bodies.MAX_STREAM, "stream"
    )
    # httpx's own splitter also breaks at U+2028 and the like, which JSON may contain.
    for line in bodies.lines(pieces):
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            yield None
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Failure(f"streamed what is no JSON: {shortened(data.decode(errors='replace'))}") from error
        if not isinstance(event, dict):
            raise Failure(f"streamed no JSON object but {shortened(repr(event))}")
        refuse_errors(event)
        yield event


def _read(response: httpx.Response) -> httpx.Response:
    """Read the body of a response and close it.

    Raises:
        Failure: The body exceeds the limit for its status code, or cannot be decompressed.
    """
    headers, status = response.headers.copy(), response.status_code
    encoding, length = headers.pop("content-encoding", ""), headers.pop("content-length", "")
    try:
        body = bodies.read_body(response.iter_raw(), encoding, length, bodies.max_body(status))
    except Failure as failure:
        raise failure if response.is_success else Failure(f"{failure}, and status {status}") from failure
    finally:
        response.close()
    return httpx.Response(status, headers=headers, content=body)
