"""Requests in, results out: which images are encoded and which rows decode next.

`submit` and `cancel` may be called from any thread; one thread calls `step` until nothing is left:

    job = scheduler.submit(Detect(frame, "dog"))
    while scheduler.step():
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

from moondream_cv.engine.batch import Arrival, Batch
from moondream_cv.engine.encoding import EncodedImage
from moondream_cv.engine.memory import free_cached_memory, is_out_of_memory
from moondream_cv.engine.prompts import Prompt, embed_prompts, write_prompt
from moondream_cv.engine.rows import Row, make_row
from moondream_cv.errors import MoondreamError, RequestCancelled
from moondream_cv.images import to_rgb
from moondream_cv.requests import ErrorResult, Request, Result, Settings

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel

logger = logging.getLogger(__name__)

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
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.result: Result | None = None
        self.row: Row | None = None
        self._taken = 0

    @property
    def done(self) -> bool:
        return self.result is not None

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
        key: Under which it is known.
        source: What the requests gave; None for those without an image.
        settings: `max_crops` and `variant` are the same for all of them.
        encoded: While requests wait for it.
    """

    key: Any
    source: Any
    settings: Settings
    encoded: EncodedImage | None = None
    waiting: deque[_Entry] = field(default_factory=deque)

    @property
    def identity(self) -> object:
        """What rows share a context by. An array may have other contents by the time it is asked about again."""
        return self.source if isinstance(self.source, EncodedImage) else self

    @property
    def ready(self) -> bool:
        return self.source is None or self.encoded is not None


@dataclass(eq=False)
class _Entry:
    """A request on its image; one that had to make room for others goes on from `arrival`."""

    job: Job
    image: _Image
    prompt: Prompt
    arrival: Arrival | None = None

    @property
    def tokens(self) -> int:
        """What it feeds when it joins."""
        return len(self.prompt.ids) if self.arrival is None else len(self.arrival.feed)


@dataclass
class _Lane:
    """The rows of one adapter."""

    batch: Batch
    entries: dict[int, _Entry] = field(default_factory=dict)  # by the keys of their rows


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
        self._images: dict[Any, _Image] = {}  # those that requests wait for, the longest waiting first
        self._lanes: dict[str | None, _Lane] = {}
        self._keys = itertools.count()

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
        """The requests that have been done since the last call, in the order in which they were."""
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
        for job in cancelled:
            self._drop(job)
        self._admit()
        for variant, lane in list(self._lanes.items()):
            if lane.entries:
                self._advance(lane)
            if not lane.entries:
                del self._lanes[variant]
        with self._lock:
            return bool(self._submitted or self._cancelled or self._images or self._lanes)

    def _receive(self, job: Job) -> None:
        request, model = job.request, self._model
        try:
            prompt = write_prompt(request, model.tokenizer, model.config.tokenizer)
            room = model.config.text.max_context - (0 if request.image is None else model.config.prefix_length)
            if len(prompt.ids) > room:
                raise ValueError(
                    f"the prompt has {len(prompt.ids)} tokens, and {room} of the model's context of "
                    f"{model.config.text.max_context} are left; shorten it"
                )
            image = self._image(request)
        except Exception as error:  # whatever is wrong with a request is its own affair
            self._finish(job, ErrorResult(error))
            return
        image.waiting.append(_Entry(job, image, prompt))

    def _image(self, request: Request) -> _Image:
        """The image of a request, the same for all that give the same object or path with the same settings."""
        settings, source = request.settings, request.image
        if isinstance(source, EncodedImage):
            source.check(self._model.key, settings.max_crops, settings.variant)
            key: Any = (id(source), settings.variant)
        else:
            path = isinstance(source, str | os.PathLike)
            key = (os.fspath(source) if path else id(source), settings.max_crops, settings.variant)
        if key not in self._images:
            self._images[key] = _Image(key, source, settings, source if isinstance(source, EncodedImage) else None)
        return self._images[key]

    def _drop(self, job: Job) -> None:
        """Take a cancelled request out of wherever it is."""
        if job.done:
            return
        for image in list(self._images.values()):
            image.waiting = deque(entry for entry in image.waiting if entry.job is not job)
            self._forget_if_idle(image)
        for lane in self._lanes.values():
            for key in [key for key, entry in lane.entries.items() if entry.job is job]:
                lane.batch.leave([key])
                del lane.entries[key]
        self._finish(job, ErrorResult(RequestCancelled("the request was cancelled")))

    def _admit(self) -> None:
        """Let waiting requests join as long as there is room, those on the same image together."""
        room = self.limits.rows - self._running
        images = self.limits.images - sum(lane.batch.images for lane in self._lanes.values())
        tokens = PROMPT_TOKENS
        chosen: list[tuple[_Image, int]] = []
        for image in self._images.values():
            new = not self._holds(image)
            if room <= 0 or tokens <= 0 or (new and images <= 0):
                break
            count, tokens = _fitting(image.waiting, room, tokens)
            chosen.append((image, count))
            room -= count
            images -= new
            if count < len(image.waiting):
                break
        self._encode([image for image, _ in chosen if not (image.ready or self._holds(image))])
        joining: dict[str | None, list[_Entry]] = {}
        for image, count in chosen:
            if image.waiting and (image.ready or self._holds(image)):
                entries = [image.waiting.popleft() for _ in range(count)]
                joining.setdefault(image.settings.variant, []).extend(entries)
        for variant, entries in joining.items():
            self._join(variant, entries)
        for image, _ in chosen:
            self._forget_if_idle(image)

    def _encode(self, images: list[_Image]) -> None:
        """Encode images; those that cannot be read fail, and where memory is short some are left for a later step."""
        alike: dict[tuple[int | None, str | None], list[tuple[_Image, Any]]] = {}
        for image in images:
            try:
                opened = to_rgb(image.source)
            except Exception as error:  # whatever a file, a server or a picture library can raise
                self._fail(image.waiting, error)
                continue
            alike.setdefault((image.settings.max_crops, image.settings.variant), []).append((image, opened))
        for pairs in alike.values():
            try:
                encoded = self._model.encode_arrays([rgb for _, rgb in pairs], pairs[0][0].settings)
            except Exception as error:
                if not is_out_of_memory(error):
                    for image, _ in pairs:
                        self._fail(image.waiting, error)
                elif len(pairs) > 1:
                    self.limits.images = len(pairs) // 2
                    self._tell_of_limits()
                elif self._running:
                    self.limits.rows = self._running  # one that has ended makes room for the next try
                    self._tell_of_limits()
                else:
                    self._fail(pairs[0][0].waiting, self._never_fits(error))
                continue
            for (image, _), one in zip(pairs, encoded, strict=True):
                image.encoded = one

    def _join(self, variant: str | None, entries: list[_Entry]) -> None:
        """Let requests of one adapter join its batch."""
        model = self._model
        try:
            if variant not in self._lanes:
                self._lanes[variant] = _Lane(Batch(model.network, model.lora(variant)))
            lane = self._lanes[variant]
            fresh = [entry for entry in entries if entry.arrival is None]
            feeds = embed_prompts(model.network, [entry.prompt for entry in fresh])
        except Exception as error:
            self._fail(entries, error)
            return
        for entry, feed in zip(fresh, feeds, strict=True):
            length = 0 if entry.job.request.image is None else model.config.prefix_length
            calibration = model.calibration if model.calibrated and variant is None else None
            row = make_row(next(self._keys), entry.job.request, model.config, model.tokenizer, calibration, length)
            entry.job.row = row
            entry.arrival = Arrival(row, None, None, feed)
        arrivals = []
        for entry in entries:
            assert entry.arrival is not None
            encoded = entry.image.encoded
            prefix = None if encoded is None else encoded.prefix
            arrivals.append(replace(entry.arrival, image=entry.image.identity, prefix=prefix))
            lane.entries[entry.arrival.row.key] = entry
        try:
            lane.batch.join(arrivals)
        except Exception as error:
            self._recover(lane, error)

    def _advance(self, lane: _Lane) -> None:
        """Feed every row of a lane once."""
        try:
            ended = lane.batch.step()
        except Exception as error:
            self._recover(lane, error)
            return
        for row, failure in ended:
            entry = lane.entries.pop(row.key)
            result = row.result if failure is None else ErrorResult(failure)
            assert result is not None
            self._finish(entry.job, result)

    def _recover(self, lane: _Lane, error: Exception) -> None:
        """Go on after an error in a lane: with half of the rows if memory was short, else without all of them."""
        running, entries, lane.entries = self._running, lane.entries, {}
        short = is_out_of_memory(error)
        evicted = {arrival.row.key: arrival for arrival in lane.batch.evict()} if short else {}
        lane.batch = Batch(self._model.network, lane.batch.lora)
        free_cached_memory(self._model.device)
        if not short or running == 1:
            self._fail(entries.values(), self._never_fits(error) if short else error)
            return
        self.limits.rows = running // 2
        self._tell_of_limits()
        back: dict[int, _Image] = {}
        for key, entry in entries.items():
            entry.arrival = evicted.get(key, entry.arrival)
            back[id(entry.image)] = entry.image
        for entry in reversed(entries.values()):
            entry.image.waiting.appendleft(entry)
        self._images = {image.key: image for image in (*back.values(), *self._images.values())}

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
    def _running(self) -> int:
        return sum(len(lane.entries) for lane in self._lanes.values())

    def _holds(self, image: _Image) -> bool:
        lane = self._lanes.get(image.settings.variant)
        return lane is not None and lane.batch.holds(image.identity)

    def _forget_if_idle(self, image: _Image) -> None:
        """Let an encoded image go that no request waits for: the rows that decode on it have copied what they need."""
        image.waiting = deque(entry for entry in image.waiting if not entry.job.done)
        if not image.waiting:
            self._images.pop(image.key, None)
            if image.encoded is not image.source:
                image.encoded = None

    def _tell_of_limits(self) -> None:
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
        count, tokens = count + 1, tokens - entry.tokens
    return count, tokens
