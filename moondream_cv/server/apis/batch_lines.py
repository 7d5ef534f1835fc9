"""Lines of batches: each is a body of Moondream's API with a skill, and runs on the model independently of the others.

`batch.py` streams the results of the lines in a request body. `uploaded_batches/` runs the lines of an uploaded file.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from pydantic import ValidationError

from moondream_cv.requests import ErrorResult, Request
from moondream_cv.server.apis.moondream import (
    Body,
    CaptionBody,
    DetectBody,
    GazeBody,
    PointBody,
    QueryBody,
    result_body,
    select_checkpoint,
)
from moondream_cv.server.apis.request_settings import with_checkpoint
from moondream_cv.server.bodies import parse_json
from moondream_cv.server.errors import ServerError, validation_error
from moondream_cv.server.runtime.engine_loop import Usage
from moondream_cv.server.service import Service

MAX_IN_FLIGHT = 16  # lines that run, or wait for earlier lines to be sent or written
LARGEST_ID = 2**53  # the largest integer that every JSON parser represents exactly
BODIES: dict[str, type[Body]] = {
    "caption": CaptionBody,
    "query": QueryBody,
    "detect": DetectBody,
    "point": PointBody,
    "gaze": GazeBody,
}


class BatchImages:
    """The images of one batch; the most recently used ones are kept.

    Concurrent lines with the same image get the same object, which the engine encodes once.
    """

    def __init__(self, service: Service, max_images: int = MAX_IN_FLIGHT) -> None:
        self._service, self._max_images = service, max_images
        self._images: OrderedDict[str, asyncio.Future[Any]] = OrderedDict()

    async def open(self, value: str) -> Any:
        """Return an image of the client, like `ImageLoader.open`."""
        opening = self._images.get(value)
        if opening is None:
            opening = self._images[value] = asyncio.ensure_future(self._service.images.open(value))
            while len(self._images) > self._max_images:
                self._images.popitem(last=False)
        self._images.move_to_end(value)
        return await asyncio.shield(opening)  # other lines may use the image after this one is cancelled

    def close(self) -> None:
        """Cancel all downloads and drop all images."""
        for opening in self._images.values():
            opening.cancel()
        self._images.clear()


class LineRunner:
    """Runs the lines of one batch on the model. Each line needs a queue slot, which the caller acquires."""

    def __init__(self, service: Service) -> None:
        self._service, self._images = service, BatchImages(service)

    async def run(self, values: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        """Return the result of a line in Moondream's format, and its token counts.

        Args:
            values: Fields of the line without its ID. `skill` is removed.

        Raises:
            ServerError: The line is invalid, or 504: the time limit has expired.
            Exception: The error of the request.
        """
        limit, running = self._service.settings.timeout, asyncio.ensure_future(self._result(values))
        try:
            await self._service.wait([running], self._service.now() + limit)
        finally:
            if not running.done():
                running.cancel()
        if running.done():
            return running.result()
        raise ServerError(504, f"the line took longer than {limit:g} seconds; try again or send a smaller request")

    def close(self) -> None:
        """Drop the images of the batch."""
        self._images.close()

    async def _result(self, values: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
        body = _parse_body(values)
        checkpoint = select_checkpoint(body, self._service)
        image = None if body.image_url is None else await self._images.open(body.image_url)
        return await self._run(with_checkpoint(body.request(image), checkpoint))

    async def _run(self, request: Request) -> tuple[dict[str, Any], Usage]:
        call = self._service.submit(request)
        try:
            result = await asyncio.shield(call.done)
        finally:
            self._service.release_call(call)
        if isinstance(result, ErrorResult):
            raise result.error
        return result_body(result), call.usage


async def parse_line(line: bytes) -> dict[str, Any]:
    """Return the fields of a line.

    Raises:
        ServerError: The line is not a JSON object, or has too many values.
    """
    try:
        values = await parse_json(line)
    except ValueError as error:
        raise ServerError(400, f"the line is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ServerError(400, f"a line must be a JSON object, got {type(values).__name__}: {line[:60]!r}")
    return values


def pop_id(values: dict[str, Any], name: str) -> str | int | None:
    """Remove and return the ID that a client gave to a line, None if there is none.

    Args:
        values: Fields of the line.
        name: Name of the field.

    Raises:
        ServerError: 400; the ID is neither a string nor an integer that every JSON parser represents exactly.
    """
    own_id = values.pop(name, None)
    if own_id is None or isinstance(own_id, str) or (type(own_id) is int and abs(own_id) <= LARGEST_ID):
        return own_id
    raise ServerError(400, f"{name} must be a string or an integer, got {own_id!r:.100}", param=name)


def _parse_body(values: dict[str, Any]) -> Body:
    skill = values.pop("skill", None)
    kind = BODIES.get(skill) if isinstance(skill, str) else None
    if kind is None:
        raise ServerError(400, f"skill must be one of {', '.join(BODIES)}, got {skill!r:.100}", param="skill")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), 422) from error
