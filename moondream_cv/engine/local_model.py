"""`LocalModel`: Moondream 2 on this machine, as a `VisionModel` with the published methods."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from moondream_cv._deprecation import renamed_function
from moondream_cv.engine.autocast import without_autocast
from moondream_cv.engine.calibration import Calibration
from moondream_cv.engine.cuda_graphs import GraphPool
from moondream_cv.engine.image_cache import ImageCache, ImageKey, InFlight
from moondream_cv.engine.image_encoding import EncodedImage, encode_images, encode_tokens, reencode
from moondream_cv.engine.job_progress import count_jobs, describe_jobs
from moondream_cv.engine.model_fingerprint import fingerprint
from moondream_cv.engine.model_runner import ModelRunner
from moondream_cv.engine.preprocessing import PreprocessedImage
from moondream_cv.engine.scheduler import Limits, Scheduler, SchedulerContext
from moondream_cv.engine.structured_output import GrammarCompiler
from moondream_cv.errors import MoondreamError
from moondream_cv.images import to_rgb
from moondream_cv.model.adapters import Adapter, load_adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.padded_linear import PaddedLinear
from moondream_cv.progress import Operation
from moondream_cv.requests import ErrorResult, Request, Result, Settings
from moondream_cv.vision_model import PublishedMethods, SettingsLike

WARM_UP_CROPS = (1, 2, 13)
"""Batch sizes that `compile` warms up: torch compiles a batch of one separately."""
MAX_LOADED_ADAPTERS = 16  # 13 MB each at rank 8, for full-size weights in bfloat16


class LocalModel(PublishedMethods):
    """Moondream 2 on this machine.

    All methods may be called from several threads at the same time.

    Attributes:
        skills: Skills that the checkpoint has templates for, and gaze.
        has_scores: True: confidences come from the model's own probabilities.
        network: The network with its weights.
        config: Configuration of the checkpoint: sizes, token IDs and templates.
        tokenizer: Tokenizer of the checkpoint.
        adapter: Adapter that the model was loaded with; None: no adapter.
        calibration: Maps scores to probabilities; None if the checkpoint has no calibration.
        name: Name that the model was loaded by.
        limits: Limits on what decodes at the same time in each call; halved when memory runs out.
        image_cache: Cache of encoded images; None: images are not cached.
        graph_pool: Tensors and CUDA graphs of decode steps; None: decode steps run without graphs, as they do on a CPU.
        grammar_compiler: Compiles JSON schemas for structured output.
        show_progress: Whether `run`, `stream` and `encode_image` report the progress of calls that take longer than
            2 s.
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
        """Create a model from loaded parts. `moondream_cv.load` does it by name.

        Args:
            network: Network with weights; it is set to evaluation mode.
            tokenizer: Tokenizer of the checkpoint.
            adapter: Adapter to apply unless a request names another one.
            calibration: Maps scores to probabilities.
            name: Name for messages.
        """
        self.network = network.eval().requires_grad_(False)
        if network.device.type == "cuda" and isinstance(network.vision.patch_emb, nn.Linear):
            network.vision.set_submodule("patch_emb", PaddedLinear(network.vision.patch_emb))
        self.config, self.tokenizer, self.name = network.config, tokenizer, name
        self.adapter, self.calibration = adapter, calibration
        self.skills = frozenset({k for k, v in self.config.tokenizer.templates.items() if v is not None} | {"gaze"})
        text = self.config.text
        positions = self.config.prefix_length * text.n_layers * text.n_kv_heads * text.head_dim
        self.limits = Limits.for_prefix_size(2 * positions * self.dtype.itemsize)  # keys and values
        self.image_cache: ImageCache | None = None
        self.show_progress = True
        self.graph_pool = GraphPool.for_device(network)
        self.grammar_compiler = GrammarCompiler(tokenizer, self.config)
        self.reload: Callable[[], LocalModel] | None = None
        self._adapters: dict[str, Adapter] = {}  # least recently used first
        self._added: set[str] = set()  # adapters that have no file
        self._fingerprints: dict[str | None, str] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"LocalModel({self.name!r}, device={str(self.device)!r}, dtype={self.dtype})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: unpickling loads the model again with the same arguments.

        `calibration`, `limits`, `show_progress` and the size of `image_cache` are preserved; cached images are not.

        Raises:
            MoondreamError: The model was not loaded by name, or is closed.
        """
        self.check_open()
        if self.reload is None:
            raise MoondreamError(
                f"{self!r} cannot be pickled, because it was not loaded by name; load it with moondream_cv.load() in "
                "the process that uses it, or save its weights to a folder and load that folder"
            )
        cache = None if self.image_cache is None else (self.image_cache.max_images, self.image_cache.max_bytes)
        return _reload, (self.reload, self.name, self.calibration, self.limits, cache, self.show_progress)

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
        copied.show_progress = self.show_progress
        if self.image_cache is not None:
            copied.image_cache = ImageCache(self.image_cache.max_images, self.image_cache.max_bytes)
        return copied

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.network.dtype

    @property
    def calibrated(self) -> bool:
        """Whether confidences are calibrated, so that they estimate the share of correct boxes and points."""
        return self._calibration_of(None) is not None

    def _calibration_of(self, adapter_name: str | None) -> Calibration | None:
        """Return the calibration of scores under an adapter; None for an adapter that changes the model."""
        adapter = self.get_adapter(adapter_name)
        return self.calibration if adapter is None or adapter.is_empty else None

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests of any skills in one batch. Each distinct image is encoded once.

        Without an image cache, each conversation that has several images, or an image behind its first turn, encodes
        its images separately.

        Args:
            requests: Requests; they may have different skills, images and settings.

        Returns:
            Results in the order of the requests, with an `ErrorResult` for each request that failed.

        Raises:
            MoondreamError: The model is closed.
        """
        with self._operation("run") as operation:
            scheduler = self._scheduler(operation)
            jobs = [scheduler.submit(request) for request in requests]
            if len(jobs) > 1:
                operation.prefix = partial(count_jobs, jobs)
            describe = partial(describe_jobs, jobs)
            while scheduler.step():
                operation.update("Decoding", detail=describe)
        return [job.result for job in jobs if job.result is not None]

    def stream(self, request: Request) -> Iterator[Any]:
        """Stream one reply: text word by word, objects and points one by one.

        If the request asks for reasoning, the complete reasoning is the first piece, as a `Reasoning`. The first piece
        is computed before the call returns, so that most errors are raised by the call and not by the iterator.

        Args:
            request: Request to answer.

        Raises:
            ImageError: The image cannot be read.
            ValueError: The prompt is longer than the model's context.
        """
        pieces = self._pieces(request)
        first = next(pieces, None)
        return iter(()) if first is None else itertools.chain((first,), pieces)

    def scheduler(self) -> Scheduler:
        """Create a scheduler for continuous batching: requests can be submitted while others are decoding.

        The scheduler shares the weights, `limits` and `image_cache` with other calls.

        Raises:
            MoondreamError: The model is closed.
        """
        return self._scheduler(None)

    def _scheduler(self, operation: Operation | None) -> Scheduler:
        """Create a scheduler whose image encodings are reported to an operation."""
        self.check_open()
        context = SchedulerContext(
            config=self.config,
            tokenizer=self.tokenizer,
            grammar_compiler=self.grammar_compiler,
            calibration=self._calibration_of,
            fingerprint=self.fingerprint,
            clear_image_cache=self._clear_image_cache,
            check_open=self.check_open,
        )
        encode = partial(self.encode_arrays, operation=operation)
        runner = ModelRunner(self.network, self.get_adapter, encode, self.graph_pool)
        return Scheduler(runner, context, self.limits)

    def encode_image(
        self,
        image: Any,
        settings: SettingsLike = None,
        previous: EncodedImage | None = None,
        tolerance: float = 0.0,
    ) -> EncodedImage:
        """Encode an image, so that several requests can reuse it.

        Args:
            image: Any image that `moondream_cv.images.to_rgb` accepts: a BGR array, a PIL image, a path, bytes. An
                image that this model has already encoded is returned unchanged.
            settings: Settings, of which `max_crops` and `variant` apply.
            previous: An earlier frame of the same camera. Only crops that have changed since then are encoded. A frame
                of another size is ignored.
            tolerance: Maximum difference, in gray levels, for a crop to count as unchanged; use slightly more than the
                standard deviation of the camera's noise. 0: only identical crops are unchanged.

        Raises:
            ImageError: The image cannot be read.
            ValueError: A setting is out of range, or differs from the one that `image` or `previous` was encoded with.
        """
        self.check_open()
        checked = Settings.of(settings)
        max_crops, adapter_name = self.max_crops(checked), checked.variant
        if isinstance(image, EncodedImage):
            image.check(self.fingerprint(adapter_name), checked.max_crops, adapter_name)
            return image
        with self._operation("encode_image") as operation:
            if previous is None:
                frame = image if isinstance(image, PreprocessedImage) else to_rgb(image)
                return self.encode_arrays([frame], max_crops, adapter_name, operation)[0]
            rgb = image.rgb if isinstance(image, PreprocessedImage) else to_rgb(image)
            with without_autocast(self.device):
                options = self._encode_options(checked.max_crops, adapter_name, operation)
                return reencode(self.network, rgb, previous, tolerance, **options)

    def preprocess_image(self, image: Any, settings: SettingsLike = None) -> PreprocessedImage:
        """Read an image and cut it into crops, without running the network.

        It can run in any thread, so that the thread that runs the network has less to do.

        Args:
            image: Any image that `encode_image` accepts. It may be modified afterwards.
            settings: Settings, of which `max_crops` applies.

        Raises:
            ImageError: The image cannot be read.
            ValueError: A setting is out of range.
        """
        if isinstance(image, PreprocessedImage):
            return image
        return self.preprocess_array(to_rgb(image), Settings.of(settings))

    prepare_image = renamed_function("LocalModel.prepare_image", "LocalModel.preprocess_image", preprocess_image)

    def preprocess_array(self, rgb: np.ndarray, settings: Settings) -> PreprocessedImage:
        """Cut an RGB array into crops, as `preprocess_image` does.

        Args:
            rgb: [H, W, 3] uint8 RGB; it must not be modified afterwards.
            settings: Settings, of which `max_crops` applies.
        """
        self.check_open()
        preprocessed = PreprocessedImage(rgb, self.config.vision, self.max_crops(settings))
        if self.image_cache is not None:
            preprocessed.digest  # noqa: B018 - computes it here, not in the thread that looks it up in the cache
        return preprocessed

    def compile(self) -> float:
        """Compile the vision encoder with `torch.compile`, and capture CUDA graphs of decode steps, on a CUDA device.

        Without this call, the encoder is not compiled, and graphs are captured when requests first need them. Answers
        change only by rounding.

        Returns:
            Duration in seconds. Later calls with other numbers of crops do not compile again.

        Raises:
            MoondreamError: The device is not a CUDA device, or the model is closed.
        """
        self.check_open()
        if self.device.type != "cuda":
            raise MoondreamError(
                f"compile() needs a CUDA device, and this model is on {str(self.device)!r}; omit the call, since "
                "compiling takes more than a minute on a CPU and saves little time"
            )
        duration = self._compile_encoder()
        start = time.perf_counter()
        if self.graph_pool is not None:
            self.graph_pool.warm_up(self.get_adapter(None))
        return duration + time.perf_counter() - start

    def _compile_encoder(self, **options: Any) -> float:
        """Compile the vision encoder for any number of crops.

        Args:
            options: Options of `torch.compile`.

        Returns:
            Duration in seconds.
        """
        start = time.perf_counter()
        self.network.vision.compile(dynamic=True, **options)
        size = self.config.vision.crop_size
        with torch.inference_mode(), without_autocast(self.device):
            for count in WARM_UP_CROPS:
                crops = torch.zeros(count, 3, size, size, device=self.device, dtype=self.dtype)
                self.network.vision(crops).sum().item()  # waits for the device
        return time.perf_counter() - start

    def close(self) -> None:
        """Free the weights. Every later call raises a `MoondreamError`."""
        if self._closed:
            return
        self._closed = True
        device = self.device
        self.grammar_compiler.close()
        self.network.to("meta")
        self.adapter, self._adapters, self._added = None, {}, set()
        if self.image_cache is not None:
            self.image_cache.clear()
        if self.graph_pool is not None:
            self.graph_pool.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def check_open(self) -> None:
        """Raise a `MoondreamError` if the model is closed."""
        if self._closed:
            raise MoondreamError(f"the model {self.name!r} is closed; load it again")

    def get_adapter(self, name: str | None) -> Adapter | None:
        """Return an adapter, which is loaded on first use. The 16 adapters that were used last stay in memory.

        Args:
            name: File or ID of the adapter; None: the one that the model was loaded with, if any.

        Raises:
            CheckpointError: The adapter is missing or does not fit.
        """
        if name is None:
            return self.adapter
        with self._lock:
            adapter = self._adapters.pop(name, None)
            if adapter is None:
                adapter = load_adapter(name, self.config, device=self.device, dtype=self.dtype)
                loaded = [other for other in self._adapters if other not in self._added]
                for other in loaded[: max(0, len(loaded) + 1 - MAX_LOADED_ADAPTERS)]:
                    del self._adapters[other]
                    self._fingerprints.pop(other, None)
            self._adapters[name] = adapter
            return adapter

    def add_adapter(self, adapter: Adapter) -> None:
        """Make an adapter available under its name, as `Settings.variant`.

        Args:
            adapter: Adapter on the device and in the data type of the model. Another adapter with the same name is
                replaced for later requests.
        """
        with self._lock:
            self._adapters[adapter.name] = adapter
            self._added.add(adapter.name)
            self._fingerprints.pop(adapter.name, None)

    def remove_adapter(self, name: str) -> None:
        """Free an adapter. A later request loads it again by its name.

        Args:
            name: Name of the adapter; nothing happens if it is not loaded.
        """
        with self._lock:
            self._adapters.pop(name, None)
            self._added.discard(name)
            self._fingerprints.pop(name, None)

    def fingerprint(self, adapter_name: str | None = None) -> str:
        """Return 32 hexadecimal digits that identify the weights, their dtype and an adapter.

        Models of the same checkpoint have the same fingerprint in every process and on every device. The fingerprint is
        computed once; later changes of the weights do not affect it.

        Args:
            adapter_name: Name of the adapter; None: the one that the model was loaded with, if any.

        Raises:
            CheckpointError: The adapter is missing or does not fit.
        """
        adapter = self.get_adapter(adapter_name)
        with self._lock:
            if adapter_name not in self._fingerprints:
                self._fingerprints[adapter_name] = fingerprint(self.network, adapter)
            return self._fingerprints[adapter_name]

    def max_crops(self, settings: Settings) -> int:
        """Return the maximum number of local crops of an image; by default the number the model was trained with."""
        return settings.max_crops or self.config.vision.max_crops

    def encode_arrays(
        self,
        frames: Sequence[np.ndarray | PreprocessedImage],
        max_crops: int | None,
        adapter_name: str | None,
        operation: Operation | None = None,
    ) -> list[EncodedImage]:
        """Encode images, or return them from the image cache.

        Args:
            frames: Each [H, W, 3] uint8 RGB, or preprocessed.
            max_crops: Maximum number of local crops of an image; None: the number the model was trained with.
            adapter_name: Adapter to encode the images with.
            operation: Receives the progress.
        """
        with without_autocast(self.device):
            options = self._encode_options(max_crops or self.config.vision.max_crops, adapter_name, operation)
            return self._encode_arrays(frames, options)

    def encode_tokens(self, embedding: Tensor, size: tuple[int, int], adapter_name: str | None) -> EncodedImage:
        """Encode image tokens that were encoded before, without running the vision encoder.

        Args:
            embedding: [num_patches, dim] image tokens, `EncodedImage.embedding`.
            size: (width, height) of the image in pixels.
            adapter_name: Adapter of the requests on the image.
        """
        with without_autocast(self.device):
            return encode_tokens(
                self.network,
                embedding,
                size,
                adapter_name=adapter_name,
                adapter=self.get_adapter(adapter_name),
                fingerprint=self.fingerprint(adapter_name),
            )

    def _encode_arrays(
        self, frames: Sequence[np.ndarray | PreprocessedImage], options: dict[str, Any]
    ) -> list[EncodedImage]:
        cache = self.image_cache
        if cache is None:
            return encode_images(self.network, frames, **options)
        keys = [cache.key(frame, options["max_crops"], options["adapter_name"]) for frame in frames]
        by_key = dict(zip(keys, frames, strict=True))
        found: dict[ImageKey, EncodedImage] = {}
        owned: dict[ImageKey, InFlight] = {}
        others: dict[ImageKey, InFlight] = {}
        try:
            # Look up the images
            for key in by_key:
                entry, is_owner = cache.get_or_start(key)
                if isinstance(entry, EncodedImage):
                    found[key] = entry
                else:
                    (owned if is_owner else others)[key] = entry
            # Encode the missing ones
            encoded = encode_images(self.network, [by_key[key] for key in owned], **options)
            for key, one in zip(owned, encoded, strict=True):
                found[key] = one
                cache.put(key, one)
        finally:
            cache.abandon(owned)
        # Wait for images that other threads encode; encode those that they abandon
        for key, other in others.items():
            found[key] = other.result() or self._encode_arrays([by_key[key]], options)[0]
        return [found[key] for key in keys]

    def _encode_options(
        self, max_crops: int | None, adapter_name: str | None, operation: Operation | None
    ) -> dict[str, Any]:
        """Return the keyword arguments of `encode_images` and `reencode`."""
        return {
            "max_crops": max_crops,
            "adapter_name": adapter_name,
            "adapter": self.get_adapter(adapter_name),
            "fingerprint": self.fingerprint(adapter_name),
            "operation": operation,
        }

    def _operation(self, name: str) -> Operation:
        return Operation(f"{name} on {self.name or 'the model'}", is_enabled=self.show_progress)

    def _clear_image_cache(self) -> bool:
        """Drop all cached images and return whether there were any."""
        if self.image_cache is None or not len(self.image_cache):
            return False
        self.image_cache.clear()
        return True

    def _pieces(self, request: Request) -> Iterator[Any]:
        with self._operation("stream") as operation:
            scheduler = self._scheduler(operation)
            job = scheduler.submit(request)
            describe = partial(describe_jobs, [job])
            is_running = True
            pieces: list[Any] = []
            while is_running and not pieces:
                is_running = scheduler.step()
                operation.update("Decoding", detail=describe)
                pieces = job.take()
        yield from pieces  # without progress: the caller displays the pieces
        while is_running:
            is_running = scheduler.step()
            yield from job.take()
        if isinstance(job.result, ErrorResult):
            raise job.result.error


def _reload(
    load: Callable[[], LocalModel],
    name: str,
    calibration: Calibration | None,
    limits: Limits,
    cache: tuple[int, int] | None,
    show_progress: bool,
) -> LocalModel:
    """Recreate a pickled model."""
    model = load()
    model.show_progress = show_progress
    model.name, model.calibration, model.limits = name, calibration, limits
    model.image_cache = None if cache is None else ImageCache(*cache)
    return model
