"""Train steps that clients can safely retry.

Clients retry a step with the same body if they do not receive its reply. While a step runs, identical requests wait for
its reply. Later, the store of the finetunes has the reply until it is acknowledged, which happens as soon as one
response has been sent completely. The next identical request is then a new step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from moondream_cv.errors import ImageError
from moondream_cv.requests import ErrorResult
from moondream_cv.server.apis.tuning_requests import convert_groups, run_operation, training_image, tuning_operation
from moondream_cv.server.bodies import MAX_TRAIN_STEP_VALUES, parse_json
from moondream_cv.server.errors import ServerError, validation_error
from moondream_cv.server.service import Service

MAX_PARSED = 4  # steps whose bodies are in memory as Python objects; further ones wait

logger = logging.getLogger(__name__)


class TrainStepBody(BaseModel):
    """A train step. Unknown fields are ignored.

    Attributes:
        finetune_id: ID of the finetune.
        groups: 1 to 64 groups: {"mode": "rl", "request", "rollouts", "rewards"} or {"mode": "sft", "request",
            "target"}. A request has `image_url`.
        lr: Learning rate, above 0 and at most 1.
    """

    model_config = ConfigDict(strict=True)

    finetune_id: str
    groups: list[Any]
    lr: float = 2e-4


@dataclass(eq=False)
class PendingStep:
    """A train step and the HTTP requests that wait for it.

    Attributes:
        key: Digest of the body.
        task: Task that runs the step.
        num_requests: Number of HTTP requests that have not ended.
        finetune_id: ID of the finetune; None before the body is parsed.
        is_acknowledged: Whether a response was sent completely.
    """

    key: bytes
    task: asyncio.Task[dict[str, Any]]
    num_requests: int = 0
    finetune_id: str | None = None
    is_acknowledged: bool = False


class TrainSteps:
    """The train steps of a server that run, or whose replies are being sent."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pending: dict[bytes, PendingStep] = {}
        self._parsed = asyncio.Semaphore(MAX_PARSED)

    def join(self, body: bytes) -> PendingStep:
        """Start a step, or return the identical one that runs. Each call needs one call of `leave`.

        Args:
            body: Body of the HTTP request.
        """
        key = hashlib.blake2b(body, digest_size=32).digest()
        pending = self._pending.get(key)
        if pending is None:
            # The step continues if the client disconnects, because an engine cannot undo it
            task = self._service.spawn(self._run(key, body))
            pending = self._pending[key] = PendingStep(key, task)
            task.add_done_callback(lambda _: self._remove_if_unused(pending))
        pending.num_requests += 1
        return pending

    def leave(self, pending: PendingStep) -> None:
        """End an HTTP request, whether or not its response was sent."""
        pending.num_requests -= 1
        self._remove_if_unused(pending)

    def acknowledge(self, pending: PendingStep) -> None:
        """Acknowledge a finished step, because a response was sent completely.

        The operation is queued before this returns, and so before any later step.
        """
        if pending.is_acknowledged:
            return
        pending.is_acknowledged = True
        self._remove(pending)
        reply = pending.task.result()
        if reply["applied"]:
            arguments = {"finetune_id": pending.finetune_id, "step": reply["step"]}
            call = self._service.submit(tuning_operation(self._service, "acknowledge", arguments))
            call.done.add_done_callback(lambda _: self._service.release_call(call))
            call.done.add_done_callback(_log_error)

    async def _run(self, key: bytes, body: bytes) -> dict[str, Any]:
        async with self._parsed:
            parsed = await _parse(body)
            del body
            self._pending[key].finetune_id = parsed.finetune_id
            groups = await self._open_images(*await asyncio.to_thread(convert_groups, parsed.groups))
            arguments = {"finetune_id": parsed.finetune_id, "groups": groups, "lr": parsed.lr}
            operation = tuning_operation(self._service, "train_step", arguments, pauses_decoding=True)
            with self._service.pause_time_limits():
                reply: dict[str, Any] = await run_operation(self._service, operation)
            return {name: _finite(value) for name, value in reply.items()}

    async def _open_images(self, groups: list[dict[str, Any]], urls: list[str | None]) -> list[dict[str, Any]]:
        """Add the images to the requests of groups. Equal URLs share one image."""
        opening = {url: asyncio.ensure_future(self._service.images.open(url)) for url in urls if url is not None}
        try:
            for index, (group, url) in enumerate(zip(groups, urls, strict=True)):
                if url is not None:
                    try:
                        image = await opening[url]
                    except ImageError as error:
                        raise ImageError(f"groups[{index}].request.image_url: {error}") from error
                    group["request"] = {**group["request"], "image": training_image(image)}
        finally:
            for one in opening.values():
                one.cancel()
            await asyncio.gather(*opening.values(), return_exceptions=True)
        return groups

    def _remove_if_unused(self, pending: PendingStep) -> None:
        if not pending.num_requests and pending.task.done():
            self._remove(pending)
            with contextlib.suppress(asyncio.CancelledError):
                pending.task.exception()  # no request is left that could report it

    def _remove(self, pending: PendingStep) -> None:
        if self._pending.get(pending.key) is pending:
            del self._pending[pending.key]


class AcknowledgedResponse(JSONResponse):
    """A JSON response that reports whether the client was connected until the last byte."""

    def __init__(self, content: Any, on_sent: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Create a response.

        Args:
            content: JSON value.
            on_sent: Called if the response was sent completely.
            on_end: Called at the end in any case.
        """
        super().__init__(content)
        self._on_sent, self._on_end = on_sent, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        disconnected = asyncio.ensure_future(_wait_until_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # The last byte is held back: a server ignores bytes for a closed connection, and the client must not
            # send its next request before this one is acknowledged
            body = bytes(self.body)
            await send({"type": "http.response.body", "body": body[:-1], "more_body": True})
            await asyncio.sleep(0)
            if not disconnected.done():
                await send({"type": "http.response.body", "body": body[-1:], "more_body": False})
                self._on_sent()
        finally:
            disconnected.cancel()
            self._on_end()


async def _wait_until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _parse(body: bytes) -> TrainStepBody:
    try:
        return TrainStepBody.model_validate(await parse_json(body, MAX_TRAIN_STEP_VALUES))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), 422) from error
    except ValueError as error:
        raise ServerError(422, f"the body is not JSON: {error}") from error


def _finite(value: Any) -> Any:
    """Return a value of a reply; None instead of a number that JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _log_error(done: asyncio.Future[Any]) -> None:
    if not done.cancelled() and isinstance(done.result(), ErrorResult):
        logger.warning("a train step could not be acknowledged: %s", done.result().error)
