"""Checkpoints and tokenizers from the Hugging Face hub, and from its cache on this machine.

Only weights, `config.json`, `tokenizer.json` and `calibration.json` are fetched: code published with a checkpoint is
never downloaded. Files are compared with the hashes that the hub lists, and a branch or tag points to a commit only
once its files are complete.

An interrupted download of a large file continues, also in another process: recent versions of `huggingface_hub` only
continue within a call. Progress bars and access tokens are those of `huggingface_hub`, which reads its own environment
variables. `HF_HUB_OFFLINE`, `HF_ENDPOINT` and the location of the cache are read here at each call.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from moondream_cv.errors import CheckpointError
from moondream_cv.model.hub_requests import (
    HubError,
    RemoteFile,
    RemoteRevision,
    endpoint,
    explain_status,
    file_url,
    get_revision,
    host_of,
    is_web_page,
    web_page,
)

SMALL_FILES = ("config.json", "tokenizer.json", "calibration.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?!-|\.)(?!.*(--|\.\.))[\w.-]+(?<![.-])/(?!-|\.)[\w.-]+(?<![.-])")
_CHUNK = 2**20


def is_offline() -> bool:
    """Return whether `HF_HUB_OFFLINE` forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE", os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return value.upper() in ("1", "ON", "YES", "TRUE")


def is_commit(revision: str) -> bool:
    """Return whether a revision is a commit hash, which never changes its content."""
    return _COMMIT.fullmatch(revision) is not None


def hub_cache(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder in which `huggingface_hub` keeps its downloads.

    Args:
        cache_dir: The folder that a caller chose; None: the one of the environment.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def cached_snapshot(repo: str, revision: str, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of a revision in the cache; None if it is not cached. It need not be complete."""
    root = _storage(repo, {"cache_dir": cache_dir})
    commit = revision
    if not is_commit(revision):
        try:
            commit = (root / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    folder = root / "snapshots" / commit
    return folder if is_commit(commit) and folder.is_dir() else None


def look_up(repo: str, revision: str, **options: Any) -> RemoteRevision:
    """Ask the hub for a revision.

    Args:
        options: `token`; others are ignored.

    Raises:
        HubError: The hub cannot be reached or denies access, or the revision does not exist; the message proposes a
            solution.
    """
    check_repo(repo)
    try:
        return get_revision(repo, revision, options.get("token"))
    except HubError as error:
        raise failed(repo, revision, error) from error


def fetch(remote: RemoteRevision, names: Collection[str], folder: Path | None = None, **options: Any) -> Path:
    """Download files of a revision; those that are complete are not downloaded again.

    Args:
        remote: The revision.
        names: Paths in the repository.
        folder: Write the files into this folder; large ones are then not in the cache.
        options: `cache_dir`, `token` and `force_download`, as `huggingface_hub.snapshot_download` takes them.

    Returns:
        The folder with the files.

    Raises:
        HubError: A file cannot be downloaded, or its content is not what the hub lists.
    """
    large = sorted(name for name in names if remote.files[name].sha256 is not None)
    small = sorted(set(names) - set(large))
    try:
        if folder is None:
            return _fetch_to_cache(remote, large, small, options)
        folder.mkdir(parents=True, exist_ok=True)
        for name in large:
            if (folder / name).exists() and _hash(folder / name, hashlib.sha256()) != remote.files[name].sha256:
                raise other_weights(folder, name)
        copied = _fetch_to_cache(remote, [], small, options) if small else folder
        for name in large:
            _download_large(remote, name, folder / name, options)
        for name in small:
            shutil.copyfile(copied / name, folder / name)
        return folder
    except HubError as error:
        raise failed(remote.repo, remote.revision, error) from error
    except CheckpointError:
        raise
    # Which errors a broken connection raises depends on the HTTP library that this version of huggingface_hub uses.
    except Exception as error:
        raise failed(remote.repo, remote.revision, HubError(*_reason(error))) from error


def fetch_file(repo: str, revision: str, filename: str, refresh: bool = False, **options: Any) -> Path:
    """Return a small file of a repository, from the cache if it is there.

    Args:
        refresh: Ask the hub for a newer file even if one is cached.
        options: As `fetch` takes them, and `local_files_only`.

    Raises:
        HubError: It is not cached, and cannot be downloaded.
    """
    cached = cached_snapshot(repo, revision, options.get("cache_dir"))
    found = cached / filename if cached is not None and (cached / filename).is_file() else None
    if is_offline() or options.get("local_files_only"):
        if found is None:
            raise not_cached(repo, revision, filename)
        return found
    if found is not None and not refresh:
        return found
    remote = look_up(repo, revision, **options)
    if filename not in remote.files:
        raise failed(repo, revision, HubError(f"it has no file {filename!r}; check the name and the revision", 404))
    return fetch(remote, [filename], **options) / filename


def check_repo(repo: str) -> None:
    """Check the form of the name of a repository.

    Args:
        repo: Name to check.

    Raises:
        CheckpointError: The name has another form than "owner/name".
    """
    if not _NAME.fullmatch(repo) or len(repo) > 96:
        raise CheckpointError(
            f"{repo[:200]!r} is not the name of a repository on the hub; names have the form 'owner/name'"
        )


def failed(repo: str, revision: str, error: HubError) -> HubError:
    """Return an error about a revision, with its cause and a solution."""
    message = f"{repo}@{revision} cannot be fetched: {error.reason}"
    if error.status != 404:
        message += f". {_way_out(f'{repo}@{revision}')}"
    complete = HubError(message, error.status)
    complete.reason = error.reason
    return complete


def other_weights(folder: Path, name: str) -> CheckpointError:
    """Return the error about a folder whose weights a download would replace."""
    return CheckpointError(f"{folder} already contains other weights, {name}; give an empty folder, or remove the file")


def not_cached(repo: str, revision: str, filename: str | None = None) -> HubError:
    """Return the error about a revision, or a file of it, that is not cached while network access is disabled."""
    what = f"{repo}@{revision}" if filename is None else f"{filename!r} of {repo}@{revision}"
    return HubError(
        f"{what} is not in the cache, and network access is disabled (HF_HUB_OFFLINE). {_way_out(f'{repo}@{revision}')}"
    )


def _way_out(name: str) -> str:
    return (
        f"Run `moondream-cv download {name}` once with a connection (the cache is {hub_cache()}), copy a folder from "
        "`moondream-cv download NAME --to FOLDER` to this machine, or use the embedded demonstration model: "
        "`--model tiny`"
    )


def _storage(repo: str, options: Mapping[str, Any]) -> Path:
    """Return the folder of a repository in the cache."""
    return hub_cache(options.get("cache_dir")) / f"models--{repo.replace('/', '--')}"


def _fetch_to_cache(remote: RemoteRevision, large: list[str], small: list[str], options: Mapping[str, Any]) -> Path:
    """Download the missing files into the cache, let the revision point to them, and return their folder."""
    cached, force = cached_snapshot(remote.repo, remote.commit, options.get("cache_dir")), options.get("force_download")
    missing = [name for name in (*large, *small) if force or cached is None or not (cached / name).is_file()]
    # `huggingface_hub` finds the content of large files in place, and only links it
    for name in missing:
        if name in large:
            blob = _storage(remote.repo, options) / "blobs" / str(remote.files[name].sha256)
            _download_large(remote, name, blob, options)
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                remote.repo,
                revision=remote.commit,
                allow_patterns=[_literal(name) for name in (*large, *small)],
                endpoint=endpoint(),
                cache_dir=hub_cache(options.get("cache_dir")),
                token=options.get("token"),
                force_download=bool(force) and not large,
            )
        )
    except Exception:
        # Versions before 1.33 would append the real file to a web page that came in its place
        for name in small:
            for rest in (_storage(remote.repo, options) / "blobs").glob(f"{remote.files[name].blob_id}*.incomplete"):
                rest.unlink(missing_ok=True)
        raise
    for name in missing:
        if name in small:
            _verify(remote, name, snapshot / name)
    _point_to(remote, options)
    return snapshot


def _literal(name: str) -> str:
    """Return a pattern that matches this path only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _download_large(remote: RemoteRevision, name: str, target: Path, options: Mapping[str, Any]) -> None:
    """Download a file with a known SHA-256 to its place, and continue what an earlier call has left there.

    Raises:
        HubError: The content is damaged; it is removed.
    """
    listed = remote.files[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with WeakFileLock(_lock(target, options)):
        if target.is_file() and not options.get("force_download") and _hash(target, hashlib.sha256()) == listed.sha256:
            return
        start = _append(remote, name, part, options)
        if _hash(part, hashlib.sha256()) == listed.sha256:
            os.replace(part, target)
            return
        sent = _tail(part, start)
        part.unlink()
    if is_web_page(sent):
        raise HubError(web_page(200, endpoint(), name), 200)
    raise _damaged(name, "its SHA-256 differs from the one that the hub lists")


def _append(remote: RemoteRevision, name: str, part: Path, options: Mapping[str, Any]) -> int:
    """Download the missing rest of a file; after a broken connection, try again if it has sent something.

    Returns:
        The number of bytes that were there before the last attempt.
    """
    headers = {**build_hf_headers(token=options.get("token")), "Accept-Encoding": "identity"}
    size = remote.files[name].size
    with part.open("ab") as file:
        if size is not None and file.tell() > size:
            file.truncate(0)
        while True:
            start = file.seek(0, os.SEEK_END)
            try:
                http_get(
                    file_url(remote, name),
                    file,
                    resume_size=start,
                    headers=headers,
                    expected_size=size,
                    displayed_filename=name,
                )
                return start
            except Exception as error:
                file.flush()
                if _is_size_mismatch(error):
                    sent = _tail(part, start)
                    file.truncate(start)
                    if is_web_page(sent):
                        raise HubError(web_page(200, endpoint(), name), 200) from error
                    raise
                is_broken = getattr(error, "errno", None) is None and getattr(error, "response", None) is None
                if not is_broken or file.seek(0, os.SEEK_END) == start:
                    raise


def _lock(target: Path, options: Mapping[str, Any]) -> Path:
    """Return the file that other processes with the same target wait for; it is kept in the cache."""
    folder = hub_cache(options.get("cache_dir")) / ".locks" / "moondream-cv"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:32]}.lock"


def _is_size_mismatch(error: Exception) -> bool:
    return isinstance(error, OSError) and "onsistency check failed" in str(error)


def _tail(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(512)


def _verify(remote: RemoteRevision, name: str, path: Path) -> None:
    """Compare a download with what the hub lists; remove it if it differs, so that the next try starts again."""
    listed = remote.files.get(name, RemoteFile())
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    problem = None
    if listed.size not in (None, size):
        problem = f"it has {size} bytes, and the hub lists {listed.size}"
    elif listed.sha256 is not None and _hash(path, hashlib.sha256()) != listed.sha256:
        problem = "its SHA-256 differs from the one that the hub lists"
    elif listed.blob_id is not None and _hash(path, hashlib.sha1(b"blob %d\0" % size)) != listed.blob_id:
        problem = "its content differs from what the hub lists"
    elif is_web_page(head):
        problem = "it is a web page"
    if problem is None:
        return
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)
    if is_web_page(head):
        raise HubError(web_page(200, endpoint(), name), 200)
    raise _damaged(name, problem)


def _damaged(name: str, problem: str) -> HubError:
    return HubError(
        f"{host_of(endpoint())} or one of its file servers sent a damaged {name} (status 200): {problem}. The file was "
        "removed; try again",
        200,
    )


def _hash(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        for chunk in _chunks(file):
            digest.update(chunk)
    return str(digest.hexdigest())


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _reason(error: BaseException) -> tuple[str, int | None]:
    """Return the cause of an error of `huggingface_hub`, and the HTTP status if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        status = getattr(response, "status_code", None)
        if response is not None and isinstance(status, int) and status >= 400:
            url = str(getattr(response, "url", None) or endpoint())
            return explain_status(status, url, response.headers), status
        seen = seen.__cause__ or seen.__context__
    first_line = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror or first_line} ({error.filename or hub_cache()})", None
    return f"the download from {host_of(endpoint())} failed ({first_line}); run it again to continue", None


def _point_to(remote: RemoteRevision, options: Mapping[str, Any]) -> None:
    """Let the branch or tag point to the commit in the cache, as `huggingface_hub` does."""
    if is_commit(remote.revision):
        return
    reference = _storage(remote.repo, options) / "refs" / remote.revision
    part = reference.with_name(f"{reference.name}.{os.getpid()}.part")
    reference.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(remote.commit, encoding="utf-8")
    os.replace(part, reference)
