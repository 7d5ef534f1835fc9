"""Models by name, each opened once and shared by every block and every workflow of the process.

Environment variables are for processes whose owner does not write the workflows that run in them:

- `MOONDREAM_CV_BLOCKS_MODELS`: the models that workflows may name, separated by commas; unset: any.
- `MOONDREAM_CV_BLOCKS_DEVICE`: where models run that are loaded here, such as "cuda:1".
- `MOONDREAM_CV_BLOCKS_TIMEOUT`: seconds that a server may take to answer.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from moondream_cv.backends.addresses import Address, shown_url
from moondream_cv.backends.http import check_seconds
from moondream_cv.loading import ALIASES, TINY, check_name, connect, is_url, load
from moondream_cv.model.releases import DEFAULT_REPO, DEFAULT_REVISION
from moondream_cv.vision_model import VisionModel

ALLOWED = "MOONDREAM_CV_BLOCKS_MODELS"
DEVICE = "MOONDREAM_CV_BLOCKS_DEVICE"
TIMEOUT = "MOONDREAM_CV_BLOCKS_TIMEOUT"

RETRY_SECONDS = 5.0
CACHED_IMAGES = 16  # so that what several blocks ask about one image encodes it once
CACHED_BYTES = 2**30

_shared: ModelPool | None = None
_shared_lock = threading.Lock()


class ModelPool:
    """Opens models when they are first asked for, and keeps them. Thread-safe, and so are the models."""

    def __init__(self, *, device: str | None = None, timeout: float = 30.0) -> None:
        """Open nothing yet.

        Args:
            device: Where models run that are loaded here; None: the best device there is.
            timeout: Seconds that a server may take to answer; asked again once.

        Raises:
            ValueError: The timeout is no number of seconds.
        """
        check_seconds("timeout", timeout)
        self.device, self.timeout = device, timeout
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> VisionModel:
        """The model of this name or at this URL.

        One that could not be opened is tried again after `RETRY_SECONDS`: until then every frame fails at once.

        Raises:
            MoondreamError: It cannot be loaded, or its server cannot be used.
            ValueError: It names no model, or none that may be used here.
        """
        check_model(name)
        key = _key(name)
        with self._lock:
            opened = self._opened.setdefault(key, _Opened())
        with opened.lock:  # one model that loads for minutes keeps no other waiting
            if opened.model is None:
                if opened.error is not None and time.monotonic() < opened.again:
                    raise opened.error.with_traceback(None)
                try:
                    opened.model, opened.error = self._open(name), None
                except Exception as error:
                    opened.error, opened.again = error, time.monotonic() + RETRY_SECONDS
                    raise
            return opened.model

    def add(self, name: str, model: VisionModel) -> None:
        """Use a model that is open already under this name."""
        opened = _Opened()
        opened.model = model
        with self._lock:
            self._opened[_key(name)] = opened

    def close(self) -> None:
        """Close every model; what is asked for afterwards is opened anew."""
        with self._lock:
            closed, self._opened = list(self._opened.values()), {}
        for opened in closed:
            with opened.lock:
                model, opened.model = opened.model, None
                if model is not None:
                    model.close()

    def _open(self, name: str) -> VisionModel:
        if is_url(name):
            return connect(name, timeout=self.timeout, retries=1)
        return load(name, device=self.device, cache_images=CACHED_IMAGES, cache_bytes=CACHED_BYTES)


class _Opened:
    """A model, or what opening it failed with."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.model: VisionModel | None = None
        self.error: Exception | None = None
        self.again = 0.0


def shared_pool() -> ModelPool:
    """The pool of this process, made as the environment says when it is first asked for.

    Raises:
        ValueError: An environment variable makes no sense.
    """
    global _shared
    with _shared_lock:  # the server compiles in several threads
        if _shared is None:
            _shared = pool_of_environment()
        return _shared


def pool_of_environment() -> ModelPool:
    """A new pool as the environment says; errors as of `shared_pool`."""
    device, seconds = os.environ.get(DEVICE, "").strip() or None, os.environ.get(TIMEOUT, "").strip()
    if not seconds:
        return ModelPool(device=device)
    try:
        return ModelPool(device=device, timeout=float(seconds))
    except ValueError:
        raise ValueError(f"{TIMEOUT} must be a number of seconds above 0, not {seconds!r}") from None


def check_model(name: object) -> None:
    """Refuse what no model can be opened by, as far as that can be told at once, and what may not be used here.

    Raises:
        MoondreamError: It names no model, or one that cannot be used.
        ValueError: It is no name, or none of those that may be used.
    """
    if not isinstance(name, str):
        raise ValueError(f"model must be a name or the URL of a server, not {type(name).__name__}: {name!r:.100}")
    allowed = [part.strip() for part in os.environ.get(ALLOWED, "").split(",") if part.strip()]
    if allowed and _key(name) not in map(_key, allowed):
        raise ValueError(f"the model {_shown(name)!r} may not be used here, only {', '.join(map(_shown, allowed))}")
    check_name(name)


def _shown(name: str) -> str:
    return shown_url(name) if is_url(name) else name[:200]


def _key(name: str) -> str:
    """The same for all names of a model."""
    text = name.strip()
    if is_url(text):
        try:
            address = Address.of(text)
        except ValueError:
            return text
        parts = urlsplit(address.url)
        return f"{parts._replace(netloc=parts.netloc.lower()).geturl()} {address.auth}"
    stem, _, revision = text.partition("@")
    if stem not in ALIASES:
        try:
            path = Path(text).expanduser()
            if text != TINY and path.exists():
                return str(path.resolve())
        except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, ...
            return text
    repo = ALIASES[stem].partition("@")[0] if stem in ALIASES else stem
    return f"{repo}@{revision or DEFAULT_REVISION}" if repo == DEFAULT_REPO else text
