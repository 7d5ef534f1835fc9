"""Models by name, each opened once and shared by every block and every workflow of the process.

Environment variables are for processes whose owner does not write the workflows that run in them:

- `MOONDREAM_CV_BLOCKS_MODELS`: the models that workflows may name, separated by commas; unset: any. Servers in it get
  the keys that are in the environment; without it only this machine and the hosts of the services themselves do.
- `MOONDREAM_CV_BLOCKS_DEVICE`: where models run that are loaded here, such as "cuda:1".
- `MOONDREAM_CV_BLOCKS_TIMEOUT`: seconds that a server may take to answer.
"""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from moondream_cv.backends.addresses import Address, shown_url
from moondream_cv.backends.connecting import known_dialect
from moondream_cv.backends.http import check_seconds
from moondream_cv.errors import MoondreamError
from moondream_cv.loading import ALIASES, TINY, check_name, choose_device, connect, is_url, load
from moondream_cv.model.releases import DEFAULT_REPO, DEFAULT_REVISION
from moondream_cv.vision_model import VisionModel

from .messages import ALLOWED, DEVICE, TIMEOUT

RETRY_SECONDS = 5.0
CACHED_IMAGES = 64
CACHED_BYTES = 2**30
CORE_MODELS = frozenset({"moondream2/moondream2_2b_jul24", "moondream2/moondream2-2b"})
"""Values of `model_version` of `roboflow_core/moondream2@v1` besides "moondream2"."""
THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})

_shared: ModelPool | None = None
_shared_lock = threading.Lock()


class ModelPool:
    """Opens models when they are first asked for, and keeps them. Thread-safe, and so are the models."""

    def __init__(self, *, device: str | None = None, timeout: float = 30.0, cache_bytes: int = CACHED_BYTES) -> None:
        """Open nothing yet.

        Args:
            device: Where models run that are loaded here; None: the best device there is.
            timeout: Seconds that a server may take to answer. A step stops at its first time-out. A request that fails
                sooner is retried once.
            cache_bytes: What the encoded images take together that each of those models keeps, so that what several
                blocks ask about an image encodes it once; an image of Moondream 2 takes some 160 MB in bfloat16.

        Raises:
            ValueError: The timeout is no number of seconds.
        """
        check_seconds("timeout", timeout)
        self.device, self.timeout, self.cache_bytes = device, timeout, cache_bytes
        self._opened: dict[str, _Entry] = {}  # by what it was asked for as, and by what that means
        self._lock = threading.Lock()

    def get(self, name: str) -> VisionModel:
        """The model of this name or at this URL.

        One that could not be opened is tried again after `RETRY_SECONDS`: until then every frame fails at once.

        Raises:
            MoondreamError: It cannot be loaded, or its server cannot be used.
            ValueError: It names no model, or none that may be used here.
        """
        name = check_allowed(name)
        opened = self._entry(name)
        with opened.lock:  # one model that loads for minutes keeps no other waiting
            if opened.model is None:
                if time.monotonic() < opened.retry_at:
                    raise opened.kind(opened.reason)
                try:
                    check_name(name)
                    opened.model = self._open(name)
                except Exception as error:
                    opened.fail(error)
                    raise
            return opened.model

    def is_open(self, name: str) -> bool:
        """Whether the model of this name is open."""
        with self._lock:
            opened = self._opened.get(canonical_name(name))
            return opened is not None and opened.model is not None

    def add(self, name: str, model: VisionModel) -> None:
        """Use a model that is open already for this name; one that it had before stays open.

        Raises:
            MoondreamError: No model has such a name, so no workflow can ask for it.
            ValueError: Likewise, or it may not be used here.
        """
        name = check_model(name)
        opened = _Entry()
        opened.model = model
        with self._lock:
            before = self._opened.get(_key(name))
            spellings = [other for other, one in self._opened.items() if one is before]
            self._opened.update(dict.fromkeys([*spellings, name, _key(name)], opened))

    def close(self) -> None:
        """Close every model; what is asked for afterwards is opened anew."""
        with self._lock:
            closed, self._opened = {id(one): one for one in self._opened.values()}, {}
        for opened in closed.values():
            with opened.lock:
                model, opened.model = opened.model, None
                if model is not None:
                    model.close()

    def _entry(self, name: str) -> _Entry:
        with self._lock:
            opened = self._opened.get(name)
            if opened is None:
                now = time.monotonic()
                self._opened = {key: one for key, one in self._opened.items() if not one.is_expired(now)}
                opened = self._opened[name] = self._opened.setdefault(_key(name), _Entry())
            return opened

    def _open(self, name: str) -> VisionModel:
        if is_url(name):
            server = connect(name, timeout=self.timeout, retries=1, api_key=None if _may_receive_keys(name) else "")
            server.stop_after_timeout = True
            server.has_scores  # noqa: B018 - requested now, not in the middle of a step
            return server
        return load(name, device=self.device, cache_images=CACHED_IMAGES, cache_bytes=self.cache_bytes)


class _Entry:
    """A model, or why it could not be opened. The exception itself would hold on to what was being loaded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.model: VisionModel | None = None
        self.kind: type[Exception] = MoondreamError
        self.reason = ""
        self.retry_at = -math.inf  # when it may be tried

    def fail(self, error: Exception) -> None:
        if isinstance(error, MoondreamError):
            self.kind = type(error)
        else:
            self.kind = ValueError if isinstance(error, ValueError) else MoondreamError
        self.reason = str(error) or type(error).__name__
        self.retry_at = time.monotonic() + RETRY_SECONDS

    def is_expired(self, now: float) -> bool:
        """Whether nothing is lost without it: it has failed a while ago, and nobody is at it."""
        return self.model is None and -math.inf < self.retry_at < now and not self.lock.locked()


def shared_pool() -> ModelPool:
    """The pool of this process, made as the environment says when it is first asked for.

    Raises:
        ValueError: An environment variable makes no sense.
    """
    global _shared
    with _shared_lock:  # the server compiles in several threads
        if _shared is None:
            _shared = pool_from_environment()
        return _shared


def pool_from_environment() -> ModelPool:
    """Return a new pool with the settings of the environment variables; raises as `shared_pool`."""
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
    """Return a message for each environment variable with an invalid value."""
    problems = []
    try:
        pool_from_environment()
    except ValueError as error:
        problems.append(str(error))
    for name in _allowed():
        try:
            check_name(canonical_name(name))
        except (MoondreamError, ValueError) as error:
            problems.append(f"the environment variable {ALLOWED} lists a model that cannot be used: {error}")
    return problems


def check_model(name: object) -> str:
    """Check the name of a model without a network connection, and whether workflows may use the model.

    Returns:
        The canonical name.

    Raises:
        MoondreamError: There is no such model, or it cannot be used.
        ValueError: The name is not a string, or `MOONDREAM_CV_BLOCKS_MODELS` does not list the model.
    """
    text = check_allowed(name)
    if _shared is None or not _shared.is_open(text):  # the files of an open model may be deleted
        check_name(text)
    return text


def check_allowed(name: object) -> str:
    """Check whether workflows may use a model.

    Returns:
        The canonical name.

    Raises:
        ValueError: As `check_model`.
    """
    if not isinstance(name, str):
        raise ValueError(f"model must be a name or the URL of a server, not {type(name).__name__}: {name!r:.100}")
    allowed = _allowed()
    if allowed and _key(name) not in map(_key, allowed):
        raise ValueError(
            f"the model {redacted(name)!r} may not be used here, only {', '.join(map(redacted, allowed))}; "
            f"{ALLOWED} lists the models"
        )
    return canonical_name(name)


def canonical_name(name: str) -> str:
    """Return a name without surrounding spaces, and "moondream2" for a `model_version` of Roboflow's own block."""
    text = name.strip()
    return "moondream2" if text in CORE_MODELS and not os.path.exists(text) else text


def redacted(name: str) -> str:
    """A model's name for messages, without what is secret in a URL."""
    return shown_url(name) if is_url(name) else name[:200]


def _allowed() -> list[str]:
    return [part.strip() for part in os.environ.get(ALLOWED, "").split(",") if part.strip()]


def _may_receive_keys(url: str) -> bool:
    """Whether keys of the environment are sent to a server.

    Those who write workflows are not always those whose keys these are: a server that somebody just names gets none.
    """
    address = Address.of(url)
    return bool(_allowed()) or known_dialect(address) is not None or address.host in THIS_MACHINE


def _key(name: str) -> str:
    """Return the same key for all names of a model."""
    text = canonical_name(name)
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
            if text.startswith((".", "/", "~")) or (text != TINY and path.exists()):
                return str(path.resolve())
        except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, ...
            return text
    repo = ALIASES[stem].partition("@")[0] if stem in ALIASES else stem
    return f"{repo}@{revision or DEFAULT_REVISION}" if repo == DEFAULT_REPO else text
