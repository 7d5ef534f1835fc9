"""Logging of a server: one JSON object per line with the request ID, or text for terminals.

Clients cannot forge lines or send escape sequences to a terminal: JSON is ASCII, and text is escaped.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

from moondream_cv.escaping import EscapingFormatter

request_id: ContextVar[str | None] = ContextVar("moondream_cv_request_id", default=None)
client_address: ContextVar[str] = ContextVar("moondream_cv_client_address", default="")  # from `address_group`


class _RequestIdFilter(logging.Filter):
    """Adds the ID of the current request to log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        current = request_id.get()
        if current is not None:
            record.request_id = current
        vars(record).pop("color_message", None)  # a copy of the message that uvicorn adds
        return True


def set_up_logging(level: str = "INFO", as_json: bool = True) -> None:
    """Log this package, uvicorn, and warnings of other libraries to standard error.

    Args:
        level: Minimum level, by name, such as "INFO".
        as_json: Whether to write one JSON object per line; otherwise, lines of text.
    """
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestIdFilter())
    if as_json:
        renamed = {"levelname": "level", "name": "logger", "asctime": "time"}
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=renamed))
    else:
        handler.setFormatter(EscapingFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    for name in ("moondream_cv", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    if logging.lastResort is not None:  # for other loggers, such as asyncio's: their tracebacks can quote client data
        logging.lastResort.setFormatter(handler.formatter)
