"""Routes of Moondream's batch API: multipart uploads, the status of batches, and their results.

`POST /v1/batch` without `action` belongs to `apis/batch.py`. The OpenAPI document describes both protocols in one
operation, which is the one of that module.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.routing import Match
from starlette.types import Scope

from moondream_cv.server.apis.error_responses import error_responses
from moondream_cv.server.apis.moondream import ErrorAnswer
from moondream_cv.server.apis.signed_urls import BATCH_OUTPUTS_PATH, get_url_signer
from moondream_cv.server.apis.uploaded_batches.batches import UploadedBatch
from moondream_cv.server.apis.uploaded_batches.files import FileClosedError
from moondream_cv.server.apis.uploaded_batches.processing import error_detail, usage_body
from moondream_cv.server.apis.uploaded_batches.store import BatchStore, storage_error
from moondream_cv.server.apis.uploaded_batches.uploads import MAX_PARTS
from moondream_cv.server.bodies import read_pieces
from moondream_cv.server.errors import ServerError
from moondream_cv.server.service import check_single_process

UploadId = Annotated[str, Query(alias="uploadId")]
PartNumber = Annotated[int, Query(alias="partNumber", ge=1, le=MAX_PARTS)]


class CreatedUpload(BaseModel):
    """A new upload.

    Attributes:
        fileId: ID of the file, which is also the ID of the batch.
        uploadId: ID of the upload.
        key: Name of the file.
    """

    fileId: str
    uploadId: str
    key: str


class UploadedPart(BaseModel):
    """A received part.

    Attributes:
        etag: MD5 hash in hexadecimal digits.
        partNumber: Number of the part.
    """

    etag: str
    partNumber: int = Field(ge=1, le=MAX_PARTS)


class CompleteBody(BaseModel):
    """The parts of a complete file.

    Attributes:
        parts: Parts in any order; the file has them in the order of their numbers.
    """

    parts: Annotated[list[UploadedPart], Field(max_length=MAX_PARTS)]


class StartedBatch(BaseModel):
    """A batch whose upload is complete.

    Attributes:
        id: ID of the batch.
        status: Status of the batch.
        size: Size of the file in bytes.
    """

    id: str
    status: str
    size: int


class BatchProgress(BaseModel):
    """Number of lines.

    Attributes:
        total: Number of lines of the file; 0 until they are counted.
        completed: Number of lines with a result.
        failed: Number of lines with an error.
    """

    total: int
    completed: int
    failed: int


class BatchUsage(BaseModel):
    """Token counts of all lines."""

    input_tokens: int
    output_tokens: int


class BatchOutput(BaseModel):
    """A file with results, one JSON object per line.

    Attributes:
        index: Index of the file.
        url: URL of the file, which needs no API key and expires after an hour. Each status has new URLs.
    """

    index: int
    url: str


class BatchError(BaseModel):
    """Reason for which a batch failed."""

    code: str
    message: str


class BatchStatus(BaseModel):
    """The status of a batch.

    Attributes:
        id: ID of the batch.
        status: "chunking" while the lines are counted, then "processing", then "completed" or "failed".
        size: Size of the file in bytes.
        outputs: Files with the results; empty until the batch is completed.
        error: Reason for which the batch failed. A line that fails does not make the batch fail.
        expires_at: Time at which the batch is deleted; null while it runs.
    """

    id: str
    status: Literal["chunking", "processing", "completed", "failed"]
    size: int
    progress: BatchProgress
    usage: BatchUsage
    outputs: list[BatchOutput]
    error: BatchError | None
    created_at: datetime
    completed_at: datetime | None
    expires_at: datetime | None


class DeletedBatch(BaseModel):
    """A deleted batch."""

    id: str
    deleted: bool


class ActionRoute(APIRoute):
    """A route that only matches requests with an `action` in the query."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether the route matches a request."""
        match, child_scope = super().matches(scope)
        if match == Match.FULL and "action" not in HttpRequest(scope).query_params:
            return Match.NONE, {}
        return match, child_scope


_DESCRIPTIONS: dict[int | str, str] = {
    404: "The batch does not exist, has expired, or was deleted.",
    411: "The Content-Length header is missing.",
    413: "The file or the request body is too large.",
    429: "Too many batches are uploaded or run.",
    507: "The disk of the server is full.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return error_responses(ErrorAnswer, 401, 403, *statuses, descriptions=_DESCRIPTIONS)


_SINGLE_PROCESS = [Depends(check_single_process)]
create_router = APIRouter(route_class=ActionRoute, tags=["moondream"], dependencies=_SINGLE_PROCESS)
router = APIRouter(tags=["moondream"], dependencies=_SINGLE_PROCESS)


@create_router.post("/v1/batch", include_in_schema=False)
async def create(http: HttpRequest, action: Literal["mpu-create"]) -> CreatedUpload:
    """Create an upload."""
    batch = _store(http).create()
    return CreatedUpload(fileId=batch.id, uploadId=batch.upload_id, key=f"batches/{batch.id}.jsonl")


@router.put(
    "/v1/batch/{file_id}",
    summary="Upload a part of a batch",
    responses=_errors(400, 404, 408, 411, 413, 422, 507),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_part(
    file_id: str, http: HttpRequest, action: Literal["mpu-uploadpart"], upload_id: UploadId, part_number: PartNumber
) -> UploadedPart:
    """Store a part of the file. Parts can be sent in any order, in parallel, and again."""
    store = _store(http)
    batch = store.find_upload(file_id, upload_id)
    _check_uploading(batch)
    if "content-length" not in http.headers:
        raise ServerError(411, "the request must have a Content-Length header")
    try:
        async with aclosing(read_pieces(http.receive)) as pieces:
            part = await batch.upload.add_part(part_number, int(http.headers["content-length"]), pieces)
    except FileClosedError:
        raise ServerError(404, f"batch {file_id} was deleted or completed during the upload of the part") from None
    except OSError as error:
        raise storage_error(error) from error
    store.touch(batch)
    return UploadedPart(etag=part.etag, partNumber=part_number)


@router.post(
    "/v1/batch/{file_id}",
    summary="Run an uploaded batch",
    responses=_errors(400, 404, 408, 413, 415, 422, 503),
)
async def complete(
    file_id: str, http: HttpRequest, action: Literal["mpu-complete"], upload_id: UploadId, body: CompleteBody
) -> StartedBatch:
    """Complete the upload and run the lines in the background.

    A line is a JSON object with `skill` ("detect", "point", "query", "caption" or "gaze"), `image` in base64, the
    fields of the route of that skill, and optionally `id`, which the result repeats. Blank lines are skipped.
    """
    store = _store(http)
    batch = store.find_upload(file_id, upload_id)
    etags = {part.partNumber: part.etag for part in body.parts}
    if len(etags) < len(body.parts):
        raise ServerError(400, "the numbers of the parts must be unique", param="parts")
    store.start(batch, etags)
    return StartedBatch(id=batch.id, status=batch.status, size=batch.size)


@router.get("/v1/batch/{file_id}", summary="Status of an uploaded batch", responses=_errors(404))
async def status(file_id: str, http: HttpRequest) -> BatchStatus:
    """Return the status of a batch, and the URLs of its results when it is completed."""
    batch = _store(http).find(file_id)
    if batch.status == "uploading":
        raise ServerError(404, f"the upload of batch {file_id} is not complete; complete it with action=mpu-complete")
    outputs = []
    if batch.status == "completed":
        url = get_url_signer(http).url(str(http.base_url), f"{BATCH_OUTPUTS_PATH}/{batch.id}/0")
        outputs.append(BatchOutput(index=0, url=url))
    return BatchStatus(
        id=batch.id,
        status=batch.status,
        size=batch.size,
        progress=BatchProgress(total=batch.total, completed=batch.num_completed, failed=batch.num_failed),
        usage=BatchUsage(**usage_body(batch.usage)),
        outputs=outputs,
        error=None if batch.error is None else BatchError(**error_detail(batch.error)),
        created_at=batch.created_at,
        completed_at=batch.ended_at,
        expires_at=None if batch.ended_at is None else batch.expires_at,
    )


@router.delete("/v1/batch/{file_id}", summary="Delete an uploaded batch", responses=_errors(404))
async def delete(file_id: str, http: HttpRequest) -> DeletedBatch:
    """Cancel and delete a batch, or an upload that is not complete."""
    store = _store(http)
    store.delete(store.find(file_id))
    return DeletedBatch(id=file_id, deleted=True)


@router.get(
    f"{BATCH_OUTPUTS_PATH}/{{file_id}}/{{index}}",
    summary="Results of an uploaded batch",
    response_class=StreamingResponse,
    responses={
        **error_responses(ErrorAnswer, 403, 404, 422, descriptions=_DESCRIPTIONS),
        200: {
            "description": "One result per line.",
            "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        },
    },
)
async def output(file_id: str, index: int, http: HttpRequest, expires: int, signature: str) -> StreamingResponse:
    """Return the results of a batch. The URL is signed, and no API key is required."""
    get_url_signer(http).check(f"{BATCH_OUTPUTS_PATH}/{file_id}/{index}", expires, signature)
    batch = _store(http).find(file_id)
    headers = {"Content-Length": str(batch.output_size)}
    return StreamingResponse(_blocks(batch), media_type="application/x-ndjson", headers=headers)


async def _blocks(batch: UploadedBatch) -> AsyncIterator[bytes]:
    """Yield the results of a batch; reading runs in a thread."""
    blocks = batch.output()
    while block := await asyncio.to_thread(next, blocks, b""):
        yield block


def _check_uploading(batch: UploadedBatch) -> None:
    if batch.status != "uploading":
        raise ServerError(400, f"the upload of batch {batch.id} is complete; create another batch")


def _store(http: HttpRequest) -> BatchStore:
    store: BatchStore = http.app.state.batches
    return store
