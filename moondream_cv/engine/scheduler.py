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
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moondream_cv.engine.admission import GATHER, Crowd, Entry, Job, WaitingImage, source_key
from moondream_cv.engine.autocast import without_autocast
from moondream_cv.engine.encoding import EncodedImage
from moondream_cv.engine.memory import free_after, is_out_of_memory
from moondream_cv.engine.model_runner import Arrival, Batch
from moondream_cv.engine.preprocessing import PreparedImage
from moondream_cv.engine.prompts import write_prompt
from moondream_cv.engine.sequences import make_row
from moondream_cv.engine.structured_output import GrammarMatcher
from moondream_cv.errors import MoondreamError, RequestCancelled
from moondream_cv.images import to_rgb
from moondream_cv.requests import ErrorResult, Query, Request, Result

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel

logger = logging.getLogger(__name__)

COMPILER_POLL = 0.005  # seconds that an idle step waits for the grammar of a request


@dataclass
class Limits:
    """How much decodes at a time; a device that runs out of memory halves it.

    Attributes:
        rows: Requests at the most.
        images: Images at the most.
    """

    rows: int = 64
    images: int = 16

    @classmethod
    def of(cls, prefix_bytes: int) -> Limits:
        """What suits a model: 16 images, and more as long as what the decoder has read of them takes 2 GiB at the most.

        Args:
            prefix_bytes: What that takes for one image.
        """
        return cls(images=max(cls.images, min(cls.rows, 2 * 2**30 // prefix_bytes)))


@dataclass
class _Lane:
    """The rows of one adapter.

    Attributes:
        batch: None as long as the adapter is not loaded.
        entries: By the keys of their rows.
    """

    batch: Batch | None = None
    entries: dict[int, Entry] = field(default_factory=dict)


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
        self._compiling: dict[Job, Future[GrammarMatcher]] = {}  # those that wait for their grammar
        self._queue: dict[WaitingImage, None] = {}  # those that requests wait for, in their order
        self._open: dict[Any, WaitingImage] = {}  # those of them that take more requests, by their keys
        self._lanes: dict[str | None, _Lane] = {}
        self._keys = itertools.count()
        self._steps = 0
        self._crowd = Crowd()
        self._joined = 0
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
        with without_autocast(self._model.device):
            return self._step()

    def _step(self) -> bool:
        self._steps += 1
        with self._lock:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        for job in submitted:
            self._receive(job)
        if cancelled:
            self._drop(cancelled)
        if self._compiling:
            self._receive_compiled()
        self._admit()
        for variant, lane in list(self._lanes.items()):
            if lane.entries:
                self._advance(lane)
            if not lane.entries:
                del self._lanes[variant]
        with self._lock:
            return bool(self._submitted or self._cancelled or self._compiling or self._queue or self._lanes)

    def _receive(self, job: Job) -> None:
        """Queue a request, or compile its grammar first, while others decode."""
        if isinstance(job.request, Query) and isinstance(job.request.json_schema, str):
            self._compiling[job] = self._model.grammar_compiler.submit(job.request.json_schema)
        else:
            self._enqueue(job, None)

    def _receive_compiled(self) -> None:
        """Queue the requests whose grammars are ready."""
        if not self._queue and not self._lanes:
            wait(self._compiling.values(), COMPILER_POLL, FIRST_COMPLETED)
        for job, future in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[job]
            try:
                grammar = future.result()
            except Exception as error:  # of this request alone
                self._finish(job, ErrorResult(error))
                continue
            self._enqueue(job, grammar)

    def _enqueue(self, job: Job, grammar: GrammarMatcher | None) -> None:
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
            row = make_row(next(self._keys), request, model.config, model.tokenizer, calibration, length, grammar)
        except Exception as error:  # whatever is wrong with a request is its own affair
            self._finish(job, ErrorResult(error))
            return
        job.prompt_tokens = length + len(prompt.ids)
        image.entries.append(Entry(job, image, row, prompt))
        self._open[image.key] = image
        self._queue[image] = None

    def _image(self, request: Request) -> WaitingImage:
        """The image of a request, the same for all that give the same object or path with the same settings."""
        settings, source = request.settings, request.image
        if isinstance(source, EncodedImage):
            source.check(self._model.fingerprint(settings.variant), settings.max_crops, settings.variant)
            key: Any = (id(source), settings.variant)
        else:
            key = (source_key(source), self._model.max_crops(settings), settings.variant)
        encoded = source if isinstance(source, EncodedImage) else None
        return self._open.get(key) or WaitingImage(key, source, settings, self._steps, encoded=encoded)

    def _drop(self, jobs: list[Job]) -> None:
        """Take cancelled requests out of wherever they are."""
        for job in jobs:
            if not job.done:
                self._finish(job, ErrorResult(RequestCancelled("the request was cancelled")))
            if (compiling := self._compiling.pop(job, None)) is not None:
                compiling.cancel()
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
        self._crowd.look(self._steps, (e for lane in self._lanes.values() for e in lane.entries.values()), self._queue)
        if self.running and not self._crowd.hurries and self._steps - self._joined < GATHER:
            return
        rows, images = self.limits.rows - self.running, self.limits.images - self._decoding
        chosen = self._crowd.choose(self._queue, self._holds, rows, images)
        for image in chosen:
            if self._open.get(image.key) is image:
                del self._open[image.key]
        short = self._encode([image for image in chosen if not self._holds(image)])
        joining: dict[str | None, list[Entry]] = {}
        for image, count in chosen.items():
            if image.entries and (image.ready or self._holds(image)):
                entries = [image.entries.popleft() for _ in range(count)]
                joining.setdefault(image.settings.variant, []).extend(entries)
        for variant, entries in joining.items():
            self._join(variant, entries)
            self._joined = self._steps
        for image in chosen:
            self._tidy(image)
        self._crowded = (self.running or None) if short else None

    def _encode(self, images: list[WaitingImage]) -> bool:
        """Encode images; those that cannot be read fail, and where memory is short some are left for a later step.

        Returns:
            Whether memory was short.
        """
        alike: dict[tuple[int, str | None], list[WaitingImage]] = {}
        short = False
        for image in images:
            if image.ready:
                continue
            try:
                if image.pixels is None:
                    ready = isinstance(image.source, PreparedImage)
                    image.pixels = image.source if ready else to_rgb(image.source)
            except Exception as error:  # whatever a file, a server or a picture library can raise
                self._fail(image.entries, error)
                continue
            alike.setdefault((self._model.max_crops(image.settings), image.settings.variant), []).append(image)
        for group in alike.values():
            try:
                frames = [image.pixels for image in group if image.pixels is not None]
                encoded = self._model.encode_arrays(frames, group[0].settings)
            except Exception as error:
                free_after(error, self._model.device)
                if not is_out_of_memory(error):
                    self._fail([entry for image in group for entry in image.entries], error)
                    continue
                short = True
                if len(group) > 1:
                    self._limit(images=self._decoding + len(group) // 2)
                elif not self.running and not any(image.ready for image in images) and not self._forget():
                    self._fail(group[0].entries, self._never_fits(error))
                continue
            for image, one in zip(group, encoded, strict=True):
                image.encoded = one
        return short

    def _join(self, variant: str | None, entries: list[Entry]) -> None:
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
            entry.image.entries.appendleft(entry)
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

    def _fail(self, entries: Iterable[Entry], error: Exception) -> None:
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
        """Requests that have been looked at and wait for room, or for their grammar."""
        return len(self._compiling) + sum(len(image.entries) for image in self._queue)

    @property
    def _decoding(self) -> int:
        """Images that rows decode on."""
        return sum(lane.batch.images for lane in self._lanes.values() if lane.batch is not None)

    def _holds(self, image: WaitingImage) -> bool:
        lane = self._lanes.get(image.settings.variant)
        return lane is not None and lane.batch is not None and lane.batch.holds(image.identity)

    def _tidy(self, image: WaitingImage) -> None:
        """Let an encoded image go that no request waits for: the rows that decode on it have copied what they need."""
        image.entries = deque(entry for entry in image.entries if not entry.job.done)
        if image.entries:
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
