"""Admission policy: which waiting sequences are admitted in a step.

Sequences are admitted in the order of their requests, unless detection and pointing requests are rare among text
requests. Those are short and usually come from a loop over video frames, and every running sequence stalls while images
are encoded. So if they are rare, they are admitted first. Images of text requests are then encoded a few per step, and
none while a detection or pointing sequence runs, unless they have waited for `MAX_DEFERRED_STEPS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from moondream_cv.engine.sequence_state import SequenceState, WaitingImage

MAX_PROMPT_TOKENS = 2048  # admitted per step, approximately: the attention mask grows with the square
ADMISSION_INTERVAL = 2  # steps between admissions, since a step that admits is slow for all sequences
RARE_REGION_RATIO = 4  # text sequences per region sequence from which region sequences are rare
MAX_TEXT_IMAGES = 2  # images of text requests that are encoded per step while region sequences have priority
MAX_DEFERRED_STEPS = 8  # steps for which a text request is deferred
PRIORITY_STEPS = 64  # steps for which the priority lasts after the last region sequence


class AdmissionPolicy:
    """Selects the sequences to admit. Region sequences, which detect and point, have priority while they are rare."""

    def __init__(self) -> None:
        """Start without any sequences."""
        self._step = 0
        self._last_region_step = -PRIORITY_STEPS
        self._num_region = self._num_text = 0

    def observe(self, step: int, running: Iterable[SequenceState], queue: Iterable[WaitingImage]) -> None:
        """Count the sequences at the start of a step.

        Args:
            step: Number of the step.
            running: Sequences that are decoding.
            queue: Images that sequences wait for.
        """
        self._step, self._num_region, self._num_text = step, 0, 0
        for state in itertools.chain(running, *(image.waiting for image in queue)):
            self._num_text += state.is_text
            self._num_region += not state.is_text
        if self._num_region:
            self._last_region_step = step

    @property
    def prioritizes_regions(self) -> bool:
        """Whether region sequences are rare and at least one was present recently."""
        is_rare = self._num_region * RARE_REGION_RATIO <= self._num_text
        return is_rare and self._step - self._last_region_step < PRIORITY_STEPS

    def select(
        self,
        queue: Iterable[WaitingImage],
        has_group: Callable[[WaitingImage], bool],
        num_seqs: int,
        num_images: int,
    ) -> dict[WaitingImage, int]:
        """Select the images to admit sequences on.

        Args:
            queue: Images in the order of their first requests.
            has_group: Returns whether an image already has a KV cache group.
            num_seqs: Number of sequences that can be admitted.
            num_images: Number of images that can be admitted.

        Returns:
            Number of sequences to admit on each image.
        """
        # Order the queue
        priority = self.prioritizes_regions
        deferred = {
            image for image in queue if priority and image.is_text and self._step - image.since < MAX_DEFERRED_STEPS
        }
        ordered = sorted(queue, key=lambda image: image in deferred)  # stable

        # Select images until a limit is reached
        selected: dict[WaitingImage, int] = {}
        prompt_tokens, text_images = MAX_PROMPT_TOKENS, MAX_TEXT_IMAGES
        for image in ordered:
            is_running = has_group(image)
            if num_seqs <= 0 or prompt_tokens <= 0 or (num_images <= 0 and not is_running):
                break
            if priority and image.is_text and not is_running and not image.is_ready:
                if not text_images or (self._num_region and image in deferred):
                    continue
                text_images -= 1
            selected[image], prompt_tokens = _count_fitting(image.waiting, num_seqs, prompt_tokens)
            num_seqs -= selected[image]
            num_images -= not is_running
            if selected[image] < len(image.waiting):
                break
        return selected


def _count_fitting(states: Iterable[SequenceState], num_seqs: int, prompt_tokens: int) -> tuple[int, int]:
    """Count the sequences that fit. The last one may exceed the token budget, so that a long prompt is never stuck.

    Returns:
        Number of sequences, and the token budget that is left.
    """
    count = 0
    for state in states:
        if count == num_seqs or prompt_tokens <= 0:
            break
        count, prompt_tokens = count + 1, prompt_tokens - state.num_new_tokens
    return count, prompt_tokens
