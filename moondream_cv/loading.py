"""Load models by name: `load("moondream2")`, `load("tiny")`, `load("./folder")`, `load("repo/name@revision")`.

`open_model` also accepts the URL of a server and passes it to `connect`, without importing torch.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moondream_cv.backends.dialects import connect
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import CheckpointError
from moondream_cv.model.hub import hub_cache
from moondream_cv.model.releases import DEFAULT_REPO, DEFAULT_REVISION, find_release, known_releases
from moondream_cv.model.variants import FINETUNE_MODELS
from moondream_cv.progress import Operation
from moondream_cv.urls import is_url, shown_url

if TYPE_CHECKING:
    import torch

    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.model.config import MoondreamConfig
    from moondream_cv.model.hardware import Precision
    from moondream_cv.model.sources import Source
    from moondream_cv.vision_model import VisionModel

__all__ = [
    "check_name",
    "choose_device",
    "choose_dtype",
    "connect",
    "download",
    "find_source",
    "is_url",
    "load",
    "open_model",
    "quantize",
]

logger = logging.getLogger(__name__)

Fetched = TypeVar("Fetched")

ALIASES = {"moondream2": f"{DEFAULT_REPO}@{DEFAULT_REVISION}"}
TINY = "tiny"
DTYPES = ("float32", "bfloat16", "float16")
_REPO = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_TUNED = re.compile(rf"(?:{'|'.join(FINETUNE_MODELS)})/([A-Za-z0-9]{{26}}@\d{{1,9}})")
_has_logged_tiny = False
_has_warned_of_threads = False


def load(
    name: str | os.PathLike[str] = "moondream2",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    cache_images: int = 0,
    cache_bytes: int = 4 * 2**30,
) -> LocalModel:
    """Load a model on this machine.

    Args:
        name: "moondream2" (`vikhyatk/moondream2@2025-06-21`); "tiny", the embedded demonstration model; a repository on
            the hub, "repo/name@revision"; a local folder, or a file with weights. For a folder whose `config.json` has
            no sizes, the release can be specified: "folder@2025-04-14". "moondream2/ID@STEP" is "moondream2" with the
            adapter "ID@STEP".
        device: "cuda", "cuda:1", "mps", "cpu" or a `torch.device`; None: the best available device.
        dtype: "float32", "bfloat16", "float16" or a `torch.dtype`; None: bfloat16 if the hardware supports it, or else
            float16 on GPUs and float32 on CPUs. On CPUs, small models run in float32.
        quantize: Quantization of the linear layers of the encoder and the decoder, "int8" or "int4"; embeddings, norms
            and region heads keep full precision. None: as in the checkpoint. If `dtype` is None as well and the weights
            do not fit into the free memory of the CPU, they are quantized to int8, with a warning.
        adapter: A `.pt` or `.safetensors` file, a folder in PEFT's layout, "ID@STEP" of a finetune on this machine, or
            the ID of a published adapter.
        cache_images: Number of encoded images to cache (least recently used), by the content of their pixels.
        cache_bytes: Maximum total size of the cached images in bytes; an image of Moondream 2 takes about 160 MB in
            bfloat16.

    Returns:
        The model. It is pickled by name: spawned processes load it again with the same arguments.

    Raises:
        CheckpointError: The name is unknown; or the checkpoint, its tokenizer or the adapter is missing, damaged, does
            not fit, or cannot be fetched.
        ValueError: The device is not available, an argument is out of range, or the checkpoint is quantized in another
            mode.
    """
    from moondream_cv.engine.calibration import Calibration
    from moondream_cv.engine.image_cache import ImageCache
    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.model.adapters import find_adapter, load_adapter
    from moondream_cv.model.checkpoints import load_network
    from moondream_cv.model.packed_linear import pack_weights
    from moondream_cv.model.quantization import check_mode

    # Find the adapter and the checkpoint
    check_mode(quantize)
    target = choose_device(device)
    if isinstance(name, str) and (tuned := _TUNED.fullmatch(name)) is not None:
        if adapter is not None:
            raise ValueError(f"adapter must be None for the checkpoint of a finetune, got {name!r} and {adapter!r}")
        name, adapter = "moondream2", tuned[1]
    if adapter is not None:
        find_adapter(os.fspath(adapter))  # raises before the weights are downloaded
    source = find_source(name)
    precision = _choose_precision(source, target, dtype, quantize)
    chosen = precision.dtype
    tokenizer = source.tokenizer()

    # Load the weights
    with Operation(f"load of {os.fspath(name)}") as operation:
        network = load_network(source.weights, source.config, target, chosen, precision.quantize, operation)
        pack_weights(network, operation)
    loaded = None if adapter is None else load_adapter(os.fspath(adapter), source.config, target, chosen)
    calibration = Calibration.from_folder(source.folder)
    model = LocalModel(network, tokenizer, adapter=loaded, calibration=calibration, name=os.fspath(name))
    if cache_images:
        model.image_cache = ImageCache(cache_images, cache_bytes)
    _log_loaded(model)
    model.reload = functools.partial(
        load,
        _permanent_name(name) if source.origin is None else source.origin,
        device=device,
        dtype=chosen,  # a spawned process has less free memory, and must not choose another data type or int8
        quantize=precision.quantize,
        adapter=None if adapter is None else _permanent_path(adapter),
    )
    return model


def _choose_precision(
    source: Source, device: torch.device, dtype: str | torch.dtype | None, quantize: str | None
) -> Precision:
    """Return the data type and the quantization of a model; those that are not specified are chosen."""
    from moondream_cv.model.checkpoints import stored_quantization, weight_shapes
    from moondream_cv.model.hardware import Precision, choose_precision, probe_cpu

    if device.type != "cpu" or dtype is not None or quantize is not None:
        return Precision(choose_dtype(dtype, device, source.config), quantize)
    if stored_quantization(source.weights) is not None:
        return Precision(choose_dtype(None, device, source.config))
    values = sum(math.prod(shape) for shape in weight_shapes(source.config).values())
    precision = choose_precision(source.config.text.dim, values, probe_cpu())
    if precision.warning is not None:
        logger.warning("%s", precision.warning)
    return precision


def _log_loaded(model: LocalModel) -> None:
    """Log the device, data type, memory and expected speed of a model, at level DEBUG for small models."""
    from moondream_cv.model.hardware import gigabytes, is_small, probe_cpu, thread_warning
    from moondream_cv.model.quantized_linear import quantization_of, weight_bytes
    from moondream_cv.model.speed_estimate import estimate_speed

    global _has_warned_of_threads
    mode = quantization_of(model.network)
    parts = [
        f"{model.name} on {model.device}: {str(model.dtype).removeprefix('torch.')}",
        *([] if mode is None else [f"{mode} weights"]),
        gigabytes(weight_bytes(model.network)),
    ]
    if is_small(model.config.text.dim):
        logger.debug("%s", ", ".join(parts))
        return
    if model.device.type == "cpu":
        estimate = estimate_speed(model.network)
        parts.append(f"about {estimate.encode_seconds:.2g} s to encode a 640x480 image")
        parts.append(f"{estimate.class_seconds:.2g} s for a class with 3 objects")
        warning = thread_warning(probe_cpu())
        if warning is not None and not _has_warned_of_threads:
            _has_warned_of_threads = True
            logger.warning("%s", warning)
    logger.info("%s", ", ".join(parts))


def _permanent_name(name: str | os.PathLike[str]) -> str:
    """Return a name for the same model in another process, which may run in another folder."""
    text = os.fspath(name)
    if isinstance(name, str) and (name == TINY or name.partition("@")[0] in ALIASES):
        return name
    if _existing(text) is not None:
        return _permanent_path(name)
    stem, at, release = text.rpartition("@")
    return f"{_permanent_path(stem)}@{release}" if at and _existing(stem) is not None else text


def _permanent_path(name: str | os.PathLike[str]) -> str:
    """Return the absolute path of an existing file or folder; other names are returned unchanged."""
    path = _existing(os.fspath(name))
    return os.fspath(name) if path is None else str(path.absolute())


def open_model(name: str | os.PathLike[str], device: str | None = None) -> VisionModel:
    """Load a model by name, or connect to a server.

    Args:
        name: Name as in `load`, or the URL of a server as in `connect`.
        device: Device to load the model on; None: the best available device. Must be None for a server.

    Raises:
        MoondreamError: The model cannot be loaded, or the server cannot be used.
        ValueError: The device is not available, or is given for a server.
    """
    if not is_url(name):
        return load(name, device=device)
    if device is not None:
        raise ValueError(f"device must be None for the URL of a server, got {device!r}")
    return connect(os.fspath(name))


def download(name: str | os.PathLike[str], to: str | os.PathLike[str] | None = None) -> Path:
    """Download all files that `load(name)` needs, so that it works offline afterwards.

    Cached releases and branches are compared with the hub.

    Args:
        name: Name as in `load`, or a repository that contains only a tokenizer, such as "moondream/starmie-v1@main".
        to: Folder for weights, config and tokenizer, to load on a machine without a network; None: the cache of the
            hub.

    Returns:
        The folder with the weights, or with the tokenizer.

    Raises:
        CheckpointError: The name is unknown, the files cannot be fetched or are not supported, or the folder cannot be
            written.
    """
    from moondream_cv.model.export import download_from_hub, export

    target = None if to is None else Path(to).expanduser()
    found = _local_or_repo(name)
    if isinstance(found, tuple):
        return _fetching(name, lambda: download_from_hub(*found, to=target), found[1])
    if target is not None:
        return export(found, target)
    found.tokenizer()
    return found.folder


def quantize(name: str | os.PathLike[str], to: str | os.PathLike[str], mode: str = "int8") -> Path:
    """Write a quantized checkpoint: a folder that `load` opens without the weights in full precision.

    Args:
        name: Name as in `load`, of a checkpoint in full precision.
        to: Folder to write; it must not exist.
        mode: "int8" or "int4".

    Returns:
        The folder.

    Raises:
        CheckpointError: The name is unknown, the checkpoint is already quantized or cannot be fetched, or the folder
            exists or cannot be written.
        ValueError: The mode is unknown.
    """
    from moondream_cv.model.quantization import MODES
    from moondream_cv.model.quantized_export import export_quantized

    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    target = Path(to).expanduser()
    if target.exists():  # before a download
        raise CheckpointError(f"{target} already exists; give a new folder")
    with Operation(f"quantization of {os.fspath(name)}") as operation:
        return export_quantized(find_source(name), target, mode, operation)


def find_source(name: str | os.PathLike[str]) -> Source:
    """Return the source of a model. Its files are downloaded if they are not on this machine.

    Args:
        name: Name as in `load`.

    Raises:
        CheckpointError: The name is unknown, or the checkpoint cannot be fetched or is not supported.
        ValueError: The name is the URL of a server.
    """
    from moondream_cv.model.sources import hub_source

    found = _local_or_repo(name)
    if not isinstance(found, tuple):
        return found
    return _fetching(name, lambda: hub_source(*found), found[1])


def _fetching(name: str | os.PathLike[str], fetch: Callable[[], Fetched], revision: str | None) -> Fetched:
    """Fetch from the hub. Errors mention that the name may be a misspelled folder."""
    try:
        return fetch()
    except CheckpointError as error:
        if revision is not None:
            raise
        raise CheckpointError(
            f"there is no folder {os.fspath(name)!r}, so the hub was searched for the name: {error}"
        ) from error


def check_name(name: str | os.PathLike[str]) -> None:
    """Check a name for `open_model`, without using the network and without loading the model.

    Args:
        name: Name of a model, or the URL of a server.

    Raises:
        CheckpointError: The name is unknown, or the model is not supported.
        ValueError: The URL cannot be that of a server.
    """
    from moondream_cv.model.sources import release_of

    if is_url(name):
        ServerURL.parse(os.fspath(name))
        return
    found = _local_or_repo(name)
    if isinstance(found, tuple):
        release_of(*found)


def _local_or_repo(name: str | os.PathLike[str]) -> Source | tuple[str, str | None]:
    """Return the source of a local model, or the repository and the revision of a name on the hub."""
    text = os.fspath(name)
    if not isinstance(text, str) or not text.strip():
        raise CheckpointError(f"the name of a model must not be empty, got {text!r}; {_accepted()}")
    if is_url(text):
        raise ValueError(
            f"the name of a model must be a folder or repo@revision, got the URL {shown_url(text)!r}; use connect(url) "
            "for the model of a server"
        )
    if isinstance(name, str) and name == TINY:
        return _tiny()
    alias, _, revision = text.partition("@")
    if isinstance(name, str) and alias in ALIASES:
        text = f"{DEFAULT_REPO}@{revision}" if revision else ALIASES[alias]
    else:
        source = _local(text)
        if source is not None:
            return source
    match = _REPO.fullmatch(text)
    if match is None or isinstance(name, os.PathLike) or ".." in text:
        bare = re.sub(r"^[^/@\s]+:[^@\s]+@", "", text)  # user and password of a URL without its scheme
        raise CheckpointError(f"there is no model {bare[:200]!r}{_suggestion(bare)} {_accepted()}")
    return match[1], match[2]


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return a device of this machine.

    Args:
        device: Name of the device or a `torch.device`; None: the best available device.

    Raises:
        ValueError: The device is unknown or not available.
    """
    import torch

    found = _devices()
    if device is None:
        return torch.device(found[0])
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}; available devices: {', '.join(found)}") from error
    single = chosen.type != "cuda" and chosen.index in (None, 0)
    if str(chosen) not in found and not (single and chosen.type in found):
        raise ValueError(f"there is no device {str(chosen)!r}; available devices: {', '.join(found)}")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, config: MoondreamConfig) -> torch.dtype:
    """Return a data type for a model.

    Args:
        dtype: Name of the data type or a `torch.dtype`; None: the best one for the device and the model.
        device: Device of the model.
        config: Configuration of the model.

    Raises:
        ValueError: The data type is not supported.
    """
    if dtype is None:
        return _best_dtype(device, config)
    import torch

    chosen = str(dtype).removeprefix("torch.")
    if chosen not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    found: torch.dtype = getattr(torch, chosen)
    return found


def _devices() -> list[str]:
    """Return the names of the available devices, best first."""
    import torch

    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _best_dtype(device: torch.device, config: MoondreamConfig) -> torch.dtype:
    import torch

    if device.type == "cpu":
        from moondream_cv.model.hardware import cpu_dtype, probe_cpu

        return cpu_dtype(config.text.dim, probe_cpu())
    if device.type == "cuda":
        # GPUs before Ampere emulate bfloat16 slowly.
        is_supported = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if is_supported else torch.float16
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):  # macOS before 14
        return torch.float16
    return torch.bfloat16


def _tiny() -> Source:
    global _has_logged_tiny
    from moondream_cv.model.sources import local_source

    folder = Path(str(resources.files("moondream_cv") / "tiny"))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"the embedded model is missing from {folder}; install moondream-cv again")
    if not _has_logged_tiny:
        _has_logged_tiny = True
        logger.info("tiny is a demonstration model, trained on rendered shapes and icons and not on photographs")
    return local_source(folder)


def _local(text: str) -> Source | None:
    """Return the source of a local folder or file, optionally with a release; None if it does not exist."""
    from moondream_cv.model.sources import local_source

    path = _existing(text)
    if path is not None:
        return local_source(path)
    stem, _, revision = text.rpartition("@")
    path = _existing(stem) if stem else None
    if path is None:
        return None
    release = find_release(DEFAULT_REPO, revision)
    if release is None:
        raise CheckpointError(f"unknown release {revision!r} in {text!r}; supported releases: {known_releases()}")
    return local_source(path, release)


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, unknown user, ...
        return None


def _suggestion(text: str) -> str:
    close = difflib.get_close_matches(text.lower(), [*ALIASES, TINY, DEFAULT_REPO], n=1)
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", text):
        return f"; for a server, give its URL, 'http://{text[:200]}';"
    return f"; did you mean {close[0]!r}?" if close else ";"


def _accepted() -> str:
    return (
        f"use {', '.join(map(repr, ALIASES))}, {TINY!r}, a repository on the hub such as "
        f"'{DEFAULT_REPO}@{DEFAULT_REVISION}' (kept in {hub_cache()}), a local folder or file, or the URL of a "
        "server"
    )
