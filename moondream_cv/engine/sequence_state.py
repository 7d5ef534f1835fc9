"""State of a request from submission to its last step: the caller's job, the scheduler's state and the image queue."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from moondream_cv.engine.image_encoding import EncodedContext, EncodedImage
from moondream_cv.engine.kv_cache import CacheGroup
from moondream_cv.engine.preprocessing import PreprocessedImage
from moondream_cv.engine.prompts import Prompt
from moondream_cv.engine.sequences import RegionSequence, Sequence
from moondream_cv.requests import Request, Result, Settings

NO_IMAGE = object()  # group key of all sequences without an image

StepInputs: TypeAlias = Prompt | Tensor
"""Inputs of a sequence for one step: a prompt, or [T, dim] embeddings."""


def num_tokens(inputs: StepInputs) -> int:
    """Return the number of tokens of a sequence's inputs."""
    return len(inputs.ids) if isinstance(inputs, Prompt) else len(inputs)


class Job:
    """Handle of a submitted request.

    Attributes:
        request: The request.
        result: The reply; None until it is complete.
        sequence: Sequence of the request; None until it is admitted.
        prompt_tokens: Positions of the context that the image and the prompt take; 0 until the request is queued.
    """

    def __init__(self, request: Request) -> None:
        """Create the handle of a request that has not been queued.

        Args:
            request: The request.
        """
        self.request = request
        self.result: Result | None = None
        self.sequence: Sequence | None = None
        self.prompt_tokens = 0
        self._num_taken = 0

    @property
    def done(self) -> bool:
        """Whether the reply is complete."""
        return self.result is not None

    @property
    def completion_tokens(self) -> int:
        """Positions of the context that the reply takes so far: one per text token, two per point, three per box."""
        return 0 if self.sequence is None else max(0, self.sequence.num_computed_tokens - self.prompt_tokens)

    def take(self) -> list[Any]:
        """Return the parts of the reply that are new since the last call.

        Objects and points come one by one, text word by word. Reasoning is one `Reasoning`.
        """
        if self.sequence is None:
            return []
        new = self.sequence.pieces[self._num_taken :]
        self._num_taken += len(new)
        return new


@dataclass(eq=False)
class SequenceState:
    """A sequence and everything that the scheduler and the model runner keep for it.

    Attributes:
        job: Handle of the request.
        image: Image that the sequence decodes on.
        sequence: Progress of the reply.
        inputs: Inputs of the next step: the prompt, or after a preemption all embeddings to recompute; None: the
            embedding of the token decoded last.
        partial_outputs: After a preemption, packed head outputs for the object that was incomplete.
        group: KV cache group; None unless the sequence is admitted.
        ran_out_of_memory_alone: Whether a step with no other sequence ran out of memory.
    """

    job: Job
    image: WaitingImage
    sequence: Sequence
    inputs: StepInputs | None
    partial_outputs: Tensor | None = None
    group: CacheGroup | None = None
    ran_out_of_memory_alone: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the sequence writes text and not objects or points."""
        return not isinstance(self.sequence, RegionSequence)

    @property
    def num_new_tokens(self) -> int:
        """Number of tokens that the next step computes."""
        return 1 if self.inputs is None else num_tokens(self.inputs)


@dataclass(eq=False)
class WaitingImage:
    """An image, or the context of a conversation, and the sequences that wait to be admitted on it.

    Attributes:
        key: Key under which further requests join. It is given up when the first sequence is admitted: an array may
            have other contents by then, and a popular image must not starve the others.
        source: Image as requested, or an `InterleavedContext`; None without an image.
        settings: Settings of the requests; `max_crops` and `variant` are the same for all of them.
        since: Step in which the first request arrived.
        pixels: RGB pixels once they are read. Preempted sequences continue with the pixels that they started with. A
            tuple of those of all images, or of encoded images, for a context.
        encoded: Encoded image or context while sequences wait for admission.
        waiting: Sequences in the order of their requests.
    """

    key: Any
    source: Any
    settings: Settings
    since: int
    pixels: np.ndarray | PreprocessedImage | tuple[np.ndarray | PreprocessedImage | EncodedImage, ...] | None = None
    encoded: EncodedImage | EncodedContext | None = None
    waiting: deque[SequenceState] = field(default_factory=deque)

    @property
    def adapter_name(self) -> str | None:
        """Name of the adapter; None: the one that the model was loaded with."""
        return self.settings.variant

    @property
    def group_key(self) -> object:
        """Object that identifies the KV cache group of the image."""
        if self.source is None:
            return NO_IMAGE
        return self.source if isinstance(self.source, EncodedImage) else self

    @property
    def is_ready(self) -> bool:
        """Whether sequences can be admitted without encoding the image."""
        return self.source is None or self.encoded is not None

    @property
    def is_text(self) -> bool:
        """Whether only text sequences wait."""
        return all(state.is_text for state in self.waiting)

    def drop_encoded(self) -> bool:
        """Free the encoded image if it can be encoded again, and return whether there was one."""
        if self.encoded is None or self.encoded is self.source:
            return False
        self.encoded = None
        return True


def source_key(source: Any) -> Any:
    """Return a key that is equal for images that requests may share: the path, the digest or the object itself."""
    if isinstance(source, PreprocessedImage) and source.has_digest:
        return source.digest
    return os.fspath(source) if isinstance(source, str | os.PathLike) else id(source)
