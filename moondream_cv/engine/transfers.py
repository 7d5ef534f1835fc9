"""Transfers from the host to a device that do not wait for the device.

A copy from ordinary memory to a CUDA device waits until all work queued before it is done. A copy from page-locked
memory joins the queue. torch caches page-locked memory and reuses it once the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device.

    Args:
        array: uint8 array of any shape, contiguous or not. It may be modified as soon as the call returns.
        device: Target device.
    """
    staged = torch.empty(array.shape, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


def integers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return an int64 tensor of numbers on a device.

    Args:
        values: Numbers, or rows of numbers of the same length.
        device: Target device.
    """
    staged = torch.tensor(values, dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
    return staged.to(device, non_blocking=True)
