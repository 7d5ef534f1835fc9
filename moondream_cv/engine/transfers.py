"""Transfers between the host and a device that do not wait for the device.

A copy between ordinary memory and a CUDA device waits until all work queued before it is done. A copy with page-locked
memory joins the queue. torch caches page-locked memory and reuses it once the copies are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device.

    Args:
        array: uint8 array of any shape, contiguous or not. It may be modified as soon as the call returns.
        device: Target device.
    """
    is_cuda = device.type == "cuda"
    staged = torch.empty(array.shape, dtype=torch.uint8, device="cpu", pin_memory=is_cuda)
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=is_cuda)


class HostCopy:
    """Copy of a tensor on the host, which may be in progress."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy.

        Args:
            tensor: Tensor of any shape on any device.
        """
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._values = tensor.tolist()
            return
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._tensor.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> list[Any]:
        """Wait for this copy, but not for later work of the device, and return the values as nested lists."""
        if self._event is not None:
            self._event.synchronize()
            self._values, self._event = self._tensor.tolist(), None
        values: list[Any] = self._values
        return values


def integers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return an int64 tensor of numbers, or of rows of numbers, on a device."""
    return _numbers(values, torch.long, device)


def floats(values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a floating-point tensor of numbers, or of rows of numbers, on a device."""
    return _numbers(values, dtype, device)


def _numbers(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    is_cuda = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=is_cuda).to(device, non_blocking=is_cuda)
