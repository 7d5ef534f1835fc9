"""Moondream 2 blocks for Roboflow Workflows. Enable them with `WORKFLOWS_PLUGINS=moondream_cv_blocks`.

The workflows engine imports this module, calls `load_blocks`, and passes the initializer `models` to each block: the
`ModelPool` that all blocks of the process share. The init parameter `moondream_cv_blocks.models` replaces that pool.
"""

from __future__ import annotations

import logging
from typing import Any

from .pool import ModelPool, environment_problems, shared_pool

logger = logging.getLogger(__name__)

_logged: set[str] = set()  # messages about environment variables that were logged already

__all__ = ["REGISTERED_INITIALIZERS", "ModelPool", "load_blocks"]


def process_pool() -> ModelPool:
    """Return the pool that all blocks of the process share.

    Raises:
        WorkflowEnvironmentConfigurationError: An environment variable has an invalid value. Servers return the message.
    """
    try:
        return shared_pool()
    except ValueError as error:
        from .roboflow import WorkflowEnvironmentConfigurationError

        raise WorkflowEnvironmentConfigurationError(
            public_message=str(error), context="workflow_compilation | steps_initialisation", inner_error=error
        ) from error


REGISTERED_INITIALIZERS = {"models": process_pool}
"""Initializers of the plugin, by name, as the workflows engine reads them."""


def load_blocks() -> list[type[Any]]:
    """Return the blocks of this plugin. Invalid environment variables are logged once.

    Raises:
        ImportError: The workflows engine is not installed.
    """
    from .caption import CaptionBlock
    from .detect import DetectBlock
    from .point import PointBlock
    from .query import QueryBlock
    from .segment import SegmentBlock
    from .track import TrackBlock

    for problem in environment_problems():
        if problem not in _logged:
            _logged.add(problem)
            logger.error("%s", problem)
    return [DetectBlock, PointBlock, QueryBlock, CaptionBlock, TrackBlock, SegmentBlock]
