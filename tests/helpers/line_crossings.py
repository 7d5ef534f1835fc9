"""Line crossings in rendered clips."""

from __future__ import annotations

from moondream_cv.scenes import Clip


def true_crossings(clip: Clip, x: int) -> tuple[int, int]:
    """Return how often a whole box crosses a vertical line to the right, and how often to the left.

    Args:
        clip: Rendered clip.
        x: Column of the line in pixels.
    """
    is_left: dict[int, bool] = {}  # the side on which each object was last completely
    counts = [0, 0]
    for _, objects in clip.frames():
        for item in objects:
            left, _, right, _ = item.xyxy
            if right < x or left > x:
                counts[right < x] += is_left.get(item.track_id, right < x) != (right < x)
                is_left[item.track_id] = right < x
    return counts[0], counts[1]
