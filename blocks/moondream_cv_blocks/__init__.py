"""Moondream 2 as blocks for Roboflow Workflows: `WORKFLOWS_PLUGINS=moondream_cv_blocks`.

The engine asks this module for blocks, and for what they are made with: `models`, the `ModelPool` that all blocks of
the process share. An init parameter `moondream_cv_blocks.models` puts another one in its place.
"""

from __future__ import annotations

import logging
from typing import Any

from .pool import ModelPool, environment_problems, shared_pool

logger = logging.getLogger(__name__)

_logged: set[str] = set()  # problems with environment variables

__all__ = ["REGISTERED_INITIALIZERS", "ModelPool", "load_blocks"]


def process_pool() -> ModelPool:
    """Return the pool that all blocks of the process share.

    Raises:
        WorkflowEnvironmentConfigurationError: An environment variable has an invalid value; servers return its message.
    """
    try:
        return shared_pool()
    except ValueError as error:
        from .roboflow import WorkflowEnvironmentConfigurationError

        raise WorkflowEnvironmentConfigurationError(
            public_message=str(error), context="workflow_compilation | steps_initialisation", inner_error=error
        ) from error


REGISTERED_INITIALIZERS = {"models": process_pool}


def load_blocks() -> list[type[Any]]:
    """Return the blocks of this plugin, and log environment variables with invalid values once.

    Raises:
        ImportError: There is no workflows engine; names the extra that brings one.
    """
    from .caption import CaptionBlock
    from .detect import DetectBlock
    from .point import PointBlock
    from .query import QueryBlock
    from .track import TrackBlock

    for problem in environment_problems():
        if problem not in _logged:
            _logged.add(problem)
            logger.error("%s", problem)
    return [DetectBlock, PointBlock, QueryBlock, CaptionBlock, TrackBlock]
