"""Scheduler: queues requests, admits them by a policy and drives a model runner step by step (continuous batching).

`submit` and `cancel` may be called from any thread. One thread calls `step` until no work is left:

    job = scheduler.submit(Detect(frame, "dog"))
    running = True
    while running:
        running = scheduler.step()
        for piece in job.take():
            ...  # objects one by one, text word by word
    job.result

Each step encodes images of waiting requests, admits those requests to the running batch and decodes once.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moondream_cv._deprecation import renamed_arguments, renamed_attribute
from moondream_cv.engine.admission import ADMISSION_INTERVAL, AdmissionPolicy
from moondream_cv.engine.autocast import without_autocast
from moondream_cv.engine.calibration import Calibration
from moondream_cv.engine.image_encoding import EncodedContext, EncodedImage, InterleavedContext
from moondream_cv.engine.memory import free_after, is_out_of_memory
from moondream_cv.engine.model_runner import ModelRunner, StepOutputs
from moondream_cv.engine.preprocessing import PreprocessedImage
from moondream_cv.engine.prompts import Prompt, write_conversation, write_prompt
from moondream_cv.engine.sequence_state import Job, SequenceState, WaitingImage, source_key
from moondream_cv.engine.sequences import make_sequence
from moondream_cv.engine.structured_output import GrammarCompiler, GrammarMatcher
from moondream_cv.errors import MoondreamError, RequestCancelled
from moondream_cv.images import to_rgb
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.requests import Chat, ErrorResult, Query, Request, Result, Settings

logger = logging.getLogger(__name__)

GRAMMAR_POLL_SECONDS = 0.005  # how long an idle step waits for a grammar to be compiled


@renamed_arguments(rows="max_num_seqs", images="max_images")
@dataclass
class Limits:
    """Limits on what decodes at the same time. A device that runs out of memory halves them.

    Attributes:
        max_num_seqs: Maximum number of sequences.
        max_images: Maximum number of images.
    """

    max_num_seqs: int = 64
    max_images: int = 16

    rows = renamed_attribute("Limits.rows", "max_num_seqs")
    images = renamed_attribute("Limits.images", "max_images")

    @classmethod
    def for_prefix_size(cls, prefix_bytes: int) -> Limits:
        """Return the default limits of a model: 16 images, or more if their prefixes take 2 GiB or less.

        Args:
            prefix_bytes: Size of the image prefix of one image in bytes.
        """
        return cls(max_images=max(cls.max_images, min(cls.max_num_seqs, 2 * 2**30 // prefix_bytes)))


@dataclass(frozen=True)
class SchedulerContext:
    """Parts of a model that a scheduler needs in addition to the runner.

    Attributes:
        config: Configuration of the checkpoint.
        tokenizer: Tokenizer of the checkpoint.
        grammar_compiler: Compiles JSON schemas.
        calibration: Returns the calibration of scores under an adapter; None: scores are not calibrated.
        fingerprint: Returns the fingerprint of the model with an adapter.
        clear_image_cache: Drops all cached images and returns whether there were any.
        check_open: Raises a `MoondreamError` if the model is closed.
    """

    config: MoondreamConfig
    tokenizer: Tokenizer
    grammar_compiler: GrammarCompiler
    calibration: Callable[[str | None], Calibration | None]
    fingerprint: Callable[[str | None], str]
    clear_image_cache: Callable[[], bool]
    check_open: Callable[[], None]


class Scheduler:
    """Runs requests on a model runner, as many at the same time as its limits allow.

    Attributes:
        limits: Limits on what decodes at the same time.
    """

    def __init__(self, runner: ModelRunner, context: SchedulerContext, limits: Limits) -> None:
        """Create a scheduler without requests.

        Args:
            runner: Model runner without sequences, used by this scheduler only.
            context: Parts of the model for preparing requests.
            limits: Limits on what decodes at the same time; lowered in place if memory runs out.
        """
        self._runner, self._context, self.limits = runner, context, limits
        self._lock = threading.Lock()
        self._submitted: list[Job] = []
        self._cancelled: list[Job] = []
        self._finished: list[Job] = []
        self._compiling: dict[Job, Future[GrammarMatcher]] = {}
        self._queue: dict[WaitingImage, None] = {}  # images that sequences wait for, in order
        self._joinable: dict[Any, WaitingImage] = {}  # images of the queue that further requests may join, by key
        self._running: dict[str | None, dict[int, SequenceState]] = {}  # by adapter and sequence ID
        self._seq_ids = itertools.count()
        self._step_number = 0
        self._policy = AdmissionPolicy()
        self._last_admission = 0
        self._admission_pause: int | None = None  # no memory for another image with this many sequences

    def submit(self, request: Request) -> Job:
        """Submit a request. The next step queues it; an invalid request gets an `ErrorResult`."""
        job = Job(request)
        with self._lock:
            self._submitted.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a request. Unless it is done, its result is an `ErrorResult` with `RequestCancelled`."""
        with self._lock:
            self._cancelled.append(job)

    def results(self) -> list[Job]:
        """Return the jobs that have finished since the last call, in the order in which they finished.

        The scheduler keeps finished jobs until this is called, so long-running programs must call it regularly.
        """
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    @property
    def running(self) -> int:
        """Number of sequences that are decoding. Read it in the thread that calls `step`."""
        return sum(len(states) for states in self._running.values())

    @property
    def waiting(self) -> int:
        """Number of requests that wait for admission or for their grammar. Read it in the thread that calls `step`."""
        return len(self._compiling) + sum(len(image.waiting) for image in self._queue)

    def step(self) -> bool:
        """Run one step and return whether work is left.

        Errors of requests are not raised: they become results.

        Raises:
            MoondreamError: The model is closed.
        """
        self._context.check_open()
        with without_autocast(self._runner.device):
            return self._step()

    def _step(self) -> bool:
        # Receive requests and cancellations
        self._step_number += 1
        with self._lock:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        for job in submitted:
            self._receive(job)
        if cancelled:
            self._abort(cancelled)
        if self._compiling:
            self._receive_grammars()

        # Admit and decode
        self._admit()
        self._decode([adapter_name for adapter_name, states in self._running.items() if states])
        for adapter_name in [name for name, states in self._running.items() if not states]:
            del self._running[adapter_name]
            self._runner.reset(adapter_name)
        with self._lock:
            return bool(self._submitted or self._cancelled or self._compiling or self._queue or self._running)

    # Queue ------------------------------------------------------------------------------------------------------------

    def _receive(self, job: Job) -> None:
        """Queue a request, or compile its grammar first while others decode."""
        if isinstance(job.request, Query | Chat) and isinstance(job.request.json_schema, str):
            self._compiling[job] = self._context.grammar_compiler.submit(job.request.json_schema)
        else:
            self._enqueue(job, None)

    def _receive_grammars(self) -> None:
        """Queue the requests whose grammars are compiled."""
        if not self._queue and not self._running:
            wait(self._compiling.values(), GRAMMAR_POLL_SECONDS, FIRST_COMPLETED)
        for job, future in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[job]
            try:
                grammar = future.result()
            except Exception as error:  # fails this request only
                self._finish(job, ErrorResult(error))
                continue
            self._enqueue(job, grammar)

    def _enqueue(self, job: Job, grammar: GrammarMatcher | None) -> None:
        """Write the prompt of a request and queue its sequence, or finish the job with an error."""
        request, context = job.request, self._context
        try:
            # Write the prompt
            source, prefix_length, prompt = self._write_prompt(request)
            # Create the sequence
            image = self._waiting_image(source, request.settings)
            calibration = context.calibration(request.settings.variant)
            sequence = make_sequence(
                next(self._seq_ids), request, context.config, context.tokenizer, calibration, prefix_length, grammar
            )
        except Exception as error:  # an invalid request must not affect others
            self._finish(job, ErrorResult(error))
            return
        job.prompt_tokens = prefix_length + len(prompt.ids)
        image.waiting.append(SequenceState(job, image, sequence, prompt))
        self._joinable[image.key] = image
        self._queue[image] = None

    def _write_prompt(self, request: Request) -> tuple[Any, int, Prompt]:
        """Return the image or the context that a request decodes on, its number of positions, and the prompt behind it.

        Raises:
            ValueError: They are longer than the context of the model.
        """
        # Write the prompt
        config, tokenizer = self._context.config, self._context.tokenizer
        if isinstance(request, Chat):
            segments, prompt = write_conversation(request, tokenizer, config.tokenizer)
        else:
            segments, prompt = (), write_prompt(request, tokenizer, config.tokenizer)
        has_one_image_at_start = len(segments) == 2 and len(segments[0].ids) == 1
        is_context = bool(segments) and not has_one_image_at_start
        source = InterleavedContext(segments) if is_context else request.image

        # Check the length
        max_context, num_patches = config.text.max_context, config.vision.num_patches
        if isinstance(source, InterleavedContext):
            prefix_length = source.num_tokens(num_patches)
        else:
            prefix_length = 0 if source is None else config.prefix_length
        length = prefix_length + len(prompt.ids)
        if length > max_context and isinstance(request, Chat):
            num_image_tokens = len(request.images) * num_patches
            of_images = f", of which images take {num_image_tokens} ({num_patches} each)" if num_image_tokens else ""
            raise ValueError(
                f"the conversation must have at most {max_context} tokens, got {length}{of_images}; leave out earlier "
                "turns or images, or shorten the texts"
            )
        if length > max_context:
            raise ValueError(
                f"the prompt must have at most {max_context - prefix_length} tokens, got {len(prompt.ids)}; shorten it "
                f"(the model's context has {max_context} tokens)"
            )
        return source, prefix_length, prompt

    def _waiting_image(self, source: Any, settings: Settings) -> WaitingImage:
        """Return the image of a request. Requests with the same object or path and the same settings share it."""
        for image in source.images if isinstance(source, InterleavedContext) else (source,):
            if isinstance(image, EncodedImage):
                image.check(self._context.fingerprint(settings.variant), settings.max_crops, settings.variant)
        if isinstance(source, EncodedImage):
            key: Any = (id(source), settings.variant)
        else:
            key = (source_key(source), self._max_crops(settings), settings.variant)
        encoded = source if isinstance(source, EncodedImage) else None
        return self._joinable.get(key) or WaitingImage(key, source, settings, self._step_number, encoded=encoded)

    def _max_crops(self, settings: Settings) -> int:
        return settings.max_crops or self._context.config.vision.max_crops

    def _remove_if_idle(self, image: WaitingImage) -> None:
        """Remove finished sequences from an image, and the image from the queue if no sequence waits for it."""
        image.waiting = deque(state for state in image.waiting if not state.job.done)
        if image.waiting:
            return
        image.drop_encoded()  # running sequences have copied the prefix
        self._queue.pop(image, None)
        if self._joinable.get(image.key) is image:
            del self._joinable[image.key]

    # Finish and abort -------------------------------------------------------------------------------------------------

    def _abort(self, jobs: list[Job]) -> None:
        """Finish cancelled jobs, and remove their sequences from the queue and the runner."""
        for job in jobs:
            if not job.done:
                self._finish(job, ErrorResult(RequestCancelled("the request was cancelled")))
            if (compiling := self._compiling.pop(job, None)) is not None:
                compiling.cancel()
        for image in list(self._queue):
            self._remove_if_idle(image)
        for adapter_name, states in self._running.items():
            self._remove(adapter_name, [seq_id for seq_id, state in states.items() if state.job.done])

    def _remove(self, adapter_name: str | None, seq_ids: list[int]) -> None:
        """Remove sequences of finished jobs from the runner."""
        if not seq_ids:
            return
        for seq_id in seq_ids:
            del self._running[adapter_name][seq_id]
        try:
            self._runner.remove(seq_ids, adapter_name)
        except Exception as error:
            self._recover(adapter_name, error)

    def _finish(self, job: Job, result: Result) -> None:
        if isinstance(result, ErrorResult):
            logger.debug("%s failed", type(job.request).__name__, exc_info=result.error)
        job.result = result
        with self._lock:
            self._finished.append(job)

    def _fail(self, states: Iterable[SequenceState], error: Exception) -> None:
        for state in list(states):
            self._finish(state.job, ErrorResult(error))

    # Admit ------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Admit waiting sequences within the limits, those on the same image together."""
        # Select sequences
        if self._admission_pause is not None and self.running >= self._admission_pause:
            return
        running = (state for states in self._running.values() for state in states.values())
        self._policy.observe(self._step_number, running, self._queue)
        recently = self._step_number - self._last_admission < ADMISSION_INTERVAL
        if self.running and recently and not self._policy.prioritizes_regions:
            return
        num_seqs = self.limits.max_num_seqs - self.running
        num_images = self.limits.max_images - self._runner.num_images
        selected = self._policy.select(self._queue, self._has_group, num_seqs, num_images)

        # Encode their images
        for image in selected:
            if self._joinable.get(image.key) is image:
                del self._joinable[image.key]
        out_of_memory = self._encode([image for image in selected if not self._has_group(image)])

        # Admit the sequences whose images are encoded
        admitted: dict[str | None, list[SequenceState]] = {}
        for image, count in selected.items():
            if image.waiting and (image.is_ready or self._has_group(image)):
                states = [image.waiting.popleft() for _ in range(count)]
                admitted.setdefault(image.adapter_name, []).extend(states)
        for adapter_name, states in admitted.items():
            self._admit_to_runner(adapter_name, states)
            self._last_admission = self._step_number
        for image in selected:
            self._remove_if_idle(image)
        self._admission_pause = (self.running or None) if out_of_memory else None

    def _has_group(self, image: WaitingImage) -> bool:
        return self._runner.has_group(image.group_key, image.adapter_name)

    def _admit_to_runner(self, adapter_name: str | None, states: list[SequenceState]) -> None:
        running = self._running.setdefault(adapter_name, {})
        for state in states:
            running[state.sequence.seq_id], state.job.sequence = state, state.sequence
        try:
            self._runner.admit(states, adapter_name)
        except Exception as error:
            self._recover(adapter_name, error)

    def _encode(self, images: list[WaitingImage]) -> bool:
        """Encode images. Unreadable ones fail; if memory runs out, some are left for a later step.

        Returns:
            Whether memory ran out.
        """
        # Read the images and group those with the same settings
        batches: dict[tuple[int, str | None, WaitingImage | None], list[WaitingImage]] = {}
        for image in images:
            if image.is_ready:
                continue
            is_context = isinstance(image.source, InterleavedContext)
            try:
                if image.pixels is None:
                    image.pixels = _read_context(image.source) if is_context else _read(image.source)
            except Exception as error:  # files, servers and image libraries can raise anything
                self._fail(image.waiting, error)
                continue
            key = (self._max_crops(image.settings), image.adapter_name, image if is_context else None)
            batches.setdefault(key, []).append(image)

        # Encode each group
        out_of_memory = False
        for (max_crops, adapter_name, context), batch in batches.items():
            try:
                if context is None:
                    frames: list[Any] = [image.pixels for image in batch]
                    encoded: Sequence[EncodedImage | EncodedContext]
                    encoded = self._runner.prefill_images(frames, max_crops, adapter_name)
                else:
                    encoded = [self._encode_context(context, max_crops)]
            except Exception as error:
                free_after(error, self._runner.device)
                if not is_out_of_memory(error):
                    self._fail([state for image in batch for state in image.waiting], error)
                    continue
                out_of_memory = True
                if self._runner.free_idle_memory():
                    continue
                if len(batch) > 1:
                    self._lower_limits(max_images=self._runner.num_images + len(batch) // 2)
                elif not self.running and not any(image.is_ready for image in images) and not self._free_memory():
                    self._fail(batch[0].waiting, self._too_large_error(error))
                continue
            for image, one in zip(batch, encoded, strict=True):
                image.encoded = one
        return out_of_memory

    def _encode_context(self, image: WaitingImage, max_crops: int) -> EncodedContext:
        """Encode the distinct images of a conversation together, and prefill the decoder with the conversation."""
        assert isinstance(image.pixels, tuple)
        frames = {id(frame): frame for frame in image.pixels if not isinstance(frame, EncodedImage)}
        encoded = self._runner.prefill_images(list(frames.values()), max_crops, image.adapter_name)
        by_id = dict(zip(frames, encoded, strict=True))
        images = [frame if isinstance(frame, EncodedImage) else by_id[id(frame)] for frame in image.pixels]
        return self._runner.prefill_context(image.source, images, image.adapter_name)

    # Decode and preempt -----------------------------------------------------------------------------------------------

    def _decode(self, adapter_names: Sequence[str | None]) -> None:
        """Advance all sequences of some adapters, together if possible, and finish those that are complete."""
        if self._runner.can_join(adapter_names):
            try:
                outputs = self._runner.decode_steps(adapter_names)
            except Exception as error:
                free_after(error, self._runner.device)
            else:
                for adapter_name, one in zip(adapter_names, outputs, strict=True):
                    self._apply(adapter_name, one)
                return
        for adapter_name in adapter_names:
            if not self._running[adapter_name]:
                continue
            try:
                output = self._runner.decode_step(adapter_name)
            except Exception as error:
                self._recover(adapter_name, error)
                continue
            self._apply(adapter_name, output)

    def _apply(self, adapter_name: str | None, outputs: StepOutputs) -> None:
        """Apply the outputs of a step to the sequences of an adapter, and finish those that are complete."""
        finished = []
        for state, output in outputs:
            try:
                state.inputs = state.sequence.apply(output)
                result = state.sequence.result
            except Exception as error:  # fails this request only
                result = ErrorResult(error)
            if result is not None:
                self._finish(state.job, result)
                finished.append(state.sequence.seq_id)
        self._remove(adapter_name, finished)

    def _recover(self, adapter_name: str | None, error: Exception) -> None:
        """Recover from an error in the batch of an adapter.

        If memory ran out, preempt its sequences and halve the number of concurrent ones; otherwise fail them.
        """
        # Decide whether a retry can succeed
        num_running, states = self.running, list(self._running[adapter_name].values())
        self._running[adapter_name] = {}
        if not is_out_of_memory(error):
            self._runner.reset(adapter_name)
            free_after(error, self._runner.device)
            self._fail(states, error)
            return
        free_after(error, self._runner.device)
        is_alone = num_running == 1 and len(states) == 1
        freed_memory = self._free_memory()
        if is_alone and (states[0].ran_out_of_memory_alone or not freed_memory):
            self._runner.reset(adapter_name)
            self._fail(states, self._too_large_error(error))
            return

        # Preempt the sequences and queue them first
        try:
            self._runner.preempt(adapter_name)
        except Exception as another:  # no memory even for that
            free_after(another, self._runner.device)
            self._fail(states, self._too_large_error(another))
            return
        for state in reversed(states):
            state.ran_out_of_memory_alone = is_alone
            state.image.waiting.appendleft(state)
        self._queue = dict.fromkeys([state.image for state in states]) | self._queue
        self._lower_limits(max_num_seqs=num_running // 2)

    def _free_memory(self) -> bool:
        """Free idle memory and drop encoded images that can be encoded again, and return whether there were any."""
        dropped = self._runner.free_idle_memory()
        dropped = self._context.clear_image_cache() or dropped
        for image in self._queue:
            dropped = image.drop_encoded() or dropped
        return dropped

    def _lower_limits(self, max_num_seqs: int | None = None, max_images: int | None = None) -> None:
        """Lower limits, to 1 or more, and log the change."""
        limits, before = self.limits, replace(self.limits)
        if max_num_seqs is not None:
            limits.max_num_seqs = max(1, min(limits.max_num_seqs, max_num_seqs))
        if max_images is not None:
            limits.max_images = max(1, min(limits.max_images, max_images))
        if limits != before:
            logger.warning(
                "out of memory on %s: continuing with at most %d sequences on %d images",
                self._runner.device,
                limits.max_num_seqs,
                limits.max_images,
            )

    def _too_large_error(self, error: Exception) -> MoondreamError:
        described = MoondreamError(
            f"out of memory on {self._runner.device} with this request alone: reduce max_crops, max_tokens or "
            "max_objects, or load the model in bfloat16 or on another device"
        )
        described.__cause__ = error
        return described


def _read(image: Any) -> np.ndarray | PreprocessedImage:
    """Return the pixels of an image; a preprocessed image is returned unchanged."""
    return image if isinstance(image, PreprocessedImage) else to_rgb(image)


def _read_context(context: InterleavedContext) -> tuple[np.ndarray | PreprocessedImage | EncodedImage, ...]:
    """Return the pixels of the images of a context, one object per distinct image.

    Encoded images are returned unchanged.
    """
    distinct = {source_key(image): image for image in context.images}
    pixels = {key: image if isinstance(image, EncodedImage) else _read(image) for key, image in distinct.items()}
    return tuple(pixels[source_key(image)] for image in context.images)
