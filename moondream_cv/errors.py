"""The errors that this package raises on purpose.

Arguments out of range raise `ValueError`; everything else that can go wrong while a model is loaded or run is a
`MoondreamError`. Messages name the value received and the way out.
"""


class MoondreamError(Exception):
    """Base class of the package's own errors."""


class ImageError(MoondreamError, ValueError):
    """An image that cannot be read, has no pixels, or has too many."""


class SchemaError(MoondreamError, ValueError):
    """A JSON schema that is invalid, unsupported or too complex to constrain an answer."""


class CheckpointError(MoondreamError):
    """A checkpoint, adapter or tokenizer that is missing, damaged or does not fit; the message names file or key."""


class BackendError(MoondreamError):
    """A remote model that is unreachable, refuses or answers nonsense; the message names the URL, never the key."""


class BackendTimeout(BackendError):
    """A remote model that did not answer within its time-out."""


class UnsupportedSkill(MoondreamError):
    """A skill that a model lacks; the message names one that has it."""


class RequestCancelled(MoondreamError):
    """A request that was cancelled before it was complete."""


class VideoError(MoondreamError):
    """A video that cannot be opened, read on or written; the message names the source or the target."""
