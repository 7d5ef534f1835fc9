"""`LocalModel`: Moondream 2 on this machine, as a `VisionModel` with the published methods."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from moondream_cv.engine.autocast import without_autocast
from moondream_cv.engine.calibration import Calibration
from moondream_cv.engine.encoding import EncodedImage, encode_images, reencode
from moondream_cv.engine.fingerprint import fingerprint
from moondream_cv.engine.image_cache import Coming, ImageCache, ImageKey
from moondream_cv.engine.preprocessing import PreparedImage
from moondream_cv.engine.scheduler import Limits, Scheduler
from moondream_cv.engine.structured_output import GrammarCompiler
from moondream_cv.errors import MoondreamError
from moondream_cv.images import to_rgb
from moondream_cv.model.adapters import Adapter, load_adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import LayerLora
from moondream_cv.requests import ErrorResult, Request, Result, Settings
from moondream_cv.vision_model import PublishedMethods, SettingsLike

WARM_UP_CROPS = (1, 2, 13)
"""Numbers of crops that are compiled at once: torch compiles a single one separately from several."""


class LocalModel(PublishedMethods):
    """Moondream 2 on this machine.

    Calls from several threads are safe: a call keeps its state to itself.

    Attributes:
        skills: What the checkpoint has templates for, and gaze.
        has_scores: True: confidences come from the model's own probabilities.
        network: The weights.
        config: Their sizes, token ids and templates.
        tokenizer: Text to token ids and back.
        calibration: What turns scores into probabilities, where the checkpoint came with it.
        limits: How much decodes at a time in each call; halved where memory runs out.
        image_cache: Keeps encoded images for when they come again; None keeps none.
        grammar_compiler: Compiles JSON schemas for structured output.
        reload: Loads the model again, for pickle; None if the model was not loaded by name.
    """

    has_scores = True

    def __init__(
        self,
        network: MoondreamNetwork,
        tokenizer: Tokenizer,
        *,
        adapter: Adapter | None = None,
        calibration: Calibration | None = None,
        name: str = "",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config, self.tokenizer, self.name = network.config, tokenizer, name
        self.adapter, self.calibration = adapter, calibration
        self.skills = frozenset({k for k, v in self.config.tokenizer.templates.items() if v is not None} | {"gaze"})
        text = self.config.text
        positions = self.config.prefix_length * text.n_layers * text.n_kv_heads * text.head_dim
        self.limits = Limits.of(2 * positions * self.dtype.itemsize)  # keys and values
        self.image_cache: ImageCache | None = None
        self.grammar_compiler = GrammarCompiler(tokenizer, self.config)
        self.reload: Callable[[], LocalModel] | None = None
        self._variants: dict[str, Adapter] = {}
        self._fingerprints: dict[str | None, str] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"LocalModel({self.name!r}, device={str(self.device)!r}, dtype={self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: the process that unpickles the model loads it with the same arguments.

        `calibration`, `limits` and the size of `image_cache` come along; cached images do not.

        Raises:
            MoondreamError: The model was not loaded by name, or is closed.
        """
        self.check_open()
        if self.reload is None:
            raise MoondreamError(
                f"{self!r} cannot be pickled, because it was not loaded by name: load it with moondream_cv.load() in "
                "the process that uses it, or save its weights to a folder and load that"
            )
        cache = None if self.image_cache is None else (self.image_cache.max_images, self.image_cache.max_bytes)
        return _reload, (self.reload, self.name, self.calibration, self.limits, cache)

    def __copy__(self) -> LocalModel:
        """Return a model that shares everything with this one."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalModel:
        """Return a model with separate weights.

        Raises:
            MoondreamError: The model is closed.
        """
        self.check_open()
        copied = LocalModel(
            copy.deepcopy(self.network, memo),
            self.tokenizer,
            adapter=copy.deepcopy(self.adapter, memo),
            calibration=self.calibration,
            name=self.name,
        )
        copied.limits, copied.reload = replace(self.limits), self.reload
        if self.image_cache is not None:
            copied.image_cache = ImageCache(self.image_cache.max_images, self.image_cache.max_bytes)
        return copied

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

    @property
    def calibrated(self) -> bool:
        """Whether confidences have been fitted to how often such boxes and points are right."""
        return self.calibration is not None and self.adapter is None

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run any mix of requests together; each distinct image is encoded once.

        Returns:
            Results in the order of the requests, an `ErrorResult` in the place of one that failed.

        Raises:
            MoondreamError: The model is closed.
        """
        scheduler = self.scheduler()
        jobs = [scheduler.submit(request) for request in requests]
        while scheduler.step():
            pass
        return [job.result for job in jobs if job.result is not None]

    def stream(self, request: Request) -> Iterator[Any]:
        """Give one reply in pieces: text word by word, objects and points one by one.

        The reasoning of a question, where it is asked for, is complete before the iterator is returned: it is the first
        piece, as a `Reasoning`. Everything up to the first piece is computed at the call, so that errors are raised
        there and not in the loop that reads the iterator.

        Raises:
            ImageError: The image cannot be read.
            ValueError: The prompt is longer than the model's context.
        """
        pieces = self._pieces(request)
        first = next(pieces, None)
        return iter(()) if first is None else itertools.chain((first,), pieces)

    def scheduler(self) -> Scheduler:
        """A scheduler of requests on this model, for a program that takes more of them while others are decoding.

        What it shares with other calls is the weights, `limits` and `image_cache`.

        Raises:
            MoondreamError: The model is closed.
        """
        self.check_open()
        return Scheduler(self, self.limits)

    def encode_image(
        self,
        image: Any,
        settings: SettingsLike = None,
        previous: EncodedImage | None = None,
        tolerance: float = 0.0,
    ) -> EncodedImage:
        """Encode an image once, to ask about it many times.

        Args:
            image: Anything that `moondream_cv.images.to_rgb` takes: a BGR array, a PIL image, a path, bytes. An image
                that this model has encoded already is given back.
            settings: `max_crops` and `variant` count here.
            previous: An earlier frame of the same camera: only those parts are computed anew that have changed. One of
                another size is of no use, and does no harm.
            tolerance: How far, in grey levels, a part may differ from `previous` and still count as unchanged; a little
                above the standard deviation of the camera's noise is enough. 0: not at all.

        Raises:
            ImageError: The image cannot be read.
            ValueError: The settings are out of range, or differ from those that `image` or `previous` was encoded with.
        """
        self.check_open()
        checked = Settings.of(settings)
        if isinstance(image, EncodedImage):
            image.check(self.fingerprint(checked.variant), checked.max_crops, checked.variant)
            return image
        if isinstance(image, PreparedImage) and previous is None:
            return self.encode_arrays([image], checked)[0]
        frame = image.rgb if isinstance(image, PreparedImage) else to_rgb(image)
        if previous is None:
            return self.encode_arrays([frame], checked)[0]
        with without_autocast(self.device):
            return reencode(self.network, frame, previous, tolerance, **self._encoding(checked))

    def prepare_image(self, image: Any, settings: SettingsLike = None) -> PreparedImage:
        """Do for an image what takes no network, in any thread, so that the calls that follow have less to do.

        Args:
            image: As in `encode_image`; it may change afterwards.
            settings: `max_crops` counts here.

        Raises:
            ImageError: The image cannot be read.
            ValueError: The settings are out of range.
        """
        if isinstance(image, PreparedImage):
            return image
        return self.prepare_array(to_rgb(image), Settings.of(settings))

    def prepare_array(self, rgb: np.ndarray, settings: Settings) -> PreparedImage:
        """As `prepare_image`, of an [H, W, 3] uint8 RGB array that does not change afterwards."""
        self.check_open()
        prepared = PreparedImage(rgb, self.config.vision, self.max_crops(settings))
        if self.image_cache is not None:
            prepared.digest  # noqa: B018 - so that it is there when the cache is looked into
        return prepared

    def compile(self) -> float:
        """Compile the vision encoder with `torch.compile` and warm it up, on a CUDA device.

        The decoder stays as it is: its sequences and caches change their shapes from step to step, and each new shape
        would be compiled again. Answers change by rounding only.

        Returns:
            Seconds that the warm-up took; later calls with other numbers of crops compile nothing more.

        Raises:
            MoondreamError: The device is not a CUDA device, or the model is closed.
        """
        self.check_open()
        if self.device.type != "cuda":
            raise MoondreamError(
                f"compile() needs a CUDA device, and this model is on {str(self.device)!r}: on a CPU, compiling takes "
                "more than a minute and saves little afterwards. Leave the call out"
            )
        return self._compile_encoder()

    def _compile_encoder(self, **options: Any) -> float:
        """Compile the encoder for any number of crops; `options` are those of `torch.compile`."""
        start = time.perf_counter()
        self.network.vision.compile(dynamic=True, **options)
        size = self.config.vision.crop_size
        with torch.inference_mode(), without_autocast(self.device):
            for count in WARM_UP_CROPS:
                crops = torch.zeros(count, 3, size, size, device=self.device, dtype=self.dtype)
                self.network.vision(crops).sum().item()  # waits for the device
        return time.perf_counter() - start

    def close(self) -> None:
        """Free the weights; every later call raises."""
        if self._closed:
            return
        self._closed = True
        device = self.device
        self.grammar_compiler.close()
        self.network.to("meta")
        self.adapter, self._variants = None, {}
        if self.image_cache is not None:
            self.image_cache.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def check_open(self) -> None:
        """Raise a `MoondreamError` if the model is closed."""
        if self._closed:
            raise MoondreamError(f"the model {self.name!r} is closed; load it again")

    def lora(self, variant: str | None) -> Sequence[LayerLora] | None:
        """The layers of an adapter, which is loaded where it is first asked for; None is the model's own, if any.

        Raises:
            CheckpointError: It is missing or does not fit.
        """
        if variant is None:
            return None if self.adapter is None else self.adapter.layers
        with self._lock:
            if variant not in self._variants:
                self._variants[variant] = load_adapter(variant, self.config, device=self.device, dtype=self.dtype)
            return self._variants[variant].layers

    def fingerprint(self, variant: str | None = None) -> str:
        """Return 32 hexadecimal digits that identify the weights, their dtype and an adapter.

        Models of the same checkpoint have the same fingerprint in every process, also on different devices. Changes of
        the weights after the first call are not seen.

        Args:
            variant: The adapter; None: the one that the model was loaded with, if any.

        Raises:
            CheckpointError: The adapter is missing or does not fit.
        """
        lora = self.lora(variant)
        with self._lock:
            if variant not in self._fingerprints:
                self._fingerprints[variant] = fingerprint(self.network, lora)
            return self._fingerprints[variant]

    def max_crops(self, settings: Settings) -> int:
        """Local crops of an image at the most; without a setting, as many as the model was trained with."""
        return settings.max_crops or self.config.vision.max_crops

    def encode_arrays(self, frames: Sequence[np.ndarray | PreparedImage], settings: Settings) -> list[EncodedImage]:
        """Encode [H, W, 3] uint8 RGB arrays or prepared images with the same settings, but for those that are kept."""
        with without_autocast(self.device):
            return self._encode_arrays(frames, settings)

    def _encode_arrays(self, frames: Sequence[np.ndarray | PreparedImage], settings: Settings) -> list[EncodedImage]:
        cache = self.image_cache
        if cache is None:
            return encode_images(self.network, frames, **self._encoding(settings))
        keys = [cache.key(frame, self.max_crops(settings), settings.variant) for frame in frames]
        by_key = dict(zip(keys, frames, strict=True))
        found: dict[ImageKey, EncodedImage] = {}
        mine: dict[ImageKey, Coming] = {}
        others: dict[ImageKey, Coming] = {}
        try:
            for key in by_key:
                claimed, is_mine = cache.claim(key)
                if isinstance(claimed, EncodedImage):
                    found[key] = claimed
                else:
                    (mine if is_mine else others)[key] = claimed
            encoded = encode_images(self.network, [by_key[key] for key in mine], **self._encoding(settings))
            for key, one in zip(mine, encoded, strict=True):
                found[key] = one
                cache.put(key, one)
        finally:
            cache.give_up(mine)
        for key, coming in others.items():  # another thread is at it, or has given up
            found[key] = coming.result() or self.encode_arrays([by_key[key]], settings)[0]
        return [found[key] for key in keys]

    def _encoding(self, settings: Settings) -> dict[str, Any]:
        """What encoding depends on beside the frame."""
        variant = settings.variant
        return {
            "max_crops": settings.max_crops,
            "variant": variant,
            "model_key": self.fingerprint(variant),
            "lora": self.lora(variant),
        }

    def _pieces(self, request: Request) -> Iterator[Any]:
        scheduler = self.scheduler()
        job = scheduler.submit(request)
        going_on = True
        while going_on:
            going_on = scheduler.step()
            yield from job.take()
        if isinstance(job.result, ErrorResult):
            raise job.result.error


def _reload(
    load: Callable[[], LocalModel],
    name: str,
    calibration: Calibration | None,
    limits: Limits,
    cache: tuple[int, int] | None,
) -> LocalModel:
    """Make a model from its pickle."""
    model = load()
    model.name, model.calibration, model.limits = name, calibration, limits
    model.image_cache = None if cache is None else ImageCache(*cache)
    return model
