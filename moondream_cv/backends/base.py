"""Base class of the remote models: concurrent requests, one encoding per image, one result per request.

Subclasses implement the dialects; `http.py` implements the transport.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, ClassVar, TypedDict, TypeVar, get_args

from moondream_cv.arguments import check_choice, check_flag, check_integer
from moondream_cv.backends.credentials import find_api_key
from moondream_cv.backends.http import HttpClient, Probe
from moondream_cv.backends.images import EncodedImage, ImageFormat, encode_image
from moondream_cv.backends.retries import AttemptError
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import BackendError, BackendTimeout, MoondreamError, UnsupportedSkill
from moondream_cv.requests import (
    Caption,
    Chat,
    Detect,
    ErrorResult,
    Gaze,
    Point,
    Query,
    Request,
    Result,
    Settings,
    pieces_of,
)
from moondream_cv.vision_model import PublishedMethods

Self = TypeVar("Self", bound="RemoteModel")
T = TypeVar("T")

_GRACE_SECONDS = 0.1
_REQUEST_TYPES = (Detect, Point, Query, Chat, Caption, Gaze)
_ALTERNATIVES = {  # by skill
    "detect": "use MoondreamAPI or a model from moondream_cv.load()",
    "point": "use MoondreamAPI or a model from moondream_cv.load()",
    "query": "use MoondreamAPI or a model from moondream_cv.load()",
    "caption": "use MoondreamAPI or a model from moondream_cv.load()",
    "gaze": "use a model from moondream_cv.load(), or MoondreamAPI with moondream-cv serve",
}


class RemoteOptions(TypedDict, total=False):
    """Types of the keyword arguments that all remote models share."""

    api_key: str | None
    has_scores: bool | None
    timeout: float
    retries: int
    backoff: float
    max_in_flight: int
    image_format: ImageFormat


class RemoteModel(PublishedMethods):
    """A model on a server. Thread-safe. A context manager, which closes the model.

    Attributes:
        skills: Skills of the model.
        url: URL of the server, without user, password and key.
        reconnect: Function that creates the model again, for pickle; None if it was not created by `connect`.
        max_in_flight: Maximum number of concurrent requests, over all threads.
        stop_after_timeout: Whether one timeout fails the other requests of a `run`. Requests that have not been sent
            get the error of the first one that timed out, and those in flight get it if no response arrives within one
            timeout. Set it before the first request; it also disables retries after timeouts. False by default: each
            request has its own timeout.
    """

    skills: frozenset[str] = frozenset()

    _key_variables: ClassVar[tuple[str, ...]] = ()
    # Name of the header for the key, and format of its value; None: the key is not sent in a header
    _key_header: ClassVar[tuple[str, str] | None] = ("Authorization", "Bearer {}")
    _reuses_connections: ClassVar[bool] = True

    def __init__(
        self,
        server: ServerURL,
        *,
        api_key: str | None = None,
        has_scores: bool | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_in_flight: int = 8,
        image_format: ImageFormat = "jpeg",
    ) -> None:
        """Create a client for a server. The first request opens the connection.

        Args:
            server: URL of the server.
            api_key: API key. None reads the environment variable of the dialect (see the class), and an empty string
                sends no key.
            has_scores: Whether the server returns real confidences. None queries the server when first needed.
            timeout: Time limit in seconds for the server to respond, and between two chunks of a stream.
            retries: Maximum number of retries if the server is busy, fails or is unreachable.
            backoff: Delay before the first retry in seconds, doubled for each further one. A `Retry-After` of the
                server takes precedence.
            max_in_flight: Maximum number of concurrent requests.
            image_format: Format for images that are not files yet: "jpeg" or "png" (lossless, larger).

        Raises:
            ValueError: An argument is out of range.
        """
        key = find_api_key(api_key, *self._key_variables)
        self.max_in_flight = check_integer("max_in_flight", max_in_flight)
        self.url = server.url
        self._api_key = key
        self._image_format = check_choice("image_format", image_format, get_args(ImageFormat))
        self._has_scores = None if has_scores is None else check_flag("has_scores", has_scores)
        self._http = HttpClient(
            server,
            headers=self._key_headers(key),
            secrets=(key,),
            key_advice=f"; pass api_key= or set {next(iter(self._key_variables), '')}",
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_idle=max_in_flight if self._reuses_connections else 1,
        )
        self._lock = threading.Lock()
        self._workers = self._new_workers()
        self._closed = False
        self.reconnect: Callable[[], RemoteModel] | None = None

    def _key_headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that authenticate a request."""
        if key is None or self._key_header is None:
            return {}
        name, form = self._key_header
        return {name: form.format(key)}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments of `connect`: the process that unpickles the model opens new connections.

        The pickle contains an API key that was passed to `connect`, but not one from an environment variable.

        Raises:
            BackendError: The model was not created by `connect`, or is closed.
        """
        if self._closed or self.reconnect is None:
            reason = "it is closed" if self._closed else "it was not created by connect()"
            raise BackendError(
                f"{type(self).__name__} at {self.url} cannot be pickled or copied, because {reason}: call connect() in "
                "the process that uses it"
            )
        return _reconnect, (self.reconnect, self.stop_after_timeout)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests concurrently. Each image is encoded once, even if several requests use it.

        Args:
            requests: Requests of any skills.

        Returns:
            Results in the order of the requests; an `ErrorResult` for each one that failed.

        Raises:
            MoondreamError: The model is closed.
        """
        self.check_open()
        images: dict[int, _LazyImage] = {}
        futures: list[Future[Result]] = []
        batch = _Batch(self._http.timeout if self.stop_after_timeout else None)
        try:
            for request in requests:
                image = getattr(request, "image", None)
                lazy_image = images.setdefault(id(image), _LazyImage(image, self._image_format))
                futures.append(self._workers.submit(self._run_one, request, lazy_image, batch))
            images.clear()  # so that each image is freed after its last request
            if self.stop_after_timeout:
                return self._results_until_timeout(batch, futures)
            return [future.result() for future in futures]
        except (CancelledError, RuntimeError) as error:  # another thread closed the model
            self.check_open()
            raise error
        finally:
            for future in futures:
                future.cancel()

    def stream(self, request: Request) -> Iterator[Any]:
        """Run one request, and return its result in parts as they arrive.

        The parts are text as it is generated, or objects and points once the response is complete. With `reasoning`,
        the reasoning is the first part. The call waits for the first part, so that errors are raised by the call. If
        the dialect does not stream, the text is one part.

        Args:
            request: Request of any skill.

        Raises:
            BackendError: The server is unreachable, returns an error or returns an invalid response.
            ImageError: The image cannot be read.
            UnsupportedSkill: The model does not support the request.
        """
        self.check_open()
        self._check_request(request)
        parts = self._stream_request(request, _LazyImage(request.image, self._image_format).encoded())
        first = next(parts, None)
        return iter(()) if first is None else itertools.chain((first,), parts)

    @property
    def stop_after_timeout(self) -> bool:  # documented with the class
        return not self._http.retry_timeouts

    @stop_after_timeout.setter
    def stop_after_timeout(self, value: bool) -> None:
        self._http.retry_timeouts = not value

    @property
    def has_scores(self) -> bool:
        """Whether confidences are real; otherwise every confidence is 1.0."""
        with self._lock:
            if self._has_scores is None:
                try:
                    probe = self._probe_server()
                except BackendError:
                    return False  # and query again, when the server is reachable
                if probe is not None and (probe.status == 429 or probe.status >= 500):
                    return False
                self._has_scores = probe is not None and self._reports_scores(probe.body or {})
            return self._has_scores

    @has_scores.setter
    def has_scores(self, value: bool) -> None:
        self._has_scores = value

    def close(self) -> None:
        """Close the connections and cancel waiting requests. Later calls raise."""
        self._closed = True
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def check_open(self) -> None:
        """Raise if the model is closed.

        Raises:
            MoondreamError: The model is closed.
        """
        if self._closed:
            raise MoondreamError(f"{self!r} is closed; call connect() again")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _has_skill(self, skill: str) -> bool:
        """Return whether the server offers a skill."""
        return skill in self.skills

    def _send_request(self, request: Request, image: EncodedImage | None) -> Result:
        """Send one request of a supported skill, and return its result."""
        raise NotImplementedError

    def _stream_request(self, request: Request, image: EncodedImage | None) -> Iterator[Any]:
        """Send one request, and yield its result in parts; overridden by dialects that stream."""
        yield from pieces_of(self._send_request(request, image))

    def _probe_server(self) -> Probe | None:
        """Query the server for its models; None if the dialect has no such route."""
        return None

    def _reports_scores(self, body: dict[str, Any]) -> bool:
        """Return whether the response to `_probe_server` states that confidences are real."""
        return False

    def _parse(self, path: str, parse: Callable[[], T]) -> T:
        """Parse a response.

        Args:
            path: Path of the route, for error messages.
            parse: Function that parses the response.

        Raises:
            BackendError: The response is invalid.
        """
        try:
            return parse()
        except AttemptError as failure:
            message = str(failure)
        raise self._http.error(path, message)

    def _unsupported(self, action: str, alternative: str = "use MoondreamAPI") -> UnsupportedSkill:
        return UnsupportedSkill(f"{type(self).__name__} cannot {action}; {alternative}")

    def _check_request(self, request: Request) -> None:
        if not isinstance(request, _REQUEST_TYPES):
            raise ValueError(f"a request must be a Detect, Point, Query, Chat, Caption or Gaze, got {request!r:.100}")
        if not self._has_skill(request.skill):
            skills = ", ".join(sorted(self.skills))
            raise self._unsupported(f"{request.skill}, only {skills}", _ALTERNATIVES[request.skill])
        local = "use a model from moondream_cv.load()"
        if isinstance(request, Chat):
            raise self._unsupported("continue a conversation", local)
        if isinstance(request, Query) and request.stop:
            raise self._unsupported("end an answer at stop strings", local)
        if isinstance(request, Query) and request.json_schema is not None:
            raise self._unsupported("constrain an answer to a JSON schema", local)

    def _run_one(self, request: Request, image: _LazyImage, batch: _Batch) -> Result:
        """Run one request of a batch in a worker thread."""
        if batch.error is not None:
            return ErrorResult(batch.error)
        try:
            self._check_request(request)
            encoded = image.encoded()
            batch.mark_progress()
            result = self._send_request(request, encoded)
            batch.mark_progress()
            return result
        except Exception as error:
            if self._closed:
                return ErrorResult(MoondreamError(f"{self!r} was closed before the response arrived"))
            if isinstance(error, BackendTimeout):
                batch.fail(error)
            else:
                batch.mark_progress()
            return ErrorResult(error)

    def _results_until_timeout(self, batch: _Batch, futures: Sequence[Future[Result]]) -> list[Result]:
        """Return the results of a batch; the requests without a result after a timeout get its error."""
        results: dict[Future[Result], Result] = {}
        done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(done.put)
        while len(results) < len(futures):
            try:
                future = done.get(timeout=batch.seconds_left())
            except queue.Empty:
                if batch.seconds_left() > 0:
                    continue
                missing = [future for future in futures if future not in results]
                if not any(future.running() for future in missing):  # requests of other threads occupy all workers
                    batch.mark_progress()
                    continue
                batch.error = error = batch.error or self._http.error("", self._http.timeout_message(), timed_out=True)
                self._workers = self._new_workers()  # the old ones are occupied until the server ends the requests
                return [results.get(future) or ErrorResult(error) for future in futures]
            results[future] = future.result()
        return [results[future] for future in futures]

    def _new_workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.max_in_flight, thread_name_prefix="moondream-cv-backend")


class _Batch:
    """State of the requests of one `run`.

    Attributes:
        error: First timeout, which fails the requests that have not been sent; None before it, and always None without
            `stop_after_timeout`.
    """

    def __init__(self, timeout: float | None) -> None:
        self.error: BackendError | None = None
        self._timeout = timeout
        self._last_progress = time.monotonic()

    def mark_progress(self) -> None:
        """Restart the timeout, because a request was sent or completed."""
        self._last_progress = time.monotonic()

    def fail(self, error: BackendTimeout) -> None:
        """Record the first timeout."""
        if self._timeout is not None and self.error is None:
            self.error = error

    def seconds_left(self) -> float:
        """Return the seconds until one timeout plus a grace period has passed without progress.

        The grace period lets the timeouts of the requests come first: their errors contain the route.
        """
        return max(0.0, self._last_progress + (self._timeout or 0.0) + _GRACE_SECONDS - time.monotonic())


class _LazyImage:
    """An image that several requests may share, encoded when the first of them is sent."""

    def __init__(self, image: Any, image_format: str) -> None:
        self._image = image
        self._format = image_format
        self._lock = threading.Lock()
        self._encoded: EncodedImage | Exception | None = None

    def encoded(self) -> EncodedImage | None:
        """Return the encoded image; None if there is no image.

        Raises:
            ImageError: The image cannot be read.
        """
        with self._lock:
            if self._encoded is None and self._image is not None:
                try:
                    self._encoded = encode_image(self._image, self._format)
                except Exception as error:  # kept for the other requests: a file object can be read only once
                    self._encoded = error
        if isinstance(self._encoded, Exception):
            raise self._encoded
        return self._encoded


def changed_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    values = ((field.name, getattr(settings, field.name), field.default) for field in fields(settings))
    return {name: value for name, value, default in values if value != default}


def listed_models(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a server's list of models, in the format of Moondream or OpenAI."""
    lists = [body.get(key) for key in ("models", "data")]
    return [entry for entries in lists if isinstance(entries, list) for entry in entries if isinstance(entry, dict)]


def model_has_scores(body: dict[str, Any], model: str | None) -> bool:
    """Return whether the list of models states that confidences are real, for this model or else for the first one."""
    return _find_entry(body, model).get("has_scores") is True


def model_has_skill(body: dict[str, Any], model: str | None, skill: str) -> bool:
    """Return whether the list of models names a skill, for this model or else for the first one."""
    skills = _find_entry(body, model).get("skills")
    return isinstance(skills, list) and skill in skills


def _find_entry(body: dict[str, Any], model: str | None) -> dict[str, Any]:
    entries = listed_models(body)
    named = [entry for entry in entries if model is not None and entry.get("id") == model]
    return next(iter(named or entries), {})


def _reconnect(connect: Callable[[], RemoteModel], stop_after_timeout: bool) -> RemoteModel:
    """Create a model from its pickle."""
    model = connect()
    model.stop_after_timeout = stop_after_timeout
    return model
