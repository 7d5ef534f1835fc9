"""Exceptions of the tuning API, one per cause, so that a server can map each class to a status."""

from __future__ import annotations

from moondream_cv.errors import MoondreamError


class FinetuneNotFound(MoondreamError):
    """A finetune or a checkpoint does not exist (404)."""


class FinetuneConflict(MoondreamError):
    """A finetune of the same name has another rank or model (409)."""


class FinetuneGone(MoondreamError):
    """A checkpoint was deleted, or the latest one was, so that training cannot resume (410)."""


class FinetuneStoreLocked(MoondreamError):
    """Another process uses the folder with the finetunes."""


class FinetuneStoreError(MoondreamError):
    """The folder with the finetunes cannot be read or written: the disk is full, or files are damaged or missing."""
