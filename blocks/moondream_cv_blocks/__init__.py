"""Moondream 2 as blocks for Roboflow Workflows: `WORKFLOWS_PLUGINS=moondream_cv_blocks`.

The engine asks this module for blocks, and for what they are made with: `models`, the `ModelPool` that all blocks of
the process share. An init parameter `moondream_cv_blocks.models` puts another one in its place.
"""

from __future__ import annotations

from typing import Any

from .pool import ModelPool, shared_pool

__all__ = ["REGISTERED_INITIALIZERS", "ModelPool", "load_blocks"]

REGISTERED_INITIALIZERS = {"models": shared_pool}


def load_blocks() -> list[type[Any]]:
    """The blocks of this plugin.

    Raises:
        ImportError: There is no workflows engine; names the extra that brings one.
    """
    from .caption import CaptionBlock
    from .detect import DetectBlock
    from .point import PointBlock
    from .query import QueryBlock
    from .track import TrackBlock

    return [DetectBlock, PointBlock, QueryBlock, CaptionBlock, TrackBlock]
