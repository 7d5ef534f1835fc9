"""What all remote models have in common: many requests in flight, every image encoded once, errors in their places.

How a request looks on the wire is left to the dialects, and connections to `http.py`.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

from moondream_cv.backends.failures import Failure
from moondream_cv.backends.http import Http, Probe, check_integer
from moondream_cv.backends.images import EncodedPicture, check_format, encode
from moondream_cv.errors import BackendError, BackendTimeout, MoondreamError, UnsupportedSkill
from moondream_cv.requests import (
    Caption,
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

_GRACE = 0.1  # seconds
_KNOWN_REQUESTS = (Detect, Point, Query, Caption, Gaze)
_ELSEWHERE = {  # skill → what has it
    "detect": "MoondreamAPI can, and so can a model from moondream_cv.load()",
    "point": "MoondreamAPI can, and so can a model from moondream_cv.load()",
    "query": "MoondreamAPI can, and so can a model from moondream_cv.load()",
    "caption": "MoondreamAPI can, and so can a model from moondream_cv.load()",
    "gaze": "a model from moondream_cv.load() can, and so can MoondreamAPI with moondream-cv serve",
}


def _reconnect(connect: Callable[[], RemoteModel], stop_after_timeout: bool) -> RemoteModel:
    """Make a model from its pickle."""
    model = connect()
    model.stop_after_timeout = stop_after_timeout
    return model


class RemoteModel(PublishedMethods):
    """A model on a server. Thread-safe; usable in a `with` statement, which closes it.

    Attributes:
        skills: What it can do.
        url: The server's URL, without user, password and key.
        reconnect: Makes the model again, for pickle; None if it was not made by `connect`.
        max_in_flight: Requests that wait for the server at a time, over all threads.
        stop_after_timeout: Whether one time-out fails the other requests of a `run`. Requests that have not been sent
            get the error of the first one that timed out, and those in flight get it when no answer has arrived for
            one time-out. Set it before the first request; it also disables retries after time-outs. False by default:
            each request has a time-out of its own.
    """

    skills: frozenset[str] = frozenset()

    def __init__(self, http: Http, *, has_scores: bool | None, max_in_flight: int, image_format: str) -> None:
        """Open no connection yet.

        Args:
            has_scores: Whether the server's confidences are real; None asks it when that is first needed.
            max_in_flight: See above.
            image_format: As `pictures.encode` takes it.

        Raises:
            ValueError: An argument is out of range.
        """
        check_integer("max_in_flight", max_in_flight, 1)
        check_format(image_format)
        if has_scores is not None and not isinstance(has_scores, bool):
            raise ValueError(f"has_scores must be True, False or None, not {has_scores!r}")
        self.url = http.address.url
        self.max_in_flight = max_in_flight
        self._http = http
        self._image_format = image_format
        self._has_scores = has_scores
        self._lock = threading.Lock()
        self._workers = self._new_workers()
        self._closed = False
        self.reconnect: Callable[[], RemoteModel] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by URL: the process that unpickles the model opens new connections.

        An API key that was passed to `connect` is part of the pickle; one from an environment variable is not.

        Raises:
            BackendError: The model was not made by `connect`, or is closed.
        """
        if self._closed or self.reconnect is None:
            reason = "it is closed" if self._closed else "it was not made by connect()"
            raise BackendError(
                f"{type(self).__name__} at {self.url} cannot be pickled or copied, because {reason}: call connect() in "
                "the process that uses it"
            )
        return _reconnect, (self.reconnect, self.stop_after_timeout)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run any mix of requests; results come in their order, an `ErrorResult` in the place of one that failed.

        An image that several requests share is encoded once.

        Raises:
            MoondreamError: The model is closed.
        """
        self.check_open()
        pictures: dict[int, _Picture] = {}
        futures: list[Future[Result]] = []
        batch = _Batch(self._http.timeout if self.stop_after_timeout else None)
        try:
            for request in requests:
                image = getattr(request, "image", None)
                picture = pictures.setdefault(id(image), _Picture(image, self._image_format))
                futures.append(self._workers.submit(self._result, request, picture, batch))
            pictures.clear()  # each goes when its last request is done
            if self.stop_after_timeout:
                return self._results_until_timeout(batch, futures)
            return [future.result() for future in futures]
        except (CancelledError, RuntimeError) as error:  # closed by another thread meanwhile
            self.check_open()
            raise error
        finally:
            for future in futures:
                future.cancel()

    def stream(self, request: Request) -> Iterator[Any]:
        """Pieces of one reply: text as it comes, objects and points one by one once the reply is there.

        The reasoning of a question, where it is asked for, is the first piece. Everything up to the first piece happens
        at the call, so that errors are raised there. Where a dialect cannot stream, the text is one piece.

        Raises:
            BackendError: The server is unreachable, refuses, or answers nonsense.
            ImageError: The image cannot be read.
            UnsupportedSkill: The model lacks what is asked for.
        """
        self.check_open()
        self._check(request)
        pieces = self._pieces(request, _Picture(request.image, self._image_format).encoded())
        first = next(pieces, None)
        return iter(()) if first is None else itertools.chain((first,), pieces)

    @property
    def stop_after_timeout(self) -> bool:  # documented with the class
        return not self._http.retry_timeouts

    @stop_after_timeout.setter
    def stop_after_timeout(self, value: bool) -> None:
        self._http.retry_timeouts = not value

    @property
    def has_scores(self) -> bool:
        """Whether confidences are real; otherwise they are 1.0."""
        with self._lock:
            if self._has_scores is None:
                try:
                    probe = self._probe_scores()
                except BackendError:
                    return False  # and ask again when the server is there
                if probe is not None and (probe.status == 429 or probe.status >= 500):
                    return False
                self._has_scores = probe is not None and self._says_scores(probe.reply or {})
            return self._has_scores

    @has_scores.setter
    def has_scores(self, value: bool) -> None:
        self._has_scores = value

    def close(self) -> None:
        """Close the connections; every later call raises, and requests that wait are given up."""
        self._closed = True
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def check_open(self) -> None:
        """Refuse to work after `close`.

        Raises:
            MoondreamError: The model is closed.
        """
        if self._closed:
            raise MoondreamError(f"{self!r} is closed; connect again")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _has_skill(self, skill: str) -> bool:
        """Return whether the server offers a skill."""
        return skill in self.skills

    def _ask(self, request: Request, picture: EncodedPicture | None) -> Result:
        """Put one request to the server, whose skill this model has."""
        raise NotImplementedError

    def _pieces(self, request: Request, picture: EncodedPicture | None) -> Iterator[Any]:
        """The pieces of one reply; here out of a reply in one piece."""
        yield from pieces_of(self._ask(request, picture))

    def _probe_scores(self) -> Probe | None:
        """Ask the server what it is; None where it has no way to say so."""
        return None

    def _says_scores(self, reply: dict[str, Any]) -> bool:
        """Whether the server's answer to that says that its confidences are real."""
        return False

    def _read(self, path: str, read: Callable[[], T]) -> T:
        """Take a reply apart; what is wrong with it becomes an error that names the URL.

        Raises:
            BackendError: It is not what it should be.
        """
        try:
            return read()
        except Failure as failure:
            message = str(failure)
        raise self._http.error(path, message)

    def _unsupported(self, what: str, instead: str) -> UnsupportedSkill:
        return UnsupportedSkill(f"{type(self).__name__} cannot {what}; {instead}")

    def _check(self, request: Request) -> None:
        if not isinstance(request, _KNOWN_REQUESTS):
            raise ValueError(f"a request is a Detect, Point, Query, Caption or Gaze, not {request!r:.100}")
        if not self._has_skill(request.skill):
            able = ", ".join(sorted(self.skills))
            raise self._unsupported(f"{request.skill}, only {able}", _ELSEWHERE[request.skill])
        if isinstance(request, Query) and request.stop:
            raise self._unsupported("end an answer at stop strings", "a model from moondream_cv.load() can")
        if isinstance(request, Query) and request.json_schema is not None:
            raise self._unsupported("constrain an answer to a JSON schema", "a model from moondream_cv.load() can")

    def _result(self, request: Request, picture: _Picture, batch: _Batch) -> Result:
        if batch.error is not None:
            return ErrorResult(batch.error)
        try:
            self._check(request)
            encoded = picture.encoded()
            batch.progress()
            result = self._ask(request, encoded)
            batch.progress()
            return result
        except Exception as error:
            if self._closed:
                return ErrorResult(MoondreamError(f"{self!r} was closed before the answer came"))
            if isinstance(error, BackendTimeout):
                batch.fail(error)
            else:
                batch.progress()
            return ErrorResult(error)

    def _results_until_timeout(self, batch: _Batch, futures: Sequence[Future[Result]]) -> list[Result]:
        """Return the results of a batch; those that are missing after a time-out get its error."""
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
                    batch.progress()
                    continue
                batch.error = error = batch.error or self._http.error("", self._http.no_answer(), timed_out=True)
                self._workers = self._new_workers()  # the old ones are occupied until the server ends the requests
                return [results.get(future) or ErrorResult(error) for future in futures]
            results[future] = future.result()
        return [results[future] for future in futures]

    def _new_workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.max_in_flight, thread_name_prefix="moondream-cv-backend")


class _Batch:
    """The requests of one `run`.

    Attributes:
        error: The first time-out, with which the requests that have not been sent fail; None before it, and always None
            without `stop_after_timeout`.
    """

    def __init__(self, timeout: float | None) -> None:
        self.error: BackendError | None = None
        self._timeout = timeout
        self._last_progress = time.monotonic()

    def progress(self) -> None:
        """Note that a request is sent, or was answered."""
        self._last_progress = time.monotonic()

    def fail(self, error: BackendTimeout) -> None:
        """Note a time-out."""
        if self._timeout is not None and self.error is None:
            self.error = error

    def seconds_left(self) -> float:
        """Return the seconds until one time-out has passed without progress, and a little more.

        The time-outs of the requests themselves come first: their errors name the route.
        """
        return max(0.0, self._last_progress + (self._timeout or 0.0) + _GRACE - time.monotonic())


class _Picture:
    """An image that several requests may share, encoded when the first of them is put."""

    def __init__(self, image: Any, image_format: str) -> None:
        self._image = image
        self._format = image_format
        self._lock = threading.Lock()
        self._encoded: EncodedPicture | Exception | None = None

    def encoded(self) -> EncodedPicture | None:
        """The encoded image; None where there is no image."""
        with self._lock:
            if self._encoded is None and self._image is not None:
                try:
                    self._encoded = encode(self._image, self._format)
                except Exception as error:  # one and the same for all its requests: a file object is read only once
                    self._encoded = error
        if isinstance(self._encoded, Exception):
            raise self._encoded
        return self._encoded


def changed(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    values = ((field.name, getattr(settings, field.name), field.default) for field in fields(settings))
    return {name: value for name, value, default in values if value != default}


def models_of(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a server's list of models, in Moondream's form or in OpenAI's."""
    lists = [reply.get(key) for key in ("models", "data")]
    return [entry for entries in lists if isinstance(entries, list) for entry in entries if isinstance(entry, dict)]


def model_has_scores(reply: dict[str, Any], model: str | None) -> bool:
    """Whether the list of models says that confidences are real: of this model, or of the first one."""
    return _entry_of(reply, model).get("has_scores") is True


def model_has_skill(reply: dict[str, Any], model: str | None, skill: str) -> bool:
    """Return whether the list of models names a skill for this model, or for the first one."""
    skills = _entry_of(reply, model).get("skills")
    return isinstance(skills, list) and skill in skills


def _entry_of(reply: dict[str, Any], model: str | None) -> dict[str, Any]:
    entries = models_of(reply)
    named = [entry for entry in entries if model is not None and entry.get("id") == model]
    return next(iter(named or entries), {})
