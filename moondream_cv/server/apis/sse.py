"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse


def event(data: dict[str, Any] | str) -> bytes:
    """Return one event; a dict is encoded as JSON.

    JSON is encoded in ASCII, because some clients decode each network packet separately and some treat U+2028 as a line
    break. Moondream's clients require the space after the colon.
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Return a response that sends events as they are generated and disables buffering in proxies."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
