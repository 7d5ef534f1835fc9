"""What a request has come to while it is decoded: which head is read next, and what its reply holds so far.

Rows know tokens, coordinates and when to stop; `batch.py` computes. A row moves only when it is told what was read,
once per step, so that a step that runs out of memory can be done again.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer

from moondream_cv.engine.calibration import Calibration
from moondream_cv.engine.confidence import AXIS_FEATURES, confidence
from moondream_cv.engine.detokenizer import WordStream
from moondream_cv.engine.prompts import Prompt, answer_prompt
from moondream_cv.engine.stop_strings import StopStringMatcher
from moondream_cv.engine.structured_output import GrammarMatcher
from moondream_cv.errors import MoondreamError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectedObject,
    DetectedPoint,
    DetectResult,
    Gaze,
    GazeResult,
    Grounding,
    Point,
    PointResult,
    Query,
    QueryResult,
    Reasoning,
    Request,
    Result,
)

ANSWER_ROOM = 32  # positions of the context that reasoning leaves for the answer
AXIS = 1 + AXIS_FEATURES  # numbers read of a coordinate or of a side: itself, and how sharp it is
READINGS = 1 + 4 * AXIS  # numbers read of an object: the probability that there is one; x, y, width, height


class Head(enum.Enum):
    """What is read from the next hidden state of a row."""

    DECISION = enum.auto()  # whether there is another object, and its x
    Y = enum.auto()
    SIZE = enum.auto()
    TOKEN = enum.auto()
    THOUGHT = enum.auto()  # a token, and a coordinate for the case that it stands for one


@dataclass(kw_only=True)
class Row:
    """A request being decoded.

    Attributes:
        key: Its number, which no other row of the batch has.
        request: What was asked.
        config: Of the checkpoint.
        length: Positions of the context that are fed.
        head: What is read next.
        pieces: What has been said so far: objects, points, text; reasoning first.
        result: The reply, once it is complete.
    """

    key: int
    request: Request
    config: MoondreamConfig
    length: int
    head: Head
    pieces: list[Any] = field(default_factory=list)
    result: Result | None = None

    @property
    def room(self) -> int:
        """Positions of the context that are left."""
        return self.config.text.max_context - self.length


@dataclass(kw_only=True)
class RegionRow(Row):
    """A row that lists objects or points.

    Attributes:
        limit: Objects at the most.
        sized: Whether they are boxes.
        force: Give the first one even where there is none.
        calibration: What turns scores into probabilities; None leaves them as they are.
    """

    limit: int = 1
    sized: bool = False
    force: bool = False
    calibration: Calibration | None = None
    begun: bool = False

    def decide(self, stop: bool, going_on: float, readings: Sequence[float]) -> bool:
        """Take in a decision, before which the object begun before it is complete; say whether another one begins.

        Args:
            stop: Whether the end is likelier than everything else.
            going_on: Probability of another object.
            readings: Of the object that was begun before: `READINGS` numbers.

        Raises:
            MoondreamError: The numbers are not finite.
        """
        if self.begun:
            self.pieces.append(self._item(readings))
        if math.isnan(going_on):
            raise _overflow()
        wanted = not stop or (self.force and not self.pieces)
        full = len(self.pieces) == self.limit or self.room < (3 if self.sized else 2)
        self.begun = wanted and not full
        if self.begun:
            self.head = Head.Y
        else:
            self.result = self._result(wanted)
        return self.begun

    def advance(self) -> None:
        """Take in that a y or a size has been read."""
        self.head = Head.SIZE if self.sized and self.head is Head.Y else Head.DECISION

    def _item(self, readings: Sequence[float]) -> DetectedObject | DetectedPoint:
        count = 4 if self.sized else 2
        axes = [readings[1 + a * AXIS : 1 + (a + 1) * AXIS] for a in range(count)]
        box = [axis[0] for axis in axes]
        score = confidence(readings[0], box, [axis[1:] for axis in axes])
        if math.isnan(score):
            raise _overflow()
        if self.calibration is not None:
            score = self.calibration.apply("detect" if self.sized else "point", score)
        if not self.sized:
            return DetectedPoint(box[0], box[1], score)
        x, y, w, h = box
        return DetectedObject(x - w / 2, y - h / 2, x + w / 2, y + h / 2, score)

    def _result(self, truncated: bool) -> Result:
        if isinstance(self.request, Detect):
            return DetectResult(tuple(self.pieces), truncated)
        if isinstance(self.request, Point):
            return PointResult(tuple(self.pieces), truncated)
        return GazeResult(self.pieces[0] if self.pieces else None)


@dataclass(kw_only=True)
class TextRow(Row):
    """A row that writes an answer or a caption, perhaps after thinking.

    Attributes:
        tokenizer: For its text.
        draw: A random number in 0..1 that chooses the next token; None takes the likeliest one.
        banned: Tokens that must not come next.
        grammar: Constrains the answer; None leaves it free.
    """

    tokenizer: Tokenizer
    grammar: GrammarMatcher | None = None
    draw: float | None = None
    banned: tuple[int, ...] = ()
    thoughts: list[tuple[list[int], list[float]]] = field(default_factory=lambda: [([], [])])
    cut_short: bool = False
    count: int = 0
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._words = WordStream(self.tokenizer)
        stop = self.request.stop if isinstance(self.request, Query) else ()
        self._stop = StopStringMatcher(stop) if stop else None
        self._seed = self.request.settings.seed
        if self._seed is None and self.request.settings.temperature > 0:
            self._seed = int(
                torch.randint(2**62, (), device="cpu", dtype=torch.long)
            )  # torch's own generator, so that `torch.manual_seed` repeats it
        self._random: random.Random | None = None
        self._restart()

    def take(self, token: int, logprob: float, coordinate: float) -> Prompt | bool:
        """Take in the next token.

        Args:
            token: It.
            logprob: The logarithm of its probability.
            coordinate: What it stands for in a thought if it is a coordinate.

        Returns:
            Whether it is fed and another one comes; or a prompt to be fed in its place.

        Raises:
            MoondreamError: The numbers are not finite.
        """
        if math.isnan(logprob):
            raise _overflow()
        going_on = self._think(token, coordinate) if self.head is Head.THOUGHT else self._write(token, logprob)
        self.draw = None if self._random is None else self._random.random()
        return going_on

    def _write(self, token: int, logprob: float) -> bool:
        config, limit = self.config.tokenizer, self.request.settings.max_tokens
        if self.grammar is not None:
            self.grammar.accept(token)
        if token == config.eos_id or self.count == limit:
            return self._finish(token != config.eos_id, logprob)
        self.count += 1
        self.logprobs.append(logprob)
        if self._say(self._words.add(token)):
            return self._complete(False)
        self.banned = (config.answer_id,) if config.has_control_tokens else ()  # of earlier releases, it is a word
        if self.grammar is not None and self.grammar.finished:
            return self._finish(False, None)
        return True if self.room else self._finish(True, None)

    def _think(self, token: int, coordinate: float) -> Prompt | bool:
        """Take in a token of a thought.

        The tokens around a grounded passage split the text; the coordinates of each part, in pairs, are its points.
        """
        config = self.config.tokenizer
        after = answer_prompt(config)
        self.cut_short = token != config.answer_id and (
            self.count == self.request.settings.max_tokens or self.room <= len(after.ids) + ANSWER_ROOM
        )
        if token == config.answer_id or self.cut_short:
            self.pieces.append(_assemble(self.tokenizer, self.thoughts))
            self.head = Head.TOKEN
            self._restart()
            return after
        if token in (config.start_ground_points_id, config.end_ground_id):
            self.thoughts.append(([], []))
        self.thoughts[-1][0].append(token)
        if token == config.coord_id:
            self.thoughts[-1][1].append(coordinate)
        self.count += 1
        self.banned = (config.eos_id, config.size_id)
        return True

    def _restart(self) -> None:
        self.count, self.banned, self.draw, self._random = 0, (), None, None
        if self.request.settings.temperature > 0:
            self._random = random.Random(self._seed)
            self.draw = self._random.random()

    def _finish(self, truncated: bool, logprob: float | None) -> bool:
        """End the reply; `logprob` is that of the end, where it is one."""
        stopped = self._say(self._words.rest(), is_last=True)
        if not truncated and logprob is not None:
            self.logprobs.append(logprob)
        return self._complete(truncated and not stopped)

    def _complete(self, truncated: bool) -> bool:
        """Set the result."""
        mean = sum(self.logprobs) / len(self.logprobs) if self.logprobs else None
        if isinstance(self.request, Caption):
            self.result = CaptionResult("".join(self.pieces), truncated, mean)
        else:
            reasoning, *answer = self.pieces if self._reasoned else (None, *self.pieces)
            self.result = QueryResult("".join(answer), reasoning, truncated or self.cut_short, mean)
        return False

    @property
    def _reasoned(self) -> bool:
        return isinstance(self.request, Query) and self.request.reasoning

    def _say(self, text: str, is_last: bool = False) -> bool:
        """Append text to the pieces; return whether a stop string ends the answer."""
        stopped = False
        if self._stop is not None:
            text, stopped = self._stop.add(text, "" if is_last else self._words.pending)
            text += self._stop.flush() if is_last and not stopped else ""
        if text:
            self.pieces.append(text)
        return stopped


def make_row(
    key: int,
    request: Request,
    config: MoondreamConfig,
    tokenizer: Tokenizer,
    calibration: Calibration | None,
    length: int,
    grammar: GrammarMatcher | None = None,
) -> Row:
    """The row of a request.

    Args:
        length: Positions that its image takes.
        grammar: Constrains an answer.
    """
    common: dict[str, Any] = {"key": key, "request": request, "config": config, "length": length}
    if isinstance(request, Detect | Point | Gaze):
        gaze = isinstance(request, Gaze)
        return RegionRow(
            **common,
            head=Head.DECISION,
            limit=1 if gaze else request.settings.max_objects,
            sized=isinstance(request, Detect),
            force=isinstance(request, Gaze) and request.force,
            calibration=calibration,
        )
    reasoning = isinstance(request, Query) and request.reasoning
    return TextRow(**common, head=Head.THOUGHT if reasoning else Head.TOKEN, tokenizer=tokenizer, grammar=grammar)


def _assemble(tokenizer: Tokenizer, parts: list[tuple[list[int], list[float]]]) -> Reasoning:
    text, grounding = "", []
    for tokens, coordinates in parts:
        piece = tokenizer.decode(tokens)
        points = tuple(zip(coordinates[::2], coordinates[1::2]))  # noqa: B905 - an odd last coordinate is dropped
        if points:
            grounding.append(Grounding(len(text), len(text) + len(piece), points))
        text += piece
    return Reasoning(text, tuple(grounding))


def _overflow() -> MoondreamError:
    return MoondreamError(
        "the model's numbers overflowed or its weights are damaged: it gives no probabilities for this request; "
        "load it with dtype='bfloat16' or 'float32'"
    )
