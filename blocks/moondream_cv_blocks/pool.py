"""A pool of models by name: each is opened once and shared by all blocks and workflows of the process.

Environment variables configure a process that runs workflows of other people:

- `MOONDREAM_CV_BLOCKS_MODELS`: models that workflows can use, separated by commas. Default: all models. API keys in the
  environment are sent to the servers in this list; without it, only to this machine and the hosts of the services.
- `MOONDREAM_CV_BLOCKS_DEVICE`: device of local models, such as "cuda:1". Default: the fastest available.
- `MOONDREAM_CV_BLOCKS_TIMEOUT`: time limit for the response of a server in seconds. Default: 30.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moondream_cv.arguments import check_positive
from moondream_cv.backends.dialects import known_dialect
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import MoondreamError
from moondream_cv.loading import ALIASES, TINY, check_name, choose_device, connect, is_url, load
from moondream_cv.model.releases import DEFAULT_REPO, DEFAULT_REVISION
from moondream_cv.progress import hidden
from moondream_cv.sam import SamMasks, is_sam_folder
from moondream_cv.urls import shown_url
from moondream_cv.vision_model import VisionModel

from .messages import ALLOWED, DEVICE, TIMEOUT

if TYPE_CHECKING:
    from moondream_cv.masks import MaskFunction

RETRY_SECONDS = 5.0
CACHED_IMAGES = 64
CACHED_BYTES = 2**30
CORE_MODELS = frozenset({"moondream2/moondream2_2b_jul24", "moondream2/moondream2-2b"})
"""Values of `model_version` of `roboflow_core/moondream2@v1`, in addition to "moondream2"."""
THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})

_shared: ModelPool | None = None
_shared_lock = threading.Lock()


class ModelPool:
    """Models that are opened on first use and stay open. The pool and its models are thread-safe."""

    def __init__(self, *, device: str | None = None, timeout: float = 30.0, cache_bytes: int = CACHED_BYTES) -> None:
        """Create an empty pool.

        Args:
            device: Device of local models, such as "cuda:1"; None: the fastest available.
            timeout: Time limit for the response of a server in seconds. A step stops at its first time-out. A request
                that fails sooner is retried once.
            cache_bytes: Size of each local model's cache of encoded images in bytes. With the cache, several blocks
                encode an image once. An image of Moondream 2 takes about 160 MB in bfloat16.

        Raises:
            ValueError: The timeout is not a positive number.
        """
        check_positive("timeout", timeout, "seconds")
        self.device, self.timeout, self.cache_bytes = device, timeout, cache_bytes
        self._entries: dict[str, _Entry] = {}  # by requested name, and by `_key` of that name
        self._masks: dict[str, _Entry] = {}  # segmentation models, by `_key` of their name
        self._lock = threading.Lock()

    def get(self, name: str) -> VisionModel:
        """Return the model with a name or URL, and open it on first use.

        After a failure, calls fail immediately for `RETRY_SECONDS`; then the model is opened again.

        Args:
            name: Model name or server URL.

        Raises:
            MoondreamError: The model cannot be loaded, or its server cannot be used.
            ValueError: The name is invalid, or workflows are not allowed to use the model.
        """
        name = check_allowed(name)

        def open_model() -> VisionModel:
            check_name(name)
            return self._open(name)

        model: VisionModel = self._entry(name).open(open_model)
        return model

    def get_masks(self, name: str) -> MaskFunction:
        """Return the mask function of a segmentation model, and load it on first use. Failures are as for `get`.

        Args:
            name: Repository on the hub, or folder.

        Raises:
            MoondreamError: The model cannot be loaded.
            ValueError: The name is invalid, or workflows are not allowed to use the model.
        """
        name = check_allowed(name)
        with self._lock:
            now = time.monotonic()
            self._masks = {key: one for key, one in self._masks.items() if not one.is_expired(now)}
            entry = self._masks.setdefault(_key(name), _Entry())
        masks: MaskFunction = entry.open(lambda: SamMasks(name, device=self.device))
        return masks

    def is_open(self, name: str) -> bool:
        """Return whether the model with a name or URL is open."""
        with self._lock:
            entry = self._entries.get(canonical_name(name))
            return entry is not None and entry.model is not None

    def add(self, name: str, model: VisionModel) -> None:
        """Add an open model under a name. A model that had the name before is replaced but stays open.

        Args:
            name: Model name or server URL, as workflows write it.
            model: Open model.

        Raises:
            MoondreamError: The name does not exist, so workflows cannot use it.
            ValueError: The name is invalid, or workflows are not allowed to use the model.
        """
        name = check_model(name)
        entry = _Entry()
        entry.model = model
        with self._lock:
            replaced = self._entries.get(_key(name))
            spellings = [other for other, one in self._entries.items() if one is replaced]
            self._entries.update(dict.fromkeys([*spellings, name, _key(name)], entry))

    def close(self) -> None:
        """Close all models. Later calls of `get` open them again."""
        with self._lock:
            closed, self._entries = {id(entry): entry for entry in self._entries.values()}, {}
            self._masks = {}
        for entry in closed.values():
            with entry.lock:
                model, entry.model = entry.model, None
                if model is not None:
                    model.close()

    def _entry(self, name: str) -> _Entry:
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                now = time.monotonic()
                self._entries = {key: one for key, one in self._entries.items() if not one.is_expired(now)}
                entry = self._entries[name] = self._entries.setdefault(_key(name), _Entry())
            return entry

    def _open(self, name: str) -> VisionModel:
        if is_url(name):
            server = connect(name, timeout=self.timeout, retries=1, api_key=None if _may_receive_keys(name) else "")
            server.stop_after_timeout = True
            server.has_scores  # noqa: B018 - a request to the server, which would otherwise run within a step
            return server
        with hidden():
            model = load(name, device=self.device, cache_images=CACHED_IMAGES, cache_bytes=self.cache_bytes)
        model.show_progress = False
        return model


class _Entry:
    """An open model, or the reason why it could not be opened.

    The entry stores the type and the message of an exception, because the exception would keep a half-loaded model in
    memory.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.model: Any = None
        self.error_type: type[Exception] = MoondreamError
        self.error_message = ""
        self.retry_at = -math.inf  # time from which the model may be opened again

    def open(self, load: Callable[[], Any]) -> Any:
        """Return the model, and load it if it is not open.

        Args:
            load: Function that loads the model. It is called by one thread at a time, and not soon after a failure.

        Raises:
            Exception: The error of the function.
        """
        with self.lock:  # per model, because loading can take minutes
            if self.model is None:
                if time.monotonic() < self.retry_at:
                    raise self.error_type(self.error_message)
                try:
                    self.model = load()
                except Exception as error:
                    self.fail(error)
                    raise
            return self.model

    def fail(self, error: Exception) -> None:
        """Store an error, and schedule the next attempt."""
        if isinstance(error, MoondreamError):
            self.error_type = type(error)
        else:
            self.error_type = ValueError if isinstance(error, ValueError) else MoondreamError
        self.error_message = str(error) or type(error).__name__
        self.retry_at = time.monotonic() + RETRY_SECONDS

    def is_expired(self, now: float) -> bool:
        """Return whether the entry can be removed: it failed, its retry is due, and no thread is opening it."""
        return self.model is None and -math.inf < self.retry_at < now and not self.lock.locked()


def shared_pool() -> ModelPool:
    """Return the pool of this process. The first call creates it from the environment variables.

    Raises:
        ValueError: An environment variable has an invalid value.
    """
    global _shared
    with _shared_lock:  # the server compiles workflows in several threads
        if _shared is None:
            _shared = pool_from_environment()
        return _shared


def pool_from_environment() -> ModelPool:
    """Return a new pool with the settings of the environment variables.

    Raises:
        ValueError: An environment variable has an invalid value.
    """
    device, seconds = os.environ.get(DEVICE, "").strip() or None, os.environ.get(TIMEOUT, "").strip()
    if device is not None:
        try:
            choose_device(device)
        except ValueError as error:
            raise ValueError(f"the environment variable {DEVICE} must name a device: {error}") from error
    if not seconds:
        return ModelPool(device=device)
    try:
        return ModelPool(device=device, timeout=float(seconds))
    except ValueError:
        raise ValueError(
            f"the environment variable {TIMEOUT} must be a number of seconds above 0, got {seconds!r}; correct it "
            "and restart the process"
        ) from None


def environment_problems() -> list[str]:
    """Return a message for each invalid value in the environment variables."""
    problems = []
    try:
        pool_from_environment()
    except ValueError as error:
        problems.append(str(error))
    for name in _allowed():
        if is_sam_folder(name):
            continue
        try:
            check_name(canonical_name(name))
        except (MoondreamError, ValueError) as error:
            problems.append(f"the environment variable {ALLOWED} contains an invalid model: {error}")
    return problems


def check_model(name: object) -> str:
    """Check the name of a model, without network requests, and whether workflows are allowed to use it.

    Args:
        name: Model name or server URL.

    Returns:
        The canonical name.

    Raises:
        MoondreamError: The model does not exist or cannot be used.
        ValueError: The name is not a string, or `MOONDREAM_CV_BLOCKS_MODELS` does not contain the model.
    """
    text = check_allowed(name)
    if _shared is None or not _shared.is_open(text):  # an open model does not need its files
        check_name(text)
    return text


def check_allowed(name: object) -> str:
    """Check whether workflows are allowed to use a model.

    Args:
        name: Model name or server URL.

    Returns:
        The canonical name.

    Raises:
        ValueError: The name is not a string, or `MOONDREAM_CV_BLOCKS_MODELS` does not contain the model.
    """
    if not isinstance(name, str):
        raise ValueError(f"model must be a name or the URL of a server, got {type(name).__name__}: {name!r:.100}")
    allowed = _allowed()
    if allowed and _key(name) not in map(_key, allowed):
        raise ValueError(
            f"the model {redacted(name)!r} is not allowed, only {', '.join(map(redacted, allowed))}; add it to the "
            f"environment variable {ALLOWED} to use it"
        )
    return canonical_name(name)


def canonical_name(name: str) -> str:
    """Return a name without surrounding spaces, and "moondream2" for the model IDs of Roboflow's block."""
    text = name.strip()
    return "moondream2" if text in CORE_MODELS and not os.path.exists(text) else text


def redacted(name: str) -> str:
    """Return the name of a model for messages, without the credentials of a URL."""
    return shown_url(name) if is_url(name) else name[:200]


def _allowed() -> list[str]:
    return [part.strip() for part in os.environ.get(ALLOWED, "").split(",") if part.strip()]


def _may_receive_keys(url: str) -> bool:
    """Return whether API keys of the environment may be sent to a server.

    Authors of workflows may not own the keys, so a server does not get a key just because a workflow names it.
    """
    address = ServerURL.parse(url)
    return bool(_allowed()) or known_dialect(address) is not None or address.host in THIS_MACHINE


def _key(name: str) -> str:
    """Return the same key for all names of a model."""
    text = canonical_name(name)
    if is_url(text):
        try:
            address = ServerURL.parse(text)
        except ValueError:
            return text
        parts = urlsplit(address.url)
        return f"{parts._replace(netloc=parts.netloc.lower()).geturl()} {address.auth}"
    stem, _, revision = text.partition("@")
    if stem not in ALIASES:
        try:
            path = Path(text).expanduser()
            if text.startswith((".", "/", "~")) or (text != TINY and path.exists()):
                return str(path.resolve())
        except (OSError, RuntimeError, ValueError):  # the path is too long, its user is unknown, ...
            return text
    repo = ALIASES[stem].partition("@")[0] if stem in ALIASES else stem
    return f"{repo}@{revision or DEFAULT_REVISION}" if repo == DEFAULT_REPO else text
