"""Names of Roboflow's workflows engine that the blocks use, from either package that contains it.

The engine is in the distribution `roboflow-workflows`. Before version 1.6 of `inference`, it was part of `inference`.
"""

from __future__ import annotations

try:
    from roboflow_workflows import environment
    from roboflow_workflows.core_steps.common.utils import attach_parents_coordinates_to_sv_detections
    from roboflow_workflows.errors import WorkflowEnvironmentConfigurationError
    from roboflow_workflows.execution_engine import constants
    from roboflow_workflows.execution_engine.entities import types
    from roboflow_workflows.execution_engine.entities.base import (
        Batch,
        OutputDefinition,
        VideoMetadata,
        WorkflowImageData,
    )
    from roboflow_workflows.prototypes import block as prototypes
    from roboflow_workflows.prototypes.block import BlockResult, WorkflowBlock, WorkflowBlockManifest
except ModuleNotFoundError as missing:
    if missing.name != "roboflow_workflows":
        raise
    try:
        from inference.core import env as environment
        from inference.core.workflows.core_steps.common.utils import attach_parents_coordinates_to_sv_detections
        from inference.core.workflows.errors import WorkflowEnvironmentConfigurationError
        from inference.core.workflows.execution_engine import constants
        from inference.core.workflows.execution_engine.entities import types
        from inference.core.workflows.execution_engine.entities.base import (
            Batch,
            OutputDefinition,
            VideoMetadata,
            WorkflowImageData,
        )
        from inference.core.workflows.prototypes import block as prototypes
        from inference.core.workflows.prototypes.block import BlockResult, WorkflowBlock, WorkflowBlockManifest
    except ModuleNotFoundError as error:
        if error.name != "inference":
            raise
        raise ImportError(
            'these blocks require Roboflow\'s workflows engine: pip install "moondream-cv[workflows]"'
        ) from error

__all__ = [
    "ENGINE_VERSIONS",
    "TENSORS",
    "Batch",
    "BlockResult",
    "OutputDefinition",
    "VideoMetadata",
    "WorkflowBlock",
    "WorkflowBlockManifest",
    "WorkflowEnvironmentConfigurationError",
    "WorkflowImageData",
    "attach_parents_coordinates_to_sv_detections",
    "constants",
    "prototypes",
    "types",
]

ENGINE_VERSIONS = ">=1.3.0,<2.0.0"

TENSORS = bool(getattr(environment, "ENABLE_TENSOR_DATA_REPRESENTATION", False))
"""Whether predictions in this process are tensors instead of `sv.Detections`; off by default in the engine."""
