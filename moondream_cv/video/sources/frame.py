"""`Frame`: an image of a source with its index and time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Frame:
    """An image of a source.

    Attributes:
        image: [H, W, 3] uint8 BGR.
        index: Index among the frames that the source returned, from 0.
        time: Seconds since the first frame of the source. Times never decrease.
        duration: Seconds for which the source shows the image; None if unknown.
    """

    image: npt.NDArray[np.uint8]
    index: int
    time: float
    duration: float | None = None
