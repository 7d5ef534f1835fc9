"""Camera and codec effects on rendered scenes: lighting, blur, noise and JPEG. No effect changes the geometry."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from .backgrounds import add_grain

UInt8 = npt.NDArray[np.uint8]
_RAMP = np.linspace(0, 1, 256, dtype=np.float32)[:, None]


def _relit(image: UInt8, rng: np.random.Generator) -> UInt8:
    """Change gamma, contrast, brightness and white balance, by amounts that keep colors recognizable."""
    gamma, contrast = rng.uniform(0.87, 1.15), rng.uniform(0.85, 1.12)
    balance = rng.uniform(0.97, 1.03, 3)
    levels = ((_RAMP**gamma - 0.5) * contrast + 0.5 + rng.uniform(-0.05, 0.05)) * balance
    table = (levels * 255).clip(0, 255).astype(np.uint8)  # [256, 3]
    return np.asarray(cv2.LUT(image, table[None]), np.uint8)


def _blurred(image: UInt8, rng: np.random.Generator) -> UInt8:
    """Blur like a soft lens, or by downscaling and enlarging."""
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        return np.asarray(cv2.GaussianBlur(image, (3, 3) if height < 300 else (5, 5), float(rng.uniform(0.5, 1.2))))
    scale = float(rng.uniform(0.6, 0.9))
    small = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def _jpeg(image: UInt8, rng: np.random.Generator) -> UInt8:
    """Add JPEG artifacts."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 95))])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None, "OpenCV decodes the JPEG files that it encodes"
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)


def apply_effects(image: UInt8, rng: np.random.Generator) -> UInt8:
    """Apply random camera effects to an image. Many images stay unchanged.

    Args:
        image: [H, W, 3] uint8, RGB.
        rng: Source of randomness.
    """
    relight, blur, noise, jpeg = (rng.random(4) < (0.4, 0.15, 0.2, 0.15)).tolist()
    if relight:
        image = _relit(image, rng)
    if blur:
        image = _blurred(image, rng)
    if noise:
        image = add_grain(image, rng, float(rng.uniform(2, 10)), mono=rng.random() < 0.4)
    if jpeg:
        image = _jpeg(image, rng)
    return image
