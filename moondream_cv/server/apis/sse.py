"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse


def event(data: dict[str, Any] | str) -> bytes:
    """One event; a dict is sent as JSON.

    In ASCII alone: some clients decode each part that the network hands them by itself, and some take U+2028 for the
    end of a line. The space behind the colon is one that Moondream's clients insist on.
    """
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """A response that sends events as they come, and that no proxy on the way holds back."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
