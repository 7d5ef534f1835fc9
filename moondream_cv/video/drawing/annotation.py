"""Drawing what was found into a frame: boxes, labels, traces, dots, and what is to be hidden.

Boxes and dots are supervision's annotators. Labels, traces and hiding are drawn here, because labels must not leave the
picture or cover each other, a trace must not join two places between which an object was lost, and what is hidden must
be unreadable in boxes of every size. Reading, detecting, tracking, counting and writing are left to others.
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
from moondream_cv.video.drawing.panel import BGR, BLACK, WHITE, Panel, Pen, Picture, paste
from moondream_cv.video.drawing.zones import Shape, Zones, class_names, track_ids

KINDS = ("box", "label", "trace", "dot", "blur", "pixelate")
"""What can be drawn; "none" stands for nothing."""

_COLORS = (*sv.ColorPalette.DEFAULT.colors, sv.Color(150, 150, 150))  # the last is for rows without an id
_PALETTE = sv.ColorPalette(list(_COLORS))
_BGR: tuple[BGR, ...] = tuple(color.as_bgr() for color in _COLORS)
_NO_ID = len(_COLORS) - 1

_TRACE_SECONDS = 2.0
_FRAME_SECONDS = 1 / 30  # of a frame whose time is not told

Rectangle = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


@renamed_arguments(colour_by="color_by")
class Annotator:
    """Draws detections into the frames of one stream.

        annotator = Annotator("box,label,trace", detector.classes)
        shown = annotator(frame.image, detections, frame.time)

    It remembers where tracked objects were, and what the panel counts.
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
        """Choose what is drawn.

        Args:
            what: Names, or one text with commas between them, out of box, label, trace, dot, blur and pixelate; or
                "none".
            classes: Class names by class id: for detections without `class_name`, and listed in the panel from the
                start.
            color_by: Whether things of a class or with an id share a color. It is the same in every frame; without an
                id it is gray.
            zones: Lines and zones to draw with their counts. Whoever owns them calls `zones.update`.
            panel: Put a table of counts to the right of the picture, which makes it wider: see `output_wh`.

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
    ) -> Picture:
        """Draw into a copy of a frame.

        Args:
            image: [H, W, 3] uint8 BGR; it is not changed.
            detections: Boxes in pixels. Those without area are drawn as dots. `class_id`, `confidence`, `tracker_id`
                and `data["class_name"]` may be missing; an id of -1 counts as none.
            time: Seconds since the start, for the length of traces; where it stands still, a frame counts as 1/30 s.
                When it falls, another stream begins, and traces and panel start anew.
            redaction: Boxes that blur and pixelate hide, in place of those of `detections`: see `Tracked.redaction`.

        Returns:
            A new picture, [H, W, 3] uint8 BGR; with a panel, as wide as `output_wh` says.

        Raises:
            ValueError: The image is something else, or a line or zone lies outside it.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"the image must be [H, W, 3] uint8 BGR, not {list(image.shape)} {image.dtype}")
        if time < self._time:
            self.reset()
        self._time = time
        resolution_wh = (image.shape[1], image.shape[0])
        pen = Pen.for_resolution(resolution_wh)
        canvas = self._canvas(image)
        picture = canvas[:, : image.shape[1]]
        finite = np.isfinite(detections.xyxy).all(1)
        if not finite.all():
            detections = _select(detections, finite)
        self._hide(picture, detections if redaction is None else redaction)
        self._draw(picture, detections, pen, time)
        if self._panel is not None:
            self._panel.update(detections)
            self._panel.draw(canvas[:, image.shape[1] :], pen, self.zones)
        return canvas

    def output_wh(self, resolution_wh: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height of what frames of a size become. A panel adds an even width, and no height."""
        width, height = resolution_wh
        return (width + Panel.width(resolution_wh) if self._panel is not None else width, height)

    def reset(self) -> None:
        """Forget traces and the panel's counts, for another stream; the zones are their owner's."""
        self._traces = _Traces()
        self._time = -math.inf
        if self._panel is not None:
            self._panel.reset()

    def _canvas(self, image: Picture) -> Picture:
        height, width = image.shape[:2]
        wide = self.output_wh((width, height))[0]
        if wide == width:
            return image.copy()
        canvas = np.empty((height, wide, 3), np.uint8)
        canvas[:, :width] = image
        return canvas

    def _hide(self, picture: Picture, detections: sv.Detections) -> None:
        xyxy = detections.xyxy[np.isfinite(detections.xyxy).all(1)]
        if "blur" in self.what:
            _hide(picture, xyxy, cv2.INTER_CUBIC)
        if "pixelate" in self.what:
            _hide(picture, xyxy, cv2.INTER_NEAREST)

    def _draw(self, picture: Picture, detections: sv.Detections, pen: Pen, time: float) -> None:
        height, width = picture.shape[:2]
        shapes = self.zones.shapes((width, height)) if self.zones is not None else []
        for shape in shapes:
            _draw_shape(picture, shape, pen)
        if "trace" in self.what:
            self._traces.update(detections, time, (width, height))
            colors = self._colors(detections)
            for tracker_id, color in zip(track_ids(detections).tolist(), colors.tolist(), strict=True):
                self._traces.draw(picture, tracker_id, _BGR[color], pen.line)
        left, top, right, bottom = detections.xyxy.T
        seen = _select(detections, (right >= 0) & (bottom >= 0) & (left <= width) & (top <= height))
        self._draw_marks(picture, seen, pen)
        plates = _shape_plates(shapes, pen, (width, height))
        if "label" in self.what:
            self._draw_labels(picture, seen, pen, [place for place, _ in plates])
        for place, text in plates:
            paste(picture, pen.plate(text, BLACK), place[0], place[1])

    def _draw_marks(self, picture: Picture, detections: sv.Detections, pen: Pen) -> None:
        height, width = picture.shape[:2]
        colors = self._colors(detections)
        # Half of a line lies outside its box; without this inset, what reaches the edge would lose a side.
        inset = (pen.line - 1) // 2
        xyxy = np.clip(detections.xyxy, inset, np.maximum(np.array([width, height] * 2) - 1 - pen.line // 2, inset))
        flat = _is_flat(detections.xyxy)
        boxes, dots = ~flat & ("box" in self.what), flat & ("box" in self.what) | ("dot" in self.what)
        if boxes.any():
            sv.BoxAnnotator(_PALETTE, pen.line).annotate(
                picture, sv.Detections(xyxy[boxes]), custom_color_lookup=colors[boxes]
            )
        if dots.any():
            sv.DotAnnotator(
                _PALETTE, _radius(pen), outline_thickness=max(1, pen.line // 2), outline_color=sv.Color.WHITE
            ).annotate(picture, sv.Detections(detections.xyxy[dots]), custom_color_lookup=colors[dots])

    def _draw_labels(self, picture: Picture, detections: sv.Detections, pen: Pen, taken: list[Rectangle]) -> None:
        height, width = picture.shape[:2]
        longest = min(width, max(width // 2, 14 * pen.text))
        colors = self._colors(detections).tolist()
        flat = _is_flat(detections.xyxy).tolist()
        names = class_names(detections, self.classes)
        taken = list(taken)
        for row in _label_order(detections):
            text = pen.shorten(names[row], longest, _id_and_score(detections, row))
            if not text:
                continue
            plate = pen.plate(text, _BGR[colors[row]])
            grown = _radius(pen) + 1 if flat[row] else (pen.line - 1) // 2
            left, top, right, bottom = np.clip(detections.xyxy[row], 0, (width, height, width, height)).tolist()
            mark = (int(left) - grown, int(top) - grown, int(right) + grown + 1, int(bottom) + grown + 1)
            place = _place(_around(mark, plate.shape[1], plate.shape[0]), plate, taken, (width, height))
            paste(picture, plate, place[0], place[1])
            taken.append(place)

    def _colors(self, detections: sv.Detections) -> npt.NDArray[np.int64]:
        """Return the number of each row's color in the palette, [N]."""
        if self._by_id:
            ids = track_ids(detections)
            return np.where(ids >= 0, ids % _NO_ID, _NO_ID)
        if detections.class_id is None:
            return np.zeros(len(detections), np.int64)
        return np.asarray(detections.class_id % _NO_ID, np.int64)


@dataclass
class _Trace:
    points: deque[tuple[float, float, float]] = field(default_factory=deque)  # clock, x, y
    frame: int = 0  # in which it grew last


class _Traces:
    """Where each tracked object was in the last seconds."""

    def __init__(self) -> None:
        self._traces: dict[int, _Trace] = {}
        self._time: float | None = None
        self._clock, self._frame = 0.0, 0

    def update(self, detections: sv.Detections, time: float, resolution_wh: tuple[int, int]) -> None:
        """Take in the rows of a frame that have an id."""
        step = 0.0 if self._time is None else time - self._time
        self._time = time
        self._clock += step if step > 0 else _FRAME_SECONDS
        self._frame += 1
        for tracker_id, box in zip(track_ids(detections).tolist(), detections.xyxy.tolist(), strict=True):
            if tracker_id < 0:
                continue
            left, top, right, bottom = box
            trace = self._traces.setdefault(tracker_id, _Trace())
            # As in `Zones`, an object is where its box stands.
            self._extend(trace, (left + right) / 2, bottom, max(right - left, bottom - top), min(resolution_wh))
        for key, trace in list(self._traces.items()):
            while trace.points and trace.points[0][0] < self._clock - _TRACE_SECONDS:
                trace.points.popleft()
            if not trace.points:
                del self._traces[key]

    def _extend(self, trace: _Trace, x: float, y: float, size: float, shorter_side: int) -> None:
        if trace.points:
            _, last_x, last_y = trace.points[-1]
            # A small thing may be fast, so that only a leap counts from frame to frame; after it was lost, less does.
            nearby = max(2 * size, shorter_side / 3) if trace.frame == self._frame - 1 else 1.5 * size
            if math.hypot(x - last_x, y - last_y) > nearby:
                trace.points.clear()
        trace.points.append((self._clock, x, y))
        trace.frame = self._frame

    def draw(self, picture: Picture, tracker_id: int, color: BGR, thickness: int) -> None:
        """Draw the trace of an id."""
        trace = self._traces.get(tracker_id)
        if trace is None or len(trace.points) < 2:
            return
        # Four bits after the point keep slow objects from moving in steps.
        points = np.array([point[1:] for point in trace.points])
        fixed = np.rint(np.clip(points, -20000, 20000) * 16).astype(np.int32)
        cv2.polylines(picture, [fixed], False, color, thickness, cv2.LINE_AA, shift=4)


def _parse(what: str | Sequence[str]) -> frozenset[str]:
    names = [name.strip() for name in what.split(",")] if isinstance(what, str) else list(what)
    if names == ["none"]:
        return frozenset()
    for name in names:
        if name not in KINDS:
            raise ValueError(f'what to draw: {name!r} is unknown; known are {", ".join(KINDS)}, or "none" alone')
    return frozenset(names)


def _id_and_score(detections: sv.Detections, row: int) -> str:
    """Return what follows the name on a label."""
    text = ""
    tracker_id = int(track_ids(detections)[row])
    if tracker_id >= 0:
        text += f" #{tracker_id}"
    if detections.confidence is not None:
        text += f" {float(detections.confidence[row]):.2f}"
    return text


def _label_order(detections: sv.Detections) -> list[int]:
    """Return the rows in the order of their ids: labels keep their places when only the order of the rows changes."""
    order: list[int] = np.argsort(track_ids(detections), kind="stable").tolist()
    return order


def _is_flat(xyxy: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which boxes have no area, [N]."""
    return np.asarray((xyxy[:, 2] <= xyxy[:, 0]) | (xyxy[:, 3] <= xyxy[:, 1]))


def _radius(pen: Pen) -> int:
    return 2 * pen.line + 1


def _select(detections: sv.Detections, chosen: npt.NDArray[np.bool_]) -> sv.Detections:
    if chosen.all():
        return detections
    selected = detections[chosen]
    assert isinstance(selected, sv.Detections), "indexed by rows"
    return selected


def _hide(picture: Picture, xyxy: npt.NDArray[Any], interpolation: int) -> None:
    """Leave of each box only the mean colors of a few cells, smooth or as squares by the interpolation.

    There are at most 4 cells along the shorter side and 8 along the longer, none smaller than 4 pixels, so that a face
    is unreadable in a box of any size, and also in the strip that remains of it at the edge of the frame.
    """
    height, width = picture.shape[:2]
    for left, top, right, bottom in xyxy.tolist():
        box_width, box_height = right - left, bottom - top
        cell = max(4.0, min(box_width, box_height) / 4, max(box_width, box_height) / 8)
        x1, y1 = max(0, math.floor(left)), max(0, math.floor(top))
        x2, y2 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
        if x1 >= x2 or y1 >= y2:
            continue
        region = picture[y1:y2, x1:x2]
        cells = (max(1, int((x2 - x1) / cell)), max(1, int((y2 - y1) / cell)))
        means = cv2.resize(region, cells, interpolation=cv2.INTER_AREA)
        region[:] = cv2.resize(means, (x2 - x1, y2 - y1), interpolation=interpolation)


def _draw_shape(picture: Picture, shape: Shape, pen: Pen) -> None:
    """Draw a line or zone in white with a dark edge, which shows on every ground; an arrow points in across a line."""
    strokes = [shape.points]
    if not shape.closed:
        strokes += _arrow(shape.points, 8 * pen.line)
    for color, thickness in ((BLACK, pen.line + 2 * max(1, pen.line // 2)), (WHITE, pen.line)):
        for stroke in strokes:
            cv2.polylines(picture, [stroke], shape.closed, color, thickness, cv2.LINE_AA)


def _arrow(points: npt.NDArray[np.int32], length: float) -> list[npt.NDArray[np.int32]]:
    """Return the strokes of an arrow from the middle of a line to the side that is in."""
    start, end = points.astype(np.float64)
    along = (end - start) / max(1.0, math.hypot(*(end - start)))  # fractions may round to the same pixel
    inwards = np.array([along[1], -along[0]])
    middle = (start + end) / 2
    tip = middle + length * inwards
    wings = [tip - 0.5 * length * (inwards + side * along) for side in (-1, 1)]
    return [np.rint(stroke).astype(np.int32) for stroke in ([middle, tip], [wings[0], tip, wings[1]])]


def _shape_plates(shapes: Sequence[Shape], pen: Pen, resolution_wh: tuple[int, int]) -> list[tuple[Rectangle, str]]:
    """Find a place for each shape's name and counts."""
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
        # In the worst case, down the sides of the picture.
        places += [(x, y) for x in (0, width) for y in range(0, height, size_wh[1])]
        plates.append((_place(places, plate, [place for place, _ in plates], resolution_wh), text))
    return plates


def _grown(x: int, y: int, by: int) -> Rectangle:
    return (x - by, y - by, x + by, y + by)


def _around(mark: Rectangle, width: int, height: int) -> list[tuple[int, int]]:
    """Return where a plate of a size may stand (left and top), the best place first."""
    left, top, right, bottom = mark
    return [(x, y) for y in (top - height, bottom, top, bottom - height) for x in (left, right - width)]


def _place(
    corners: Iterable[tuple[int, int]], plate: Picture, taken: Sequence[Rectangle], resolution_wh: tuple[int, int]
) -> Rectangle:
    """Move the corners into the picture; return where the plate hides least of what is taken, the first of equals."""
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
