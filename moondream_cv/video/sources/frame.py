"""`Frame`: one picture of a source, and when it was taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a source.

    Attributes:
        image: [H, W, 3] uint8 BGR.
        index: Its number among the frames that the source gave, from 0.
        time: Seconds since the source's first frame; it never falls.
        duration: Seconds for which the source shows the image; None if it does not say.
    """

    image: npt.NDArray[np.uint8]
    index: int
    time: float
    duration: float | None = None
