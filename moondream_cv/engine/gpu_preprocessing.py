"""Crops of an image, resized on the device of the model instead of by Pillow.

A Lanczos filter along one axis is a matrix product: each output pixel is a weighted sum of input pixels. The order of
the axes is that of `crops.py`. As in Pillow, weights are multiples of 2^-22 and values are rounded between the axes.

float32 represents such sums only after the weights are split into high and low bits, with one product for each. Then
the crops are those of `crops.cut_crops`; in images that shrink to less than a tenth, single pixels may differ by one
gray level. TF32 does not change the products, because pixels and both parts of the weights have at most 11 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moondream_cv.engine.crops import rows_first, tiling_of
from moondream_cv.model.config import VisionConfig

LANCZOS_SUPPORT = 3  # pixels on each side of the center of the filter
WEIGHT_BITS, LOW_BITS = 22, 11  # bits of a weight behind the binary point, as in Pillow; bits of its low part


def cut_crops_on_device(
    rgb: Tensor, config: VisionConfig, max_crops: int | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Resize an image and cut it, as `crops.cut_crops` does.

    Args:
        rgb: [H, W, 3] uint8 RGB on any device with float64.
        config: Sizes of a crop, its patches and the overlap.
        max_crops: Maximum number of local crops; None: the number the model was trained with.

    Returns:
        [1 + rows · columns, crop_size, crop_size, 3] uint8 crops on the same device, and (rows, columns).

    Raises:
        ValueError: `max_crops` is not positive.
    """
    rows, columns = tiling_of(rgb.shape[0], rgb.shape[1], config, max_crops)
    size, margin = config.crop_size, 2 * config.overlap_margin * config.enc_patch_size
    window = size - margin
    planes = rgb.permute(2, 0, 1).float()
    crops = [resize(planes, size, size)]
    if (rows, columns) == (1, 1):  # the only local crop equals the global one
        crops *= 2
    else:
        resized = resize(planes, columns * window + margin, rows * window + margin)
        corners = [(row * window, column * window) for row in range(rows) for column in range(columns)]
        crops += [resized[:, top : top + size, left : left + size] for top, left in corners]
    return torch.stack([crop.permute(1, 2, 0).to(torch.uint8) for crop in crops]), (rows, columns)


def resize(planes: Tensor, width: int, height: int) -> Tensor:
    """Resize an image with a Lanczos filter.

    Args:
        planes: [C, H, W] float32 gray levels.
        width: New width in pixels.
        height: New height in pixels.

    Returns:
        [C, height, width] float32 gray levels, rounded.
    """
    if rows_first(planes.shape[2], planes.shape[1], width, height):
        return _resize_columns(_resize_rows(planes, height), width)
    return _resize_rows(_resize_columns(planes, width), height)


def lanczos_weights(before: int, after: int, device: torch.device) -> Tensor:
    """Return the matrix that resizes one axis, as Pillow computes it.

    The filter is three pixels wide on each side, in the coarser one of the two grids. The weights of an output pixel
    add up to 1, apart from rounding.

    Args:
        before: Number of input pixels.
        after: Number of output pixels.
        device: Device of the matrix.

    Returns:
        [after, before] float64 whole multiples of 2^-WEIGHT_BITS, multiplied by 2^WEIGHT_BITS.
    """
    scale = before / after
    filter_scale = max(scale, 1.0)
    support = LANCZOS_SUPPORT * filter_scale
    center = (torch.arange(after, device=device, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(before, device=device, dtype=torch.float64)
    start, stop = (center - support + 0.5).trunc(), (center + support + 0.5).trunc()
    offset = (pixel - center + 0.5) / filter_scale  # [after, before]
    inside = (pixel >= start) & (pixel < stop) & (offset >= -LANCZOS_SUPPORT) & (offset < LANCZOS_SUPPORT)
    weights = (torch.sinc(offset) * torch.sinc(offset / LANCZOS_SUPPORT)).masked_fill_(~inside, 0.0)
    scaled = weights / weights.sum(1, keepdim=True) * 2**WEIGHT_BITS
    return (scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)).trunc_()  # halves away from 0


def _resize_rows(planes: Tensor, height: int) -> Tensor:
    """[C, H, W] → [C, height, W]."""
    if planes.shape[1] == height:
        return planes
    high, low = _split(lanczos_weights(planes.shape[1], height, planes.device))
    return _round(high @ planes, low @ planes)


def _resize_columns(planes: Tensor, width: int) -> Tensor:
    """[C, H, W] → [C, H, width]."""
    if planes.shape[2] == width:
        return planes
    high, low = _split(lanczos_weights(planes.shape[2], width, planes.device))
    return _round(planes @ high.T, planes @ low.T)


def _split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split weights into float32 whole numbers, high · 2^LOW_BITS + low."""
    high = (weights / 2**LOW_BITS).round()
    return high.float(), (weights - high * 2**LOW_BITS).float()


def _round(high: Tensor, low: Tensor) -> Tensor:
    """Combine the sums over both parts of the weights and round to whole gray levels, halves up."""
    sums = high.double().mul_(2**LOW_BITS).add_(low)
    return sums.div_(2**WEIGHT_BITS).add_(0.5).floor_().clamp_(0, 255).float()
