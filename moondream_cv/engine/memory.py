"""Detection of out-of-memory errors, and release of the memory that they keep."""

from __future__ import annotations

import traceback

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device or this machine has run out of memory.

    CUDA raises a dedicated exception; CPU and MPS raise a `RuntimeError` with a message.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def free_after(error: BaseException, device: torch.device) -> None:
    """Free the memory that the stack frames of an error reference, and the device memory that torch caches.

    Args:
        error: A caught error, with its causes.
        device: Device whose cached memory is freed.
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
