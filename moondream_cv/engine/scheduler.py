"""Requests in, results out: which images are encoded and which rows decode next.

`submit` and `cancel` may be called from any thread; one thread calls `step` until nothing is left:

    job = scheduler.submit(Detect(frame, "dog"))
    going_on = True
    while going_on:
        going_on = scheduler.step()
        for piece in job.take():
            ...  # an object as soon as it is complete; text word by word
    job.result

A step encodes the images of the requests that have room, lets those requests join the rows that are decoding already,
and feeds every row once.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moondream_cv.engine.batch import Arrival, Batch, Feed, feed_length
from moondream_cv.engine.encoding import EncodedImage
from moondream_cv.engine.memory import free_after, is_out_of_memory
from moondream_cv.engine.prompts import write_prompt
from moondream_cv.engine.rows import Row, make_row
from moondream_cv.errors import MoondreamError, RequestCancelled
from moondream_cv.images import to_rgb
from moondream_cv.requests import ErrorResult, Request, Result, Settings

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel

logger = logging.getLogger(__name__)

NO_IMAGE = object()  # what rows without an image share a context by
PROMPT_TOKENS = 2048  # that are fed in one step, about: their attention mask grows with the square


@dataclass
class Limits:
    """How much decodes at a time; a device that runs out of memory halves it.

    Attributes:
        rows: Requests at the most.
        images: Images at the most.
    """

    rows: int = 64
    images: int = 16


class Job:
    """A request that a scheduler has taken.

    Attributes:
        request: What was asked.
        result: The reply; None until it is complete.
        row: What it has come to so far; None until it decodes.
        prompt_tokens: Positions of the context that image and prompt take, once the request has been looked at.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.result: Result | None = None
        self.row: Row | None = None
        self.prompt_tokens = 0
        self._taken = 0

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def written_tokens(self) -> int:
        """Positions that the reply takes so far: tokens of a text; two of a point, three of a box."""
        return 0 if self.row is None else max(0, self.row.length - self.prompt_tokens)

    def take(self) -> list[Any]:
        """What the reply has come to since the last call.

        Objects and points come one by one; text in words, of which reasoning comes as one `Reasoning`.
        """
        if self.row is None:
            return []
        new = self.row.pieces[self._taken :]
        self._taken += len(new)
        return new


@dataclass(eq=False)
class _Image:
    """An image that requests wait for, and those requests in their order.

    Attributes:
        key: Under which others join them; until the first of them runs, since an array may have other contents by then,
            and an image that is asked about all the time must not keep all others waiting.
        source: What the requests gave; None for those without an image.
        settings: `max_crops` and `variant` are the same for all of them.
        rgb: Its pixels, from when they are first needed: rows that have to begin again go on with what they began with.
        encoded: While requests wait for it.
    """

    key: Any
    source: Any
    settings: Settings
    rgb: np.ndarray | None = None
    encoded: EncodedImage | None = None
    waiting: deque[_Entry] = field(default_factory=deque)

    @property
    def identity(self) -> object:
        """What rows share a context by."""
        if self.source is None:
            return NO_IMAGE
        return self.source if isinstance(self.source, EncodedImage) else self

    @property
    def ready(self) -> bool:
        return self.source is None or self.encoded is not None

    def forget(self) -> bool:
        """Let go of the encoded image where it can be encoded again; say whether there was one."""
        if self.encoded is None or self.encoded is self.source:
            return False
        self.encoded = None
        return True


@dataclass(eq=False)
class _Entry:
    """A request on its image.

    Attributes:
        feed: What its row feeds first: the prompt; where it had to make room for others, everything up to where it was.
        readings: Of the object that it had begun by then.
        alone: Whether it has run out of memory alone.
    """

    job: Job
    image: _Image
    row: Row
    feed: Feed
    readings: Tensor | None = None
    alone: bool = False


@dataclass
class _Lane:
    """The rows of one adapter.

    Attributes:
        batch: None as long as the adapter is not loaded.
        entries: By the keys of their rows.
    """

    batch: Batch | None = None
    entries: dict[int, _Entry] = field(default_factory=dict)


class Scheduler:
    """Runs requests on a local model, as many at a time as there is room for.

    Attributes:
        limits: How much decodes at a time.
    """

    def __init__(self, model: LocalModel, limits: Limits) -> None:
        self._model, self.limits = model, limits
        self._lock = threading.Lock()
        self._submitted: list[Job] = []
        self._cancelled: list[Job] = []
        self._finished: list[Job] = []
        self._queue: dict[_Image, None] = {}  # those that requests wait for, in their order
        self._open: dict[Any, _Image] = {}  # those of them that take more requests, by their keys
        self._lanes: dict[str | None, _Lane] = {}
        self._keys = itertools.count()
        self._crowded: int | None = None  # with so many rows there is no memory for another image

    def submit(self, request: Request) -> Job:
        """Take a request. It is looked at in the next step: whatever is wrong with it becomes its result."""
        job = Job(request)
        with self._lock:
            self._submitted.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Drop a request, wherever it is; its result is an `ErrorResult` with `RequestCancelled`, unless it is done."""
        with self._lock:
            self._cancelled.append(job)

    def results(self) -> list[Job]:
        """The requests that have been done since the last call, in the order in which they were.

        They are kept until then: a program that goes on for long has to ask.
        """
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def step(self) -> bool:
        """Go on by one step; say whether anything is left to do.

        A request's error is not raised here: it becomes its result.

        Raises:
            MoondreamError: The model is closed.
        """
        self._model.check_open()
        with self._lock:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        for job in submitted:
            self._receive(job)
        if cancelled:
            self._drop(cancelled)
        self._admit()
        for variant, lane in list(self._lanes.items()):
            if lane.entries:
                self._advance(lane)
            if not lane.entries:
                del self._lanes[variant]
        with self._lock:
            return bool(self._submitted or self._cancelled or self._queue or self._lanes)

    def _receive(self, job: Job) -> None:
        request, model = job.request, self._model
        try:
            prompt = write_prompt(request, model.tokenizer, model.config.tokenizer)
            length = 0 if request.image is None else model.config.prefix_length
            room = model.config.text.max_context - length
            if len(prompt.ids) > room:
                raise ValueError(
                    f"the prompt has {len(prompt.ids)} tokens, and {room} of the model's context of "
                    f"{model.config.text.max_context} are left; shorten it"
                )
            image = self._image(request)
            calibration = model.calibration if model.calibrated and request.settings.variant is None else None
            row = make_row(next(self._keys), request, model.config, model.tokenizer, calibration, length)
        except Exception as error:  # whatever is wrong with a request is its own affair
            self._finish(job, ErrorResult(error))
            return
        job.prompt_tokens = length + len(prompt.ids)
        image.waiting.append(_Entry(job, image, row, prompt))
        self._open[image.key] = image
        self._queue[image] = None

    def _image(self, request: Request) -> _Image:
        """The image of a request, the same for all that give the same object or path with the same settings."""
        settings, source = request.settings, request.image
        if isinstance(source, EncodedImage):
            source.check(self._model.key, settings.max_crops, settings.variant)
            key: Any = (id(source), settings.variant)
        else:
            path = isinstance(source, str | os.PathLike)
            key = (os.fspath(source) if path else id(source), self._model.max_crops(settings), settings.variant)
        encoded = source if isinstance(source, EncodedImage) else None
        return self._open.get(key) or _Image(key, source, settings, encoded=encoded)

    def _drop(self, jobs: list[Job]) -> None:
        """Take cancelled requests out of wherever they are."""
        for job in jobs:
            if not job.done:
                self._finish(job, ErrorResult(RequestCancelled("the request was cancelled")))
        for image in list(self._queue):
            self._tidy(image)
        for lane in self._lanes.values():
            gone = [key for key, entry in lane.entries.items() if entry.job.done]
            for key in gone:
                del lane.entries[key]
            self._leave(lane, gone)

    def _leave(self, lane: _Lane, keys: list[int]) -> None:
        """Let rows go whose requests are done."""
        if not keys or lane.batch is None:
            return
        try:
            lane.batch.leave(keys)
        except Exception as error:
            self._recover(lane, error)

    def _admit(self) -> None:
        """Let waiting requests join as long as there is room, those on the same image together."""
        if self._crowded is not None and self.running >= self._crowded:
            return
        room = self.limits.rows - self.running
        images = self.limits.images - self._decoding
        tokens = PROMPT_TOKENS
        chosen: dict[_Image, int] = {}
        for image in self._queue:
            new = not self._holds(image)
            if room <= 0 or tokens <= 0 or (new and images <= 0):
                break
            chosen[image], tokens = _fitting(image.waiting, room, tokens)
            room -= chosen[image]
            images -= new
            if chosen[image] < len(image.waiting):
                break
        for image in chosen:
            if self._open.get(image.key) is image:
                del self._open[image.key]
        short = self._encode([image for image in chosen if not self._holds(image)])
        joining: dict[str | None, list[_Entry]] = {}
        for image, count in chosen.items():
            if image.waiting and (image.ready or self._holds(image)):
                entries = [image.waiting.popleft() for _ in range(count)]
                joining.setdefault(image.settings.variant, []).extend(entries)
        for variant, entries in joining.items():
            self._join(variant, entries)
        for image in chosen:
            self._tidy(image)
        self._crowded = (self.running or None) if short else None

    def _encode(self, images: list[_Image]) -> bool:
        """Encode images; those that cannot be read fail, and where memory is short some are left for a later step.

        Returns:
            Whether memory was short.
        """
        alike: dict[tuple[int, str | None], list[_Image]] = {}
        short = False
        for image in images:
            if image.ready:
                continue
            try:
                image.rgb = to_rgb(image.source) if image.rgb is None else image.rgb
            except Exception as error:  # whatever a file, a server or a picture library can raise
                self._fail(image.waiting, error)
                continue
            alike.setdefault((self._model.max_crops(image.settings), image.settings.variant), []).append(image)
        for group in alike.values():
            try:
                frames = [image.rgb for image in group if image.rgb is not None]
                encoded = self._model.encode_arrays(frames, group[0].settings)
            except Exception as error:
                free_after(error, self._model.device)
                if not is_out_of_memory(error):
                    self._fail([entry for image in group for entry in image.waiting], error)
                    continue
                short = True
                if len(group) > 1:
                    self._limit(images=self._decoding + len(group) // 2)
                elif not self.running and not any(image.ready for image in images) and not self._forget():
                    self._fail(group[0].waiting, self._never_fits(error))
                continue
            for image, one in zip(group, encoded, strict=True):
                image.encoded = one
        return short

    def _join(self, variant: str | None, entries: list[_Entry]) -> None:
        """Let requests of one adapter join its batch."""
        lane = self._lanes.setdefault(variant, _Lane())
        arrivals = []
        for entry in entries:
            lane.entries[entry.row.key], entry.job.row = entry, entry.row
            prefix = None if entry.image.encoded is None else entry.image.encoded.prefix
            arrivals.append(Arrival(entry.row, entry.image.identity, prefix, entry.feed, entry.readings))
        try:
            if lane.batch is None:
                lane.batch = Batch(self._model.network, self._model.lora(variant))
            lane.batch.join(arrivals)
        except Exception as error:
            self._recover(lane, error)

    def _advance(self, lane: _Lane) -> None:
        """Feed every row of a lane once."""
        assert lane.batch is not None
        try:
            ended = lane.batch.step()
        except Exception as error:
            self._recover(lane, error)
            return
        for row, failure in ended:
            result = row.result if failure is None else ErrorResult(failure)
            assert result is not None
            self._finish(lane.entries.pop(row.key).job, result)
        self._leave(lane, [row.key for row, _ in ended])

    def _recover(self, lane: _Lane, error: Exception) -> None:
        """Go on after an error in a lane: with half of the rows if memory was short, else without all of them."""
        running, entries, batch = self.running, list(lane.entries.values()), lane.batch
        lane.entries, lane.batch = {}, None
        free_after(error, self._model.device)
        if not is_out_of_memory(error):
            self._fail(entries, error)
            return
        alone = running == 1 and len(entries) == 1
        spared = self._forget()
        if alone and (entries[0].alone or not spared):
            self._fail(entries, self._never_fits(error))
            return
        try:
            evicted = [] if batch is None else batch.evict()
        except Exception as another:  # there was not even memory for that
            free_after(another, self._model.device)
            self._fail(entries, self._never_fits(another))
            return
        feeds = {arrival.row.key: (arrival.feed, arrival.readings) for arrival in evicted}
        for entry in reversed(entries):
            entry.alone = alone
            entry.feed, entry.readings = feeds.get(entry.row.key, (entry.feed, entry.readings))
            entry.image.waiting.appendleft(entry)
        self._queue = dict.fromkeys([entry.image for entry in entries]) | self._queue
        self._limit(rows=running // 2)

    def _forget(self) -> bool:
        """Let go of encoded images that can be encoded again; say whether there were any."""
        cache = self._model.image_cache
        found = cache is not None and len(cache) > 0
        if cache is not None:
            cache.clear()
        for image in self._queue:
            found = image.forget() or found
        return found

    def _fail(self, entries: Iterable[_Entry], error: Exception) -> None:
        for entry in list(entries):
            self._finish(entry.job, ErrorResult(error))

    def _finish(self, job: Job, result: Result) -> None:
        if isinstance(result, ErrorResult):
            logger.debug("%s failed", type(job.request).__name__, exc_info=result.error)
        job.result = result
        with self._lock:
            self._finished.append(job)

    @property
    def running(self) -> int:
        """Requests that decode. For the thread that calls `step`, as `waiting`."""
        return sum(len(lane.entries) for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        """Requests that have been looked at and wait for room."""
        return sum(len(image.waiting) for image in self._queue)

    @property
    def _decoding(self) -> int:
        """Images that rows decode on."""
        return sum(lane.batch.images for lane in self._lanes.values() if lane.batch is not None)

    def _holds(self, image: _Image) -> bool:
        lane = self._lanes.get(image.settings.variant)
        return lane is not None and lane.batch is not None and lane.batch.holds(image.identity)

    def _tidy(self, image: _Image) -> None:
        """Let an encoded image go that no request waits for: the rows that decode on it have copied what they need."""
        image.waiting = deque(entry for entry in image.waiting if not entry.job.done)
        if image.waiting:
            return
        image.forget()
        self._queue.pop(image, None)
        if self._open.get(image.key) is image:
            del self._open[image.key]

    def _limit(self, rows: int | None = None, images: int | None = None) -> None:
        """Lower a limit, to one at the least, and tell of it."""
        before = replace(self.limits)
        self.limits.rows = max(1, min(self.limits.rows, self.limits.rows if rows is None else rows))
        self.limits.images = max(1, min(self.limits.images, self.limits.images if images is None else images))
        if self.limits != before:
            logger.warning(
                "out of memory on %s: going on with %d requests on %d images at a time",
                self._model.device,
                self.limits.rows,
                self.limits.images,
            )

    def _never_fits(self, error: Exception) -> MoondreamError:
        described = MoondreamError(
            f"out of memory on {self._model.device} with this request alone: ask for fewer crops (max_crops), tokens "
            f"(max_tokens) or objects (max_objects), or load the model in bfloat16 or on another device"
        )
        described.__cause__ = error
        return described


def _fitting(waiting: Iterable[_Entry], room: int, tokens: int) -> tuple[int, int]:
    """How many requests may join, and how many tokens of prompts are left after them; one may always exceed those."""
    count = 0
    for entry in waiting:
        if count == room or tokens <= 0:
            break
        count, tokens = count + 1, tokens - feed_length(entry.feed)
    return count, tokens
