"""Parsing of the sampling settings and of the model names that clients send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moondream_cv.requests import Request, Settings
from moondream_cv.server.checkpoints import Checkpoint, parse_checkpoint
from moondream_cv.server.errors import ServerError

MAX_CROPS = 12  # as in training; more crops are slower and use memory that other requests need


def parse_settings(values: Mapping[str, Any] | None) -> Settings:
    """Return the settings of a request. Unknown keys and null values are ignored.

    Args:
        values: Settings as the client sent them.

    Raises:
        ServerError: 400; a value is out of range, or `variant` is not "ID@STEP" of a checkpoint.
    """
    given = {key: value for key, value in (values or {}).items() if value is not None}
    if "variant" in given:
        given["variant"] = _parse_variant(given["variant"])
    try:
        settings = Settings.of(given, ignore_unknown=True)
    except ValueError as error:
        raise ServerError(400, f"settings: {error}", param="settings") from error
    if settings.max_crops is not None and settings.max_crops > MAX_CROPS:
        settings = replace(settings, max_crops=MAX_CROPS)
    return settings


def with_checkpoint(request: Request, checkpoint: Checkpoint | None) -> Request:
    """Return a request that uses a checkpoint.

    Args:
        request: The request.
        checkpoint: The checkpoint that the model name selects; None: the settings decide.
    """
    if checkpoint is None:
        return request
    return replace(request, settings=replace(request.settings, variant=checkpoint.variant))


def _parse_variant(value: object) -> str:
    """Return the name of a checkpoint. Other names could be paths or hosted adapters, which clients cannot select."""
    checkpoint = parse_checkpoint(value) if isinstance(value, str) else None
    if checkpoint is None:
        raise ServerError(
            400,
            "this server has no adapters except checkpoints of finetunes; settings.variant must be "
            f"FINETUNE_ID@STEP, got {value!r:.100}",
            param="settings",
        )
    return checkpoint.variant
