"""Conversion of requests of the tuning API to operations of the engine, and of their errors to responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import Request as HttpRequest
from PIL import Image

from moondream_cv.finetune.errors import (
    FinetuneConflict,
    FinetuneGone,
    FinetuneNotFound,
    FinetuneStoreError,
    FinetuneStoreLocked,
)
from moondream_cv.finetune.groups import parse_groups
from moondream_cv.finetune.values import check_mapping
from moondream_cv.finetune.wire import parse_request
from moondream_cv.requests import ErrorResult
from moondream_cv.server.errors import ServerError
from moondream_cv.server.runtime.operations import Operation, OperationResult
from moondream_cv.server.runtime.tuning_worker import TuningTarget
from moondream_cv.server.service import Service, get_service

# Statuses that Moondream's client does not retry: it retries 408, 425, 429 and most of 5xx 10 times
STATUSES = {
    FinetuneNotFound: (404, "not_found_error"),
    FinetuneConflict: (409, "conflict_error"),
    FinetuneGone: (410, "gone_error"),
    FinetuneStoreLocked: (423, "locked_error"),
    FinetuneStoreError: (507, "storage_error"),
}
_PUBLIC = {423: "the finetunes are in use by another process", 507: "the finetunes cannot be stored or read"}

logger = logging.getLogger(__name__)


def check_local_model(http: HttpRequest) -> None:
    """Reject requests if the model of the server is remote. This is a FastAPI dependency.

    Raises:
        ServerError: 501.
    """
    engine = get_service(http).engine
    if engine is not None and not engine.runs_operations:
        raise ServerError(
            501,
            "this server forwards requests to a remote model, which it cannot train; use a server with a local model",
            kind="not_supported",
        )


def tuning_operation(
    service: Service, method: str, arguments: Mapping[str, Any], pauses_decoding: bool = False
) -> Operation:
    """Return an operation of `TuningWorker`.

    Args:
        service: Service with the folder of the finetunes.
        method: Name of the method.
        arguments: Arguments by name.
        pauses_decoding: Whether the call takes long.
    """
    return Operation(TuningTarget(service.finetunes), method, arguments, pauses_decoding)


async def run_operation(service: Service, operation: Operation) -> Any:
    """Return the result of an operation, without a time limit.

    Raises:
        ServerError: The operation failed with an error of the finetunes.
        Exception: Another error of the operation.
    """
    call = service.submit(operation)
    try:
        result = await asyncio.shield(call.done)
    finally:
        service.release_call(call)
    if isinstance(result, ErrorResult):
        raise tuning_error(result.error, service.finetunes)
    assert isinstance(result, OperationResult)
    return result.value


def tuning_error(error: Exception, root: Path) -> Exception:
    """Return the error response for an error of the finetunes, without paths; other errors unchanged.

    Args:
        error: Error of an operation.
        root: Folder of the finetunes.
    """
    for kind, (status, name) in STATUSES.items():
        if isinstance(error, kind):
            if status not in _PUBLIC:
                return ServerError(status, str(error).replace(f" in {root}", ""), kind=name)
            logger.error("%s", error)
            return ServerError(status, f"{_PUBLIC[status]}; the log of the server has the reason", kind=name)
    return error


def training_image(image: Any) -> Image.Image:
    """Return an image of a request in the form that operations use.

    Args:
        image: Image as the image loader returns it.
    """
    return Image.fromarray(image.rgb)  # an array would count as BGR


def convert_request(value: object, path: str = "request") -> tuple[dict[str, Any], str | None]:
    """Check a request, and return it without its image, and the `image_url`.

    Args:
        value: Request of a client.
        path: Path of the value for error messages.

    Raises:
        ValueError: The request is invalid.
    """
    request = check_mapping(path, value)
    if "image" in request:  # it could be a path
        raise ValueError(f"{path}.image is not supported; send {path}.image_url with a data URI, base64 text or a URL")
    url = request.pop("image_url", None)
    if url is not None and not isinstance(url, str):
        raise ValueError(f"{path}.image_url must be a data URI, base64 text or a URL, got {type(url).__name__}")
    try:
        parse_request(request if url is None else {**request, "image": url}, path)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{path}.image ", f"{path}.image_url ")) from None
    return request, url


def convert_groups(groups: Sequence[object]) -> tuple[list[dict[str, Any]], list[str | None]]:
    """Check the groups of a train step, and return them without images, and the `image_url` of each group.

    Args:
        groups: Groups of a client.

    Raises:
        ValueError: A group is invalid.
    """
    converted, urls = [], []
    for index, group in enumerate(groups):
        given = check_mapping(f"groups[{index}]", group)
        request, url = convert_request(given.get("request"), f"groups[{index}].request")
        converted.append({**given, "request": request})
        urls.append(url)
    parse_groups(
        [
            one if url is None else {**one, "request": {**one["request"], "image": url}}
            for one, url in zip(converted, urls, strict=True)
        ]
    )
    return converted, urls
