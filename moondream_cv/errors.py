"""Exceptions of the package.

Invalid arguments raise `ValueError`; errors of loading or running a model raise a `MoondreamError`. Messages contain
the value received and how to fix the error.
"""


class MoondreamError(Exception):
    """Base class of all errors of the package."""


class ImageError(MoondreamError, ValueError):
    """An image cannot be read, has no pixels, or has too many."""


class SchemaError(MoondreamError, ValueError):
    """A JSON schema is invalid, unsupported or too complex."""


class CheckpointError(MoondreamError):
    """A checkpoint, adapter or tokenizer is missing, damaged or incompatible; the message names the file or key."""


class BackendError(MoondreamError):
    """A server is unreachable, returns an error or an invalid response; the message has its URL, but not the key."""


class BackendTimeout(BackendError):
    """A server did not respond within the timeout."""


class UnsupportedSkill(MoondreamError):
    """A model does not have a skill; the message names an alternative."""


class RequestCancelled(MoondreamError):
    """A request was cancelled before it was complete."""


class VideoError(MoondreamError):
    """A video cannot be opened, read or written; the message names the source or the target."""
