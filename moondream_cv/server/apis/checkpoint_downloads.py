"""Files of checkpoints in the format of `torch.save`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastapi.responses import StreamingResponse

from moondream_cv.server.apis.signed_urls import CHECKPOINTS_PATH
from moondream_cv.server.checkpoints import Checkpoint

CHUNK = 2**20  # bytes


def download_path(checkpoint: Checkpoint) -> str:
    """Return the path of the file of a checkpoint."""
    return f"{CHECKPOINTS_PATH}/{checkpoint.finetune_id}/{checkpoint.step}"


async def torch_file_response(file: Path, name: str) -> StreamingResponse:
    """Return a checkpoint as a file of `torch.save`: {"lora_state_dict": tensors by name}.

    Args:
        file: The checkpoint as safetensors.
        name: File name for the client.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
    """
    content, size = await asyncio.to_thread(_convert, file)
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(_chunks(content), media_type="application/octet-stream", headers=headers)


def _convert(file: Path) -> tuple[IO[bytes], int]:
    import torch
    from safetensors.torch import load_file

    content = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `_chunks`
    try:
        torch.save({"lora_state_dict": load_file(file)}, content)
        size = content.tell()
        content.seek(0)
    except BaseException:
        content.close()
        raise
    return content, size


def _chunks(content: IO[bytes]) -> Iterator[bytes]:
    with content:
        while chunk := content.read(CHUNK):
            yield chunk
