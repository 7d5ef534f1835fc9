"""Exceptions of labeling."""

from __future__ import annotations

from moondream_cv.errors import MoondreamError


class LabelingError(MoondreamError):
    """A dataset cannot be labeled or exported: an input, a name, a setting or the target folder is unsuitable."""
