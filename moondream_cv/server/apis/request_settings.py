"""Parsing of the sampling settings that clients send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moondream_cv.requests import Settings
from moondream_cv.server.errors import ServerError

MAX_CROPS = 12  # as in training; more crops are slower and use memory that other requests need


def parse_settings(values: Mapping[str, Any] | None) -> Settings:
    """Return the settings of a request. Unknown keys and null values are ignored.

    Args:
        values: Settings as the client sent them.

    Raises:
        ServerError: 400; a value is out of range, or `variant` selects an adapter.
    """
    given = {key: value for key, value in (values or {}).items() if value is not None}
    if given.pop("variant", None) is not None:
        raise ServerError(400, "this server has no adapters; leave settings.variant out", param="settings")
    try:
        settings = Settings.of(given, ignore_unknown=True)
    except ValueError as error:
        raise ServerError(400, f"settings: {error}", param="settings") from error
    if settings.max_crops is not None and settings.max_crops > MAX_CROPS:
        settings = replace(settings, max_crops=MAX_CROPS)
    return settings
