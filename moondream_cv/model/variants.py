"""Adapters by ID: local finetunes, the cache of published variants, and the service to download them from."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import urllib.request
import zipfile
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request

from moondream_cv.errors import CheckpointError
from moondream_cv.model.hub import is_offline
from moondream_cv.model.hub_requests import HubError, check_connection, explain_status, host_of, is_web_page

DEFAULT_ENDPOINT = "https://api.moondream.ai"
TIMEOUT = 60.0  # seconds without a byte
_KEY_HEADER = "X-Moondream-Auth"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FINETUNE_MODELS = ("moondream2", "moondream3-preview")  # names of the base model in names of checkpoints
_FINETUNE = re.compile(rf"(?:(?:{'|'.join(FINETUNE_MODELS)})/)?([A-Za-z0-9]{{26}})(?:@(\d{{1,9}}))?")


def finetunes_root() -> Path:
    """Return the default folder of finetunes.

    Returns:
        The folder in the environment variable `MOONDREAM_CV_FINETUNES`, or `~/.local/share/moondream_cv/finetunes`, or
        `%LOCALAPPDATA%\\moondream_cv\\finetunes` on Windows. It may not exist yet.
    """
    if os.environ.get("MOONDREAM_CV_FINETUNES"):
        return Path(os.environ["MOONDREAM_CV_FINETUNES"]).expanduser()
    base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local" if os.name == "nt" else "~/.local/share"
    return Path(base).expanduser() / "moondream_cv" / "finetunes"


def finetune_checkpoint(name: str, root: Path | None = None) -> Path | None:
    """Return the file of a checkpoint of a finetune on this machine; None for a name of another form.

    Args:
        name: "ID@STEP", optionally behind the name of a model, such as "moondream2/ID@STEP".
        root: Folder of the finetunes; None: the default folder.

    Raises:
        CheckpointError: The checkpoint is not saved, or the name is the ID of a finetune without a step.
    """
    match = _FINETUNE.fullmatch(name)
    if match is None:
        return None
    folder, finetune_id, step = root or finetunes_root(), match[1], match[2]
    if step is None and not (folder / finetune_id).is_dir():
        return None  # the ID of a published variant
    checkpoints = folder / finetune_id / "checkpoints"  # as in finetune/layout.py
    if step is not None and (path := checkpoints / f"{int(step)}.safetensors").is_file():
        return path
    saved = sorted(int(file.stem) for file in checkpoints.glob("*.safetensors") if file.stem.isdigit())
    if step is None and saved:
        raise CheckpointError(
            f"{finetune_id!r} is a finetune; give {finetune_id}@STEP with one of the saved steps: {saved}"
        )
    problem = (
        f"the finetune {finetune_id!r} has no saved checkpoint of step {step}; saved steps: {saved}"
        if saved
        else f"there is no finetune {finetune_id!r} with saved checkpoints in {folder}"
    )
    raise CheckpointError(f"{problem}; set MOONDREAM_CV_FINETUNES to the folder of the finetunes, or give a file")


def variant_cache() -> Path:
    """Return the folder in which the published code caches variants."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser() / "md_variants"
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(home).expanduser() / "hub" / "md_variants"


def fetch_variant(variant: str) -> Path:
    """Return the file of a variant, from the cache or from the service.

    Args:
        variant: ID of the variant.

    Raises:
        CheckpointError: The ID is malformed or unknown, access is denied, the service cannot be reached, or the variant
            is not cached and `HF_HUB_OFFLINE` is set.
    """
    if not _ID.fullmatch(variant):
        raise CheckpointError(
            f"{variant[:200]!r} is neither a file nor the ID of an adapter (letters, digits, '.', '_' and '-') or of a "
            "checkpoint (ID@STEP; `moondream-cv finetune list` prints the IDs)"
        )
    path = variant_cache() / variant / "final.pt"
    if path.is_file():
        return path
    if is_offline():
        raise CheckpointError(
            f"the adapter {variant!r} is not in {variant_cache()}, and HF_HUB_OFFLINE is set; give a file instead"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            _download(variant, file)
        if not zipfile.is_zipfile(part):
            with open(part, "rb") as file:
                content = "a web page" if is_web_page(file.read(512)) else "another kind of file"
            host = host_of(os.environ.get("MOONDREAM_ENDPOINT") or DEFAULT_ENDPOINT)
            raise CheckpointError(
                f"{host} answered with {content} (status 200) instead of the adapter {variant!r}: check "
                "MOONDREAM_ENDPOINT, and the login page of this network"
            )
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return path


class _SameOriginKeyHandler(urllib.request.HTTPRedirectHandler):
    """Redirect handler that does not send the API key to another host."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        if followed is not None and _origin(newurl) != _origin(req.full_url):
            followed.remove_header(_KEY_HEADER.capitalize())
        return followed


def _download(variant: str, file: IO[bytes]) -> None:
    endpoint = os.environ.get("MOONDREAM_ENDPOINT") or DEFAULT_ENDPOINT
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(endpoint):
        raise CheckpointError("MOONDREAM_ENDPOINT must be an http or https URL")
    shown = f"the adapter {variant!r} from {parts.scheme}://{parts.hostname}"
    headers = {"User-Agent": "moondream-cv"}
    if os.environ.get("MOONDREAM_API_KEY"):
        headers[_KEY_HEADER] = os.environ["MOONDREAM_API_KEY"]
    try:
        check_connection(endpoint)
        request = Request(f"{endpoint.rstrip('/')}/v1/variants/{variant}/download", headers=headers)
        with urllib.request.build_opener(_SameOriginKeyHandler).open(request, timeout=TIMEOUT) as reply:
            expected = reply.headers.get("Content-Length")
            shutil.copyfileobj(reply, file)
    except HTTPError as error:
        error.close()
        reasons = {
            401: "MOONDREAM_API_KEY is missing or wrong (status 401)",
            403: "MOONDREAM_API_KEY has no access to it (status 403)",
            404: "it does not exist there (status 404)",
            429: f"{host_of(endpoint)} limits the number of requests (status 429): try again later",
        }
        reason = reasons.get(error.code) or explain_status(error.code, error.url or endpoint, dict(error.headers))
        raise CheckpointError(f"cannot fetch {shown}: {reason}") from None
    except HubError as error:
        raise CheckpointError(f"cannot fetch {shown}: {error.reason}; give its file instead") from None
    # ValueError: the key is not a valid header value. Its message would contain the key.
    except (OSError, HTTPException, ValueError) as error:
        reason = "MOONDREAM_API_KEY is malformed" if isinstance(error, ValueError) else type(error).__name__
        reason = f"{reason}: {error.reason}" if hasattr(error, "reason") else reason
        raise CheckpointError(f"cannot fetch {shown} ({reason}); give its file instead") from None
    if expected is not None and expected.isdigit() and file.tell() != int(expected):
        raise CheckpointError(f"cannot fetch {shown}: the connection broke after {file.tell()} of {expected} bytes")


def _has_port(url: str) -> bool:
    """Return whether the port of a URL is valid or missing."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
