"""Logs of a server: one JSON object per line with the request's ID, or text for terminals.

Clients cannot forge lines or send escape sequences to a terminal: JSON is ASCII, and text is escaped.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

from moondream_cv.escaping import EscapingFormatter

request_id: ContextVar[str | None] = ContextVar("moondream_cv_request_id", default=None)
client_address: ContextVar[str] = ContextVar("moondream_cv_client_address", default="")  # as `address_group` gives it


class _WithRequestId(logging.Filter):
    """Adds the id of the request that is being answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        found = request_id.get()
        if found is not None:
            record.request_id = found
        vars(record).pop("color_message", None)  # uvicorn's, which says the message once more
        return True


def set_up_logging(level: str = "INFO", as_json: bool = True) -> None:
    """Send everything that this package and uvicorn log to standard error, and warnings of other libraries.

    Args:
        level: A level of `logging`, by name.
        as_json: One JSON object a line; else text for a person.
    """
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_WithRequestId())
    if as_json:
        renamed = {"levelname": "level", "name": "logger", "asctime": "time"}
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=renamed))
    else:
        handler.setFormatter(EscapingFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    for name in ("moondream_cv", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    if logging.lastResort is not None:  # for other loggers, such as asyncio's, whose tracebacks may quote client data
        logging.lastResort.setFormatter(handler.formatter)
