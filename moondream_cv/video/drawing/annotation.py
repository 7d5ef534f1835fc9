"""`Annotator`: draw boxes, labels, traces and dots into frames, and blur or pixelate objects.

Boxes and dots are drawn by supervision. Labels, traces and redaction are implemented here: labels must stay inside the
frame and not cover each other, a trace must not connect positions before and after a lost track, and redacted content
must be unreadable in boxes of every size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv._deprecation import renamed_arguments
from moondream_cv.arguments import check_choice
from moondream_cv.video.drawing.panel import BGR, BLACK, WHITE, BGRImage, Panel, Pen, paste
from moondream_cv.video.drawing.zones import Shape, Zones, class_names, track_ids

KINDS = ("box", "label", "trace", "dot", "blur", "pixelate")
"""Valid annotations; "none" draws nothing."""

_COLORS = (*sv.ColorPalette.DEFAULT.colors, sv.Color(150, 150, 150))  # the last one is for objects without a track ID
_PALETTE = sv.ColorPalette(list(_COLORS))
_BGR: tuple[BGR, ...] = tuple(color.as_bgr() for color in _COLORS)
_NO_ID = len(_COLORS) - 1

_TRACE_SECONDS = 2.0
_FRAME_SECONDS = 1 / 30  # duration of a frame with an unknown time

Rectangle = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


@renamed_arguments(colour_by="color_by")
class Annotator:
    """Draws detections into the frames of one stream.

        annotator = Annotator("box,label,trace", classes)
        annotated = annotator(frame.image, detections, frame.time)

    It stores the traces of tracked objects and the counts of the panel.

    Attributes:
        what: Annotations to draw.
        classes: Class names by class ID.
        zones: Lines and zones to draw; None for none.
    """

    def __init__(
        self,
        what: str | Sequence[str] = ("box", "label"),
        classes: Sequence[str] = (),
        *,
        color_by: Literal["class", "id"] = "class",
        zones: Zones | None = None,
        panel: bool = False,
    ) -> None:
        """Create an annotator for one stream.

        Args:
            what: Any of "box", "label", "trace", "dot", "blur" and "pixelate", as a sequence or as a string separated
                by commas; or "none".
            classes: Class names by class ID, for detections without `class_name`. The panel lists them from the start.
            color_by: Color objects by "class" or by track "id". Objects without a track ID are gray.
            zones: Lines and zones to draw with their counts. The caller updates them with `zones.update`.
            panel: Add a table of counts to the right, which makes the image wider: see `output_wh`.

        Raises:
            ValueError: A name in `what`, or `color_by`, is unknown.
        """
        self.what = _parse(what)
        self.classes = tuple(classes)
        self._by_id = check_choice("color_by", color_by, ("class", "id")) == "id"
        self.zones = zones
        self._panel = Panel(self.classes, None if self._by_id else _BGR[:_NO_ID]) if panel else None
        self._traces = _Traces()
        self._time = -math.inf

    def __call__(
        self,
        image: npt.NDArray[np.uint8],
        detections: sv.Detections,
        time: float = 0.0,
        redaction: sv.Detections | None = None,
    ) -> BGRImage:
        """Draw into a copy of a frame.

        Args:
            image: [H, W, 3] uint8 BGR; not modified.
            detections: Boxes in pixels. Boxes without area are drawn as dots. `class_id`, `confidence`, `tracker_id`
                and `data["class_name"]` are optional; a track ID of -1 means none.
            time: Time of the frame in seconds, for the length of traces. If it does not advance, the frame counts as
                1/30 s. If it decreases, traces and panel are reset for another stream.
            redaction: Boxes to blur or pixelate instead of those of `detections`: see `TrackedFrame.redaction`.

        Returns:
            A new image, [H, W, 3] uint8 BGR, of size `output_wh`.

        Raises:
            ValueError: The image has another shape or type, or a line or zone is outside it.
        """
        if not isinstance(image, np.ndarray):
            raise ValueError(f"image must be [H, W, 3] uint8 BGR, got {type(image).__name__}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"image must be [H, W, 3] uint8 BGR, got {list(image.shape)} {image.dtype}")
        if time < self._time:
            self.reset()
        self._time = time
        resolution_wh = (image.shape[1], image.shape[0])
        pen = Pen.for_resolution(resolution_wh)
        canvas = self._canvas(image)
        frame = canvas[:, : image.shape[1]]
        finite = np.isfinite(detections.xyxy).all(1)
        if not finite.all():
            detections = _select(detections, finite)
        self._redact(frame, detections if redaction is None else redaction)
        self._draw(frame, detections, pen, time)
        if self._panel is not None:
            self._panel.update(detections)
            self._panel.draw(canvas[:, image.shape[1] :], pen, self.zones)
        return canvas

    def output_wh(self, resolution_wh: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height of annotated frames. A panel adds an even width.

        Args:
            resolution_wh: Width and height of the frames.
        """
        width, height = resolution_wh
        return (width + Panel.width(resolution_wh) if self._panel is not None else width, height)

    def reset(self) -> None:
        """Clear the traces and the counts of the panel, for another stream. The zones stay unchanged."""
        self._traces = _Traces()
        self._time = -math.inf
        if self._panel is not None:
            self._panel.reset()

    def _canvas(self, image: BGRImage) -> BGRImage:
        height, width = image.shape[:2]
        wide = self.output_wh((width, height))[0]
        if wide == width:
            return image.copy()
        canvas = np.empty((height, wide, 3), np.uint8)
        canvas[:, :width] = image
        return canvas

    def _redact(self, image: BGRImage, detections: sv.Detections) -> None:
        xyxy = detections.xyxy[np.isfinite(detections.xyxy).all(1)]
        if "blur" in self.what:
            _hide_boxes(image, xyxy, cv2.INTER_CUBIC)
        if "pixelate" in self.what:
            _hide_boxes(image, xyxy, cv2.INTER_NEAREST)

    def _draw(self, image: BGRImage, detections: sv.Detections, pen: Pen, time: float) -> None:
        height, width = image.shape[:2]
        shapes = self.zones.shapes((width, height)) if self.zones is not None else []
        for shape in shapes:
            _draw_shape(image, shape, pen)
        if "trace" in self.what:
            self._traces.update(detections, time, (width, height))
            colors = self._colors(detections)
            for tracker_id, color in zip(track_ids(detections).tolist(), colors.tolist(), strict=True):
                self._traces.draw(image, tracker_id, _BGR[color], pen.line)
        left, top, right, bottom = detections.xyxy.T
        seen = _select(detections, (right >= 0) & (bottom >= 0) & (left <= width) & (top <= height))
        self._draw_marks(image, seen, pen)
        plates = _shape_plates(shapes, pen, (width, height))
        if "label" in self.what:
            self._draw_labels(image, seen, pen, [place for place, _ in plates])
        for place, text in plates:
            paste(image, pen.plate(text, BLACK), place[0], place[1])

    def _draw_marks(self, image: BGRImage, detections: sv.Detections, pen: Pen) -> None:
        height, width = image.shape[:2]
        colors = self._colors(detections)
        # Half of a line is outside its box. Without this inset, a box at the edge of the frame would lose a side.
        inset = (pen.line - 1) // 2
        xyxy = np.clip(detections.xyxy, inset, np.maximum(np.array([width, height] * 2) - 1 - pen.line // 2, inset))
        flat = _is_flat(detections.xyxy)
        boxes, dots = ~flat & ("box" in self.what), flat & ("box" in self.what) | ("dot" in self.what)
        if boxes.any():
            sv.BoxAnnotator(_PALETTE, pen.line).annotate(
                image, sv.Detections(xyxy[boxes]), custom_color_lookup=colors[boxes]
            )
        if dots.any():
            sv.DotAnnotator(
                _PALETTE, _radius(pen), outline_thickness=max(1, pen.line // 2), outline_color=sv.Color.WHITE
            ).annotate(image, sv.Detections(detections.xyxy[dots]), custom_color_lookup=colors[dots])

    def _draw_labels(self, image: BGRImage, detections: sv.Detections, pen: Pen, taken: list[Rectangle]) -> None:
        height, width = image.shape[:2]
        longest = min(width, max(width // 2, 14 * pen.text))
        colors = self._colors(detections).tolist()
        flat = _is_flat(detections.xyxy).tolist()
        names = class_names(detections, self.classes)
        taken = list(taken)
        for index in _label_order(detections):
            text = pen.shorten(names[index], longest, _id_and_score(detections, index))
            if not text:
                continue
            plate = pen.plate(text, _BGR[colors[index]])
            grown = _radius(pen) + 1 if flat[index] else (pen.line - 1) // 2
            left, top, right, bottom = np.clip(detections.xyxy[index], 0, (width, height, width, height)).tolist()
            mark = (int(left) - grown, int(top) - grown, int(right) + grown + 1, int(bottom) + grown + 1)
            place = _place(_around(mark, plate.shape[1], plate.shape[0]), plate, taken, (width, height))
            paste(image, plate, place[0], place[1])
            taken.append(place)

    def _colors(self, detections: sv.Detections) -> npt.NDArray[np.int64]:
        """Return the palette index of each object's color, [N]."""
        if self._by_id:
            ids = track_ids(detections)
            return np.where(ids >= 0, ids % _NO_ID, _NO_ID)
        if detections.class_id is None:
            return np.zeros(len(detections), np.int64)
        return np.asarray(detections.class_id % _NO_ID, np.int64)


@dataclass
class _Trace:
    points: deque[tuple[float, float, float]] = field(default_factory=deque)  # clock, x, y
    frame: int = 0  # number of the last frame with a point


class _Traces:
    """Recent positions of each tracked object."""

    def __init__(self) -> None:
        self._traces: dict[int, _Trace] = {}
        self._time: float | None = None
        self._clock, self._frame = 0.0, 0

    def update(self, detections: sv.Detections, time: float, resolution_wh: tuple[int, int]) -> None:
        """Add the tracked objects of a frame."""
        step = 0.0 if self._time is None else time - self._time
        self._time = time
        self._clock += step if step > 0 else _FRAME_SECONDS
        self._frame += 1
        for tracker_id, box in zip(track_ids(detections).tolist(), detections.xyxy.tolist(), strict=True):
            if tracker_id < 0:
                continue
            left, top, right, bottom = box
            trace = self._traces.setdefault(tracker_id, _Trace())
            # As in `Zones`, the position is the bottom center of the box.
            self._extend(trace, (left + right) / 2, bottom, max(right - left, bottom - top), min(resolution_wh))
        for key, trace in list(self._traces.items()):
            while trace.points and trace.points[0][0] < self._clock - _TRACE_SECONDS:
                trace.points.popleft()
            if not trace.points:
                del self._traces[key]

    def _extend(self, trace: _Trace, x: float, y: float, size: float, shorter_side: int) -> None:
        if trace.points:
            _, last_x, last_y = trace.points[-1]
            # Small objects may be fast, so between consecutive frames only a large jump starts a new trace.
            nearby = max(2 * size, shorter_side / 3) if trace.frame == self._frame - 1 else 1.5 * size
            if math.hypot(x - last_x, y - last_y) > nearby:
                trace.points.clear()
        trace.points.append((self._clock, x, y))
        trace.frame = self._frame

    def draw(self, image: BGRImage, tracker_id: int, color: BGR, thickness: int) -> None:
        """Draw the trace of a track ID."""
        trace = self._traces.get(tracker_id)
        if trace is None or len(trace.points) < 2:
            return
        # Four fractional bits keep the motion of slow objects smooth.
        points = np.array([point[1:] for point in trace.points])
        fixed = np.rint(np.clip(points, -20000, 20000) * 16).astype(np.int32)
        cv2.polylines(image, [fixed], False, color, thickness, cv2.LINE_AA, shift=4)


def _parse(what: str | Sequence[str]) -> frozenset[str]:
    names = [name.strip() for name in what.split(",")] if isinstance(what, str) else list(what)
    if names == ["none"]:
        return frozenset()
    for name in names:
        if name not in KINDS:
            raise ValueError(f'annotation {name!r} is unknown; use any of {", ".join(KINDS)}, or "none" alone')
    return frozenset(names)


def _id_and_score(detections: sv.Detections, index: int) -> str:
    """Return the track ID and the confidence for a label."""
    text = ""
    tracker_id = int(track_ids(detections)[index])
    if tracker_id >= 0:
        text += f" #{tracker_id}"
    if detections.confidence is not None:
        text += f" {float(detections.confidence[index]):.2f}"
    return text


def _label_order(detections: sv.Detections) -> list[int]:
    """Return the indices sorted by track ID, so that labels keep their places if only the order of objects changes."""
    order: list[int] = np.argsort(track_ids(detections), kind="stable").tolist()
    return order


def _is_flat(xyxy: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return whether each box has no area, [N]."""
    return np.asarray((xyxy[:, 2] <= xyxy[:, 0]) | (xyxy[:, 3] <= xyxy[:, 1]))


def _radius(pen: Pen) -> int:
    return 2 * pen.line + 1


def _select(detections: sv.Detections, chosen: npt.NDArray[np.bool_]) -> sv.Detections:
    if chosen.all():
        return detections
    selected = detections[chosen]
    assert isinstance(selected, sv.Detections), "indexed by a mask"
    return selected


def _hide_boxes(image: BGRImage, xyxy: npt.NDArray[Any], interpolation: int) -> None:
    """Replace each box by the mean colors of a few cells, smooth or as squares depending on the interpolation.

    A box has at most 4 cells along its shorter side and 8 along its longer side, of at least 4 pixels each. So a face
    is unreadable in a box of any size, including the visible strip of a box at the edge of the frame.
    """
    height, width = image.shape[:2]
    for left, top, right, bottom in xyxy.tolist():
        box_width, box_height = right - left, bottom - top
        cell = max(4.0, min(box_width, box_height) / 4, max(box_width, box_height) / 8)
        x1, y1 = max(0, math.floor(left)), max(0, math.floor(top))
        x2, y2 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
        if x1 >= x2 or y1 >= y2:
            continue
        region = image[y1:y2, x1:x2]
        cells = (max(1, int((x2 - x1) / cell)), max(1, int((y2 - y1) / cell)))
        means = cv2.resize(region, cells, interpolation=cv2.INTER_AREA)
        region[:] = cv2.resize(means, (x2 - x1, y2 - y1), interpolation=interpolation)


def _draw_shape(image: BGRImage, shape: Shape, pen: Pen) -> None:
    """Draw a line or zone in white with a dark edge. A line has an arrow to its in side."""
    strokes = [shape.points]
    if not shape.closed:
        strokes += _arrow(shape.points, 8 * pen.line)
    for color, thickness in ((BLACK, pen.line + 2 * max(1, pen.line // 2)), (WHITE, pen.line)):
        for stroke in strokes:
            cv2.polylines(image, [stroke], shape.closed, color, thickness, cv2.LINE_AA)


def _arrow(points: npt.NDArray[np.int32], length: float) -> list[npt.NDArray[np.int32]]:
    """Return the strokes of an arrow from the middle of a line to its in side."""
    start, end = points.astype(np.float64)
    along = (end - start) / max(1.0, math.hypot(*(end - start)))  # both ends may round to the same pixel
    inwards = np.array([along[1], -along[0]])
    middle = (start + end) / 2
    tip = middle + length * inwards
    wings = [tip - 0.5 * length * (inwards + side * along) for side in (-1, 1)]
    return [np.rint(stroke).astype(np.int32) for stroke in ([middle, tip], [wings[0], tip, wings[1]])]


def _shape_plates(shapes: Sequence[Shape], pen: Pen, resolution_wh: tuple[int, int]) -> list[tuple[Rectangle, str]]:
    """Return the place and the text of the plate with each shape's name and counts."""
    plates: list[tuple[Rectangle, str]] = []
    width, height = resolution_wh
    for shape in shapes:
        text = pen.shorten(shape.text, width)
        plate = pen.plate(text, BLACK)
        size_wh = (plate.shape[1], plate.shape[0])
        top = shape.points[:, 1].argmin()
        anchors = [shape.points[top], *shape.points, shape.points.mean(0)]
        if not shape.closed:
            anchors = [shape.points[0], shape.points[1]]
        places = [place for x, y in anchors for place in _around(_grown(int(x), int(y), 2 * pen.line), *size_wh)]
        # If nothing else is free, use the sides of the frame.
        places += [(x, y) for x in (0, width) for y in range(0, height, size_wh[1])]
        plates.append((_place(places, plate, [place for place, _ in plates], resolution_wh), text))
    return plates


def _grown(x: int, y: int, by: int) -> Rectangle:
    return (x - by, y - by, x + by, y + by)


def _around(mark: Rectangle, width: int, height: int) -> list[tuple[int, int]]:
    """Return candidate positions (left and top) of a plate next to a mark, the best one first."""
    left, top, right, bottom = mark
    return [(x, y) for y in (top - height, bottom, top, bottom - height) for x in (left, right - width)]


def _place(
    corners: Iterable[tuple[int, int]], plate: BGRImage, taken: Sequence[Rectangle], resolution_wh: tuple[int, int]
) -> Rectangle:
    """Return the candidate position, moved into the frame, at which the plate overlaps the taken places least."""
    height, width = plate.shape[:2]
    first = np.array(list(corners), np.int64)  # [K, 2]
    first = np.clip(first, 0, np.maximum(0, np.array(resolution_wh) - (width, height)))
    best = 0
    if taken:
        others = np.array(taken)[None]  # [1, M, 4]
        low = np.maximum(first[:, None], others[..., :2])
        high = np.minimum(first[:, None] + (width, height), others[..., 2:])
        best = int(np.maximum(high - low, 0).prod(2).sum(1).argmin())
    x, y = first[best].tolist()
    return (x, y, x + width, y + height)
