"""Names → models: `load("moondream2")`, `load("tiny")`, `load("./folder")`, `load("repo/name@revision")`.

A server's URL is a name too for `open_model`, which hands it to `connect`; then torch is not imported.
"""

from __future__ import annotations

import difflib
import functools
import logging
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
from moondream_cv.urls import is_url, shown_url

if TYPE_CHECKING:
    import torch

    from moondream_cv.engine.local import LocalModel
    from moondream_cv.model.config import MoondreamConfig
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
]

logger = logging.getLogger(__name__)

Fetched = TypeVar("Fetched")

ALIASES = {"moondream2": f"{DEFAULT_REPO}@{DEFAULT_REVISION}"}
TINY = "tiny"
DTYPES = ("float32", "bfloat16", "float16")
_REPO = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_SMALL_WIDTH = 512  # decoders up to this width run in float32 on a CPU
_told_about_tiny = False


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
    """Load a model onto this machine.

    Args:
        name: "moondream2" (`vikhyatk/moondream2@2025-06-21`); "tiny", the embedded demonstration model; a repository on
            the hub, "repo/name@revision"; a local folder, or a file of weights. A folder whose `config.json` says no
            sizes may name its release: "folder@2025-04-14".
        device: "cuda", "cuda:1", "mps", "cpu" or a `torch.device`; None: the best there is.
        dtype: "float32", "bfloat16", "float16" or a `torch.dtype`; None: bfloat16, or what the device has instead, and
            float32 for small models on a CPU.
        quantize: None. No quantized mode exists yet.
        adapter: A `.pt` or `.safetensors` file, or the id of a variant.
        cache_images: Keep so many encoded images, those used last, for when the same pixels come again.
        cache_bytes: What those may take together; one of Moondream 2 takes some 160 MB in bfloat16.

    Returns:
        A model that pickles by name: spawned processes load it again with the same arguments.

    Raises:
        CheckpointError: The name is unknown; or the checkpoint, its tokenizer or the adapter is missing, damaged, does
            not fit, or cannot be fetched.
        ValueError: The device is not there, or an argument is out of range.
    """
    from moondream_cv.engine.calibration import Calibration
    from moondream_cv.engine.image_cache import ImageCache
    from moondream_cv.engine.local import LocalModel
    from moondream_cv.model.adapters import load_adapter
    from moondream_cv.model.checkpoints import load_network

    if quantize is not None:
        raise ValueError(f"quantize must be None, not {quantize!r}: no quantised mode exists yet")
    target = choose_device(device)
    source = find_source(name)
    chosen = choose_dtype(dtype, target, source.config)
    tokenizer = source.tokenizer()
    network = load_network(source.weights, source.config, target, chosen)
    lora = None if adapter is None else load_adapter(os.fspath(adapter), source.config, target, chosen)
    calibration = Calibration.from_folder(source.folder)
    model = LocalModel(network, tokenizer, adapter=lora, calibration=calibration, name=os.fspath(name))
    if cache_images:
        model.image_cache = ImageCache(cache_images, cache_bytes)
    model.reload = functools.partial(
        load,
        _lasting_name(name) if source.origin is None else source.origin,
        device=device,
        dtype=dtype,
        adapter=None if adapter is None else _lasting_file(adapter),
    )
    return model


def _lasting_name(name: str | os.PathLike[str]) -> str:
    """Return a name that means the same model in another process, which may run in another folder."""
    text = os.fspath(name)
    if isinstance(name, str) and (name == TINY or name.partition("@")[0] in ALIASES):
        return name
    if _existing(text) is not None:
        return _lasting_file(name)
    stem, at, release = text.rpartition("@")
    return f"{_lasting_file(stem)}@{release}" if at and _existing(stem) is not None else text


def _lasting_file(name: str | os.PathLike[str]) -> str:
    """Return the absolute path of a file or folder that exists, and any other name as it is."""
    path = _existing(os.fspath(name))
    return os.fspath(name) if path is None else str(path.absolute())


def open_model(name: str | os.PathLike[str], device: str | None = None) -> VisionModel:
    """Load a model by name, or use the one behind a server's URL.

    Args:
        name: What `load` or `connect` takes.
        device: Where to load it; None is the best there is.

    Raises:
        MoondreamError: It cannot be loaded, or the server cannot be used.
        ValueError: The device is not there, or is given for a server.
    """
    if not is_url(name):
        return load(name, device=device)
    if device is not None:
        raise ValueError(f"device={device!r} is for a model on this machine; a server's URL chooses none")
    return connect(os.fspath(name))


def download(name: str | os.PathLike[str], to: str | os.PathLike[str] | None = None) -> Path:
    """Fetch what `load(name)` needs, so that it works offline afterwards.

    Releases and branches are compared with the hub, also if they are cached.

    Args:
        name: As `load` takes it; also a repository that holds a tokenizer only, such as "moondream/starmie-v1@main".
        to: Write weights, config and tokenizer into this folder, which `load` then takes on a machine without a
            network; None: into the cache of the hub.

    Returns:
        The folder with the weights, or with the tokenizer.

    Raises:
        CheckpointError: As `load`, or the folder cannot be written.
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


def find_source(name: str | os.PathLike[str]) -> Source:
    """Say where a model of this name lives, fetching its files if they are not here.

    Raises:
        CheckpointError: The name is unknown, or what it names cannot be used.
        ValueError: It is a server's URL.
    """
    from moondream_cv.model.sources import hub_source

    found = _local_or_repo(name)
    if not isinstance(found, tuple):
        return found
    return _fetching(name, lambda: hub_source(*found), found[1])


def _fetching(name: str | os.PathLike[str], fetch: Callable[[], Fetched], revision: str | None) -> Fetched:
    """Fetch from the hub; errors about a name that may be a misspelled folder say so."""
    try:
        return fetch()
    except CheckpointError as error:
        if revision is not None:
            raise
        raise CheckpointError(
            f"there is no folder {os.fspath(name)!r}, so it was taken for a repository: {error}"
        ) from error


def check_name(name: str | os.PathLike[str]) -> None:
    """Refuse what `open_model` would refuse, as far as that can be told without a network and without loading.

    Raises:
        CheckpointError: It names no model, or one that cannot be used.
        ValueError: It is a URL of no server.
    """
    from moondream_cv.model.sources import release_of

    if is_url(name):
        ServerURL.parse(os.fspath(name))
        return
    found = _local_or_repo(name)
    if isinstance(found, tuple):
        release_of(*found)


def _local_or_repo(name: str | os.PathLike[str]) -> Source | tuple[str, str | None]:
    """The model of this name if it is here, or else the repository and the revision that it means."""
    text = os.fspath(name)
    if not isinstance(text, str) or not text.strip():
        raise CheckpointError(f"the name of a model must say something, not {text!r}; {_accepted()}")
    if is_url(text):
        raise ValueError(
            f"{shown_url(text)!r} is a URL, and models are loaded from a folder or from the hub: give "
            "repo@revision. A server's model is used with connect(url)"
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
    """The device of this name; None gives the best there is.

    Raises:
        ValueError: It is not there.
    """
    import torch

    found = _devices()
    if device is None:
        return torch.device(found[0])
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}; there are {', '.join(found)}") from error
    single = chosen.type != "cuda" and chosen.index in (None, 0)
    if str(chosen) not in found and not (single and chosen.type in found):
        raise ValueError(f"there is no device {str(chosen)!r}; there are {', '.join(found)}")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, config: MoondreamConfig) -> torch.dtype:
    """The number format of this name; None gives the best for a device and a model.

    Raises:
        ValueError: It is no format that a model can compute in.
    """
    if dtype is None:
        return _best_dtype(device, config)
    import torch

    chosen = str(dtype).removeprefix("torch.")
    if chosen not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    found: torch.dtype = getattr(torch, chosen)
    return found


def _devices() -> list[str]:
    """What there is, the best first."""
    import torch

    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _best_dtype(device: torch.device, config: MoondreamConfig) -> torch.dtype:
    import torch

    if device.type == "cpu":
        return torch.float32 if config.text.dim <= _SMALL_WIDTH else torch.bfloat16
    if device.type == "cuda":
        # Devices from before Ampere emulate bfloat16, slowly.
        has_it = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if has_it else torch.float16
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):  # macOS before 14
        return torch.float16
    return torch.bfloat16


def _tiny() -> Source:
    global _told_about_tiny
    from moondream_cv.model.sources import local_source

    folder = Path(str(resources.files("moondream_cv") / "tiny"))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"the embedded model is missing from {folder}; install moondream-cv again")
    if not _told_about_tiny:
        _told_about_tiny = True
        logger.info("tiny: a demonstration model that knows only rendered shapes and icons, nothing of photographs")
    return local_source(folder)


def _local(text: str) -> Source | None:
    """The folder or file of this name, perhaps with the release that it is of; None if there is none."""
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
        raise CheckpointError(f"{revision!r} in {text!r} is no known release of {path}; these are: {known_releases()}")
    return local_source(path, release)


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, ...
        return None


def _suggestion(text: str) -> str:
    close = difflib.get_close_matches(text.lower(), [*ALIASES, TINY, DEFAULT_REPO], n=1)
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", text):
        return f"; for a server write its URL, 'http://{text[:200]}';"
    return f"; did you mean {close[0]!r}?" if close else ";"


def _accepted() -> str:
    return (
        f"accepted are {', '.join(map(repr, ALIASES))}, {TINY!r}, a repository on the hub such as "
        f"'{DEFAULT_REPO}@{DEFAULT_REVISION}' (kept in {hub_cache()}), and a local folder or file; a server's model is "
        "named by its URL"
    )
