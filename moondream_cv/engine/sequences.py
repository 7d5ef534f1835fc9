"""Sequences: the host-side state of one request while it decodes.

A sequence determines which head is applied next, collects the reply and decides when to stop. It contains no device
tensors. It changes only in `apply`, once per step, so a step that runs out of memory can be repeated.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer

from moondream_cv.engine.calibration import Calibration
from moondream_cv.engine.confidence import confidence
from moondream_cv.engine.detokenizer import IncrementalDetokenizer
from moondream_cv.engine.heads import Head, HeadOutputs, TokenOutput
from moondream_cv.engine.prompts import Prompt, answer_prompt
from moondream_cv.engine.sampling import SEED_BITS, SamplingParams
from moondream_cv.engine.stop_strings import StopStringMatcher
from moondream_cv.engine.structured_output import GrammarMatcher
from moondream_cv.errors import MoondreamError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Chat,
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

MIN_ANSWER_TOKENS = 32  # positions of the context that reasoning leaves for the answer


@dataclass(kw_only=True)
class Sequence:
    """A request that is being decoded.

    Attributes:
        seq_id: Number that identifies the sequence within its scheduler.
        request: Request that the sequence answers.
        config: Configuration of the checkpoint.
        num_computed_tokens: Positions of the context that have been computed, including those of the image.
        head: Head that is applied to the next hidden state.
        pieces: Parts of the reply so far: objects, points or text; reasoning first.
        result: Reply, once it is complete.
    """

    seq_id: int
    request: Request
    config: MoondreamConfig
    num_computed_tokens: int
    head: Head
    pieces: list[Any] = field(default_factory=list)
    result: Result | None = None
    _seed: int | None = field(default=None, init=False)

    @property
    def num_free_positions(self) -> int:
        """Positions of the context that are left."""
        return self.config.text.max_context - self.num_computed_tokens

    @property
    def predicted_head(self) -> Head | None:
        """Head of the next step unless the current step ends the sequence; None if the host must read outputs first."""
        return None

    @property
    def may_continue(self) -> bool:
        """Whether another step may follow the current one."""
        return True

    def apply(self, output: HeadOutputs | TokenOutput | None) -> Prompt | None:
        """Update the sequence with the outputs of one step. Sets `result` when the reply is complete.

        Args:
            output: Output of the head that `head` named; None for heads whose output stays on the device.

        Returns:
            A prompt that replaces the decoded token as the next input; None: the decoded token is the next input.

        Raises:
            MoondreamError: The outputs are not finite, or the answer violates its grammar.
        """
        raise NotImplementedError

    def sampling_params(self) -> SamplingParams | None:
        """Return the parameters of the next choices; None for the most likely objects or points."""
        return None

    def _step_seeds(self) -> tuple[int, int]:
        """Return two seeds of choices that depend on the seed of the request and the position in the context."""
        generator = random.Random(f"{self._seed}:{self.num_computed_tokens}")
        return generator.getrandbits(SEED_BITS), generator.getrandbits(SEED_BITS)

    def _sampling_seed(self) -> int | None:
        """Return the seed of the request, or else one of PyTorch's generator; None for greedy decoding."""
        settings = self.request.settings
        if settings.temperature == 0:
            return None
        if settings.seed is not None:
            return settings.seed
        # PyTorch's generator, so that `torch.manual_seed` makes sampling repeatable
        return int(torch.randint(2**62, (), device="cpu", dtype=torch.long))


@dataclass(kw_only=True)
class RegionSequence(Sequence):
    """A sequence that lists objects or points.

    Attributes:
        max_objects: Maximum number of objects or points.
        has_size: Whether the objects are boxes.
        force_first: Return the first object even if the model would stop before it.
        calibration: Maps scores to probabilities; None returns the scores.
        in_object: Whether an object has been started and is not complete.
    """

    max_objects: int = 1
    has_size: bool = False
    force_first: bool = False
    calibration: Calibration | None = None
    in_object: bool = False

    def __post_init__(self) -> None:
        self._seed = self._sampling_seed() if self.request.settings.sample_regions else None

    def sampling_params(self) -> SamplingParams | None:
        """Return the parameters of the next choices, with two seeds that depend on the position in the context.

        A step may be launched more than once. Its seeds are the same each time.
        """
        if self._seed is None:
            return None
        settings, (first, second) = self.request.settings, self._step_seeds()
        return SamplingParams(settings.temperature, settings.top_p, first, second_seed=second)

    @property
    def predicted_head(self) -> Head:
        """Head of the next step unless the current step ends the sequence."""
        if self.head is Head.X_OR_STOP:
            return Head.Y
        return Head.SIZE if self.has_size and self.head is Head.Y else Head.X_OR_STOP

    @property
    def may_continue(self) -> bool:
        """Whether another step may follow the current one: the list is not complete."""
        return self.head is not Head.X_OR_STOP or len(self.pieces) + self.in_object < self.max_objects

    def apply(self, output: HeadOutputs | TokenOutput | None) -> Prompt | None:
        """Update the sequence; after an X_OR_STOP step, complete the previous object and start the next one or stop."""
        if self.head is not Head.X_OR_STOP:
            self.head = self.predicted_head
            return None
        assert isinstance(output, HeadOutputs)
        if self.in_object:
            self.pieces.append(self._object(output))
        if math.isnan(output.next_continue_probability):
            raise overflow_error()
        wanted = not output.stop or (self.force_first and not self.pieces)
        full = len(self.pieces) == self.max_objects or self.num_free_positions < (3 if self.has_size else 2)
        self.in_object = wanted and not full
        if self.in_object:
            self.head = self.predicted_head
        else:
            self.result = self._result(truncated=wanted)
        return None

    def _object(self, output: HeadOutputs) -> DetectedObject | DetectedPoint:
        axes = (output.x, output.y, output.width, output.height)[: 4 if self.has_size else 2]
        box = [axis.value for axis in axes]
        score = confidence(output.continue_probability, box, [axis.features for axis in axes])
        if math.isnan(score):
            raise overflow_error()
        if self.calibration is not None:
            score = self.calibration.apply("detect" if self.has_size else "point", score)
        if not self.has_size:
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
class TextSequence(Sequence):
    """A sequence that writes an answer or a caption, optionally after reasoning.

    Attributes:
        tokenizer: Tokenizer that decodes the text.
        grammar: Constrains the answer; None leaves it free.
        token_seed: Seed of the choice of the next token; None selects the most likely token.
        banned: Token IDs that must not come next.
        num_tokens: Tokens of the current part, which is the reasoning or the answer.
        reasoning_segments: Token IDs and coordinates of each segment of the reasoning.
        reasoning_truncated: Whether a limit ended the reasoning.
        answer_tokens: Token IDs of the answer.
        logprobs: Log-probability of each token of the answer.
    """

    tokenizer: Tokenizer
    grammar: GrammarMatcher | None = None
    token_seed: int | None = None
    banned: tuple[int, ...] = ()
    num_tokens: int = 0
    reasoning_segments: list[tuple[list[int], list[float]]] = field(default_factory=lambda: [([], [])])
    reasoning_truncated: bool = False
    answer_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._detokenizer = IncrementalDetokenizer(self.tokenizer)
        stop = self.request.stop if isinstance(self.request, Query | Chat) else ()
        self._stop = StopStringMatcher(stop) if stop else None
        self._seed = self._sampling_seed()
        self._generator: random.Random | None = None
        self._start_part()

    def sampling_params(self) -> SamplingParams:
        """Return the parameters for the next token, including the bitmask of the grammar."""
        settings = self.request.settings
        bitmask = self.grammar.bitmask() if self.grammar and self.head is Head.TOKEN else None
        second = self._step_seeds()[1] if settings.sample_regions and self._seed is not None else None
        return SamplingParams(settings.temperature, settings.top_p, self.token_seed, self.banned, bitmask, second)

    def apply(self, output: HeadOutputs | TokenOutput | None) -> Prompt | None:
        """Append the next token. At the end of the reasoning, return the prompt of the answer."""
        assert isinstance(output, TokenOutput)
        if math.isnan(output.logprob):
            raise overflow_error()
        prompt = None
        if self.head is Head.REASONING:
            prompt = self._append_reasoning(output.token, output.coordinate)
        else:
            self._append_answer(output.token, output.logprob)
        self.token_seed = None if self._generator is None else self._generator.getrandbits(SEED_BITS)
        return prompt

    def _append_answer(self, token: int, logprob: float) -> None:
        config, limit = self.config.tokenizer, self.request.settings.max_tokens
        if self.grammar is not None:
            self.grammar.accept(token)
        if token == config.eos_id or self.num_tokens == limit:
            self._finish(token != config.eos_id, logprob)
            return
        self.num_tokens += 1
        self.answer_tokens.append(token)
        self.logprobs.append(logprob)
        if self._emit(self._detokenizer.add(token)):
            self._set_result(False)
            return
        self.banned = (config.answer_id,) if config.has_control_tokens else ()  # an ordinary word in earlier releases
        if self.grammar is not None and self.grammar.finished:
            self._finish(False, None)
        elif not self.num_free_positions:
            self._finish(True, None)

    def _append_reasoning(self, token: int, coordinate: float) -> Prompt | None:
        """Append a token to the reasoning.

        The tokens around a grounded passage split the text into segments. The coordinates of a segment, in pairs, are
        its points.
        """
        config = self.config.tokenizer
        answer = answer_prompt(config)
        self.reasoning_truncated = token != config.answer_id and (
            self.num_tokens == self.request.settings.max_tokens
            or self.num_free_positions <= len(answer.ids) + MIN_ANSWER_TOKENS
        )
        if token == config.answer_id or self.reasoning_truncated:
            self.pieces.append(_decode_reasoning(self.tokenizer, self.reasoning_segments))
            self.head = Head.TOKEN
            self._start_part()
            return answer
        if token in (config.start_ground_points_id, config.end_ground_id):
            self.reasoning_segments.append(([], []))
        tokens, coordinates = self.reasoning_segments[-1]
        tokens.append(token)
        if token == config.coord_id:
            coordinates.append(coordinate)
        self.num_tokens += 1
        self.banned = (config.eos_id, config.size_id)
        return None

    def _start_part(self) -> None:
        """Reset what the reasoning and the answer each start with."""
        self.num_tokens, self.banned, self.token_seed, self._generator = 0, (), None, None
        if self.request.settings.temperature > 0:
            self._generator = random.Random(self._seed)
            self.token_seed = self._generator.getrandbits(SEED_BITS)

    def _finish(self, truncated: bool, logprob: float | None) -> None:
        """Emit the remaining text and set the result.

        Args:
            truncated: Whether a limit ended the answer.
            logprob: Log-probability of the token that ended the answer; None if no token did.
        """
        stopped = self._emit(self._detokenizer.flush(), is_last=True)
        if not truncated and logprob is not None:
            self.logprobs.append(logprob)
        self._set_result(truncated and not stopped)

    def _set_result(self, truncated: bool) -> None:
        mean = sum(self.logprobs) / len(self.logprobs) if self.logprobs else None
        if isinstance(self.request, Caption):
            self.result = CaptionResult("".join(self.pieces), truncated, mean)
            return
        has_reasoning = isinstance(self.request, Query | Chat) and self.request.reasoning
        reasoning, *answer = self.pieces if has_reasoning else (None, *self.pieces)
        self.result = QueryResult("".join(answer), reasoning, truncated or self.reasoning_truncated, mean)

    def _emit(self, text: str, is_last: bool = False) -> bool:
        """Append text to the pieces and return whether a stop string ends the answer."""
        stopped = False
        if self._stop is not None:
            text, stopped = self._stop.add(text, "" if is_last else self._detokenizer.pending)
            text += self._stop.flush() if is_last and not stopped else ""
        if text:
            self.pieces.append(text)
        return stopped


def make_sequence(
    seq_id: int,
    request: Request,
    config: MoondreamConfig,
    tokenizer: Tokenizer,
    calibration: Calibration | None,
    prefix_length: int,
    grammar: GrammarMatcher | None = None,
) -> Sequence:
    """Create the sequence of a request.

    Args:
        seq_id: Number that identifies the sequence within its scheduler.
        request: Request to answer.
        config: Configuration of the checkpoint.
        tokenizer: Tokenizer of the checkpoint.
        calibration: Maps scores of objects and points to probabilities; None returns the scores.
        prefix_length: Positions of the context that the image takes; 0 without an image.
        grammar: Constrains an answer; None leaves it free.
    """
    common: dict[str, Any] = {
        "seq_id": seq_id,
        "request": request,
        "config": config,
        "num_computed_tokens": prefix_length,
    }
    if isinstance(request, Detect | Point | Gaze):
        gaze = isinstance(request, Gaze)
        return RegionSequence(
            **common,
            head=Head.X_OR_STOP,
            max_objects=1 if gaze else request.settings.max_objects,
            has_size=isinstance(request, Detect),
            force_first=isinstance(request, Gaze) and request.force,
            calibration=calibration,
        )
    head = Head.REASONING if isinstance(request, Query | Chat) and request.reasoning else Head.TOKEN
    return TextSequence(**common, head=head, tokenizer=tokenizer, grammar=grammar)


def _decode_reasoning(tokenizer: Tokenizer, segments: list[tuple[list[int], list[float]]]) -> Reasoning:
    text, grounding = "", []
    for tokens, coordinates in segments:
        segment = tokenizer.decode(tokens)
        points = tuple(zip(coordinates[::2], coordinates[1::2]))  # noqa: B905 - an odd last coordinate is dropped
        if points:
            grounding.append(Grounding(len(text), len(text) + len(segment), points))
        text += segment
    return Reasoning(text, tuple(grounding))


def overflow_error() -> MoondreamError:
    """Return the error of a request for which the model computed NaN."""
    return MoondreamError(
        "the model's numbers overflowed or its weights are damaged, so this request has no valid probabilities; "
        "load the model with dtype='bfloat16' or 'float32'"
    )
