"""Requests that wait for a scheduler's room, grouped by image, and which of them go next.

In their order, unless objects and points are rare among texts. Those are short work, what waits for them is usually a
loop over frames, and every row of a batch stands still while images are encoded. So where they are rare they go first;
images for texts are then encoded a few at a time, and none while an object or a point is being computed, unless it has
waited for long enough.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from moondream_cv.engine.encoding import EncodedImage
from moondream_cv.engine.model_runner import Feed, feed_length
from moondream_cv.engine.preprocessing import PreparedImage
from moondream_cv.engine.sequences import RegionRow, Row
from moondream_cv.requests import Request, Result, Settings

NO_IMAGE = object()  # what rows without an image share a context by
PROMPT_TOKENS = 2048  # that are fed in one step, about: their attention mask grows with the square
GATHER = 2  # steps from one joining to the next, since a step in which rows join costs all of them more
RARE = 4  # texts for each object or point from which on those are rare
ENCODED_TOGETHER = 2  # images for texts, where objects and points are rare
PATIENCE = 8  # steps that a text lets those go first
RECENT = 64  # steps for which they are still reckoned with after the last one


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
class Entry:
    """A request on its image.

    Attributes:
        feed: What its row feeds first: the prompt; where it had to make room for others, everything up to where it was.
        readings: Of the object that it had begun by then.
        alone: Whether it has run out of memory alone.
    """

    job: Job
    image: WaitingImage
    row: Row
    feed: Feed
    readings: Tensor | None = None
    alone: bool = False

    @property
    def is_text(self) -> bool:
        return not isinstance(self.row, RegionRow)


@dataclass(eq=False)
class WaitingImage:
    """An image that requests wait for, and those requests in their order.

    Attributes:
        key: Under which others join them; until the first of them runs, since an array may have other contents by then,
            and an image that is asked about all the time must not keep all others waiting.
        source: What the requests gave; None for those without an image.
        settings: `max_crops` and `variant` are the same for all of them.
        since: The step in which the first of them came.
        pixels: Its RGB, from when that is first needed: rows that have to begin again go on with what they began with.
        encoded: While requests wait for it.
    """

    key: Any
    source: Any
    settings: Settings
    since: int
    pixels: np.ndarray | PreparedImage | None = None
    encoded: EncodedImage | None = None
    entries: deque[Entry] = field(default_factory=deque)

    @property
    def identity(self) -> object:
        """What rows share a context by."""
        if self.source is None:
            return NO_IMAGE
        return self.source if isinstance(self.source, EncodedImage) else self

    @property
    def ready(self) -> bool:
        return self.source is None or self.encoded is not None

    @property
    def is_text(self) -> bool:
        """Whether only texts wait for it."""
        return all(entry.is_text for entry in self.entries)

    def forget(self) -> bool:
        """Let go of the encoded image where it can be encoded again; say whether there was one."""
        if self.encoded is None or self.encoded is self.source:
            return False
        self.encoded = None
        return True


def source_key(source: Any) -> Any:
    """What is the same for images that requests may share: the same path, prepared content or object."""
    if isinstance(source, PreparedImage) and source.has_digest:
        return source.digest
    return os.fspath(source) if isinstance(source, str | os.PathLike) else id(source)


class Crowd:
    """Who runs and who waits, and whether objects and points are rare among them."""

    def __init__(self) -> None:
        self._step = 0
        self._last = -RECENT  # the step in which there last was an object or a point
        self._short = self._long = 0

    def look(self, step: int, running: Iterable[Entry], queue: Iterable[WaitingImage]) -> None:
        """Count who is there.

        Args:
            step: The number of this step.
            running: Those that decode.
            queue: Those that wait.
        """
        self._step, self._short, self._long = step, 0, 0
        for entry in itertools.chain(running, *(image.entries for image in queue)):
            self._long += entry.is_text
            self._short += not entry.is_text
        if self._short:
            self._last = step

    @property
    def hurries(self) -> bool:
        """Whether objects and points are rare, and are there or were of late."""
        return self._short * RARE <= self._long and self._step - self._last < RECENT

    def choose(
        self, queue: Iterable[WaitingImage], holds: Callable[[WaitingImage], bool], rows: int, images: int
    ) -> dict[WaitingImage, int]:
        """Which images go next, and how many of the requests on each.

        Args:
            queue: In the order in which they came.
            holds: Whether a batch has an image already.
            rows: How many requests there is room for.
            images: How many images there is room for.
        """
        hurried = self.hurries
        yielding = {image for image in queue if hurried and image.is_text and self._step - image.since < PATIENCE}
        chosen: dict[WaitingImage, int] = {}
        tokens, encodings = PROMPT_TOKENS, ENCODED_TOGETHER
        for image in sorted(queue, key=lambda image: image in yielding):  # else they stay in their order
            held = holds(image)
            if rows <= 0 or tokens <= 0 or (images <= 0 and not held):
                break
            if hurried and image.is_text and not held and not image.ready:
                if not encodings or (self._short and image in yielding):
                    continue
                encodings -= 1
            chosen[image], tokens = _fitting(image.entries, rows, tokens)
            rows -= chosen[image]
            images -= not held
            if chosen[image] < len(image.entries):
                break
        return chosen


def _fitting(entries: Iterable[Entry], room: int, tokens: int) -> tuple[int, int]:
    """How many requests may join, and how many tokens of prompts are left after them; one may always exceed those."""
    count = 0
    for entry in entries:
        if count == room or tokens <= 0:
            break
        count, tokens = count + 1, tokens - feed_length(entry.feed)
    return count, tokens
