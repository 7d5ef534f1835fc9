"""`LocalModel`: Moondream 2 on this machine, as a `VisionModel` with the published methods."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moondream_cv.engine.encoding import EncodedImage, encode_pixels
from moondream_cv.engine.prompts import Prompt, answer_prompt, write_prompt
from moondream_cv.engine.regions import generate_objects, generate_points
from moondream_cv.engine.sampling import Sampler
from moondream_cv.engine.state import DecodingState, Prefix, empty_prefix
from moondream_cv.engine.text import generate_reasoning, generate_text
from moondream_cv.errors import MoondreamError
from moondream_cv.images import to_rgb
from moondream_cv.model.adapters import Adapter, load_adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectResult,
    ErrorResult,
    Gaze,
    GazeResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Request,
    Result,
    Settings,
)
from moondream_cv.vision_model import PublishedMethods, SettingsLike

logger = logging.getLogger(__name__)
_model_keys = itertools.count()
ANSWER_ROOM = 32  # positions of the context that reasoning leaves for the answer
DECODE_ROOM = 64  # positions that a request's cache has beside its prompt before it grows


class LocalModel(PublishedMethods):
    """Moondream 2 on this machine.

    Calls from several threads are safe: a call keeps its state to itself.

    Attributes:
        skills: What the checkpoint has templates for, and gaze.
        has_scores: True: confidences come from the model's own probabilities.
        network: The weights.
        config: Their sizes, token ids and templates.
        tokenizer: Text to token ids and back.
    """

    has_scores = True

    def __init__(
        self, network: MoondreamNetwork, tokenizer: Tokenizer, *, adapter: Adapter | None = None, name: str = ""
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config, self.tokenizer, self.name = network.config, tokenizer, name
        self.adapter = adapter
        self.skills = frozenset({k for k, v in self.config.tokenizer.templates.items() if v is not None} | {"gaze"})
        self._key = next(_model_keys)
        self._variants: dict[str, Adapter] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"LocalModel({self.name!r}, device={str(self.device)!r}, dtype={self.dtype})"

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run any mix of requests; each distinct image is encoded once.

        Returns:
            Results in the order of the requests, an `ErrorResult` in the place of one that failed.

        Raises:
            MoondreamError: The model is closed.
        """
        self._check_open()
        encoded: dict[Any, EncodedImage | Exception] = {}
        results: list[Result] = []
        for request in requests:
            try:
                results.append(self._run_one(request, encoded))
            except Exception as error:  # a failed item stands for itself, whatever went wrong
                logger.debug("%s failed", type(request).__name__, exc_info=True)
                results.append(ErrorResult(error))
        return results

    def stream(self, request: Request) -> Iterator[Any]:
        """Give one reply in pieces: text word by word, objects and points one by one.

        The reasoning of a question, where it is asked for, is complete before the iterator is returned: it is the first
        piece, as a `Reasoning`. Everything up to the first piece is computed at the call, so that errors are raised
        there and not in the loop that reads the iterator.

        Raises:
            ImageError: The image cannot be read.
            ValueError: The prompt is longer than the model's context.
        """
        self._check_open()
        pieces = self._pieces(request, self._prefix(request, {}))
        first = next(pieces, None)
        return iter(()) if first is None else itertools.chain((first,), pieces)

    def encode_image(self, image: Any, settings: SettingsLike = None) -> EncodedImage:
        """Encode an image once, to ask about it many times.

        Args:
            image: Anything that `moondream_cv.images.to_rgb` takes: a BGR array, a PIL image, a path, bytes. An image
                that this model has encoded already is given back.

        Raises:
            ImageError: The image cannot be read.
            ValueError: The settings are out of range, or differ from those that `image` was encoded with.
        """
        self._check_open()
        return self._encode(image, Settings.of(settings))

    def compile(self) -> None:
        """Compile the vision encoder and the decoder with `torch.compile`; the first calls afterwards take longer."""
        self._check_open()
        self.network.vision.compile(dynamic=True)
        self.network.text.compile(dynamic=True)

    def close(self) -> None:
        """Free the weights; every later call raises."""
        if self._closed:
            return
        self._closed = True
        device = self.device
        self.network.to("meta")
        self.adapter, self._variants = None, {}
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_open(self) -> None:
        if self._closed:
            raise MoondreamError(f"the model {self.name!r} is closed; load it again")

    def _run_one(self, request: Request, encoded: dict[Any, EncodedImage | Exception]) -> Result:
        pieces = self._pieces(request, self._prefix(request, encoded))
        items = []
        while True:
            try:
                items.append(next(pieces))
            except StopIteration as stop:
                return _result(request, items, *stop.value)

    def _prefix(self, request: Request, encoded: dict[Any, EncodedImage | Exception]) -> Prefix:
        settings, image = request.settings, request.image
        if image is None:
            return empty_prefix(self.network)
        key = (image if isinstance(image, str | Path) else id(image), settings.max_crops, settings.variant)
        if key not in encoded:
            try:
                encoded[key] = self._encode(image, settings)
            except Exception as error:  # kept: the other requests on this image fail for the same reason
                encoded[key] = error
        found = encoded[key]
        if isinstance(found, Exception):
            raise found
        return found.prefix

    def _encode(self, image: Any, settings: Settings) -> EncodedImage:
        if isinstance(image, EncodedImage):
            image.check(self._key, settings.max_crops, settings.variant)
            return image
        return encode_pixels(
            self.network,
            to_rgb(image),
            max_crops=settings.max_crops,
            variant=settings.variant,
            model_key=self._key,
            lora=self._lora(settings.variant),
        )

    def _pieces(self, request: Request, prefix: Prefix) -> Generator[Any, None, tuple[bool, float | None]]:
        """Yield the pieces of a reply; return whether it was truncated, and the mean log-probability of its text."""
        network, settings, config = self.network, request.settings, self.config.tokenizer
        prompt = write_prompt(request, self.tokenizer, config)
        state = DecodingState(network, prefix, self._lora(settings.variant), len(prompt.ids) + DECODE_ROOM)
        hidden = self._feed(state, prompt)
        if isinstance(request, Detect):
            return (yield from generate_objects(network, state, hidden, settings.max_objects)), None
        if isinstance(request, Point):
            return (yield from generate_points(network, state, hidden, settings.max_objects)), None
        if isinstance(request, Gaze):
            return (yield from generate_points(network, state, hidden, 1, request.force)), None
        cut_short = False
        if isinstance(request, Query) and request.reasoning:
            between = answer_prompt(config)
            reasoning, cut_short = generate_reasoning(
                network,
                self.tokenizer,
                state,
                hidden,
                Sampler.of(settings, self.device),
                settings.max_tokens,
                reserve=len(between.ids) + ANSWER_ROOM,
            )
            yield reasoning
            hidden = self._feed(state, between)
        sampler = Sampler.of(settings, self.device)
        truncated = yield from generate_text(network, self.tokenizer, state, hidden, sampler, settings.max_tokens)
        return truncated or cut_short, sampler.mean_logprob

    def _feed(self, state: DecodingState, prompt: Prompt) -> Tensor:
        if len(prompt.ids) > state.room:
            raise ValueError(
                f"the prompt has {len(prompt.ids)} tokens, and {state.room} of the model's context of "
                f"{self.config.text.max_context} are left; shorten it"
            )
        return state.feed(prompt.embed(self.network))

    def _lora(self, variant: str | None) -> Any:
        if variant is None:
            return None if self.adapter is None else self.adapter.layers
        with self._lock:
            if variant not in self._variants:
                self._variants[variant] = load_adapter(variant, self.config, device=self.device, dtype=self.dtype)
            return self._variants[variant].layers


def _result(request: Request, items: list[Any], truncated: bool, logprob: float | None) -> Result:
    if isinstance(request, Detect):
        return DetectResult(tuple(items), truncated)
    if isinstance(request, Point):
        return PointResult(tuple(items), truncated)
    if isinstance(request, Gaze):
        return GazeResult(items[0] if items else None)
    if isinstance(request, Caption):
        return CaptionResult("".join(items), truncated, logprob)
    reasoning = items.pop(0) if request.reasoning else None
    return QueryResult("".join(items), reasoning, truncated, logprob)
