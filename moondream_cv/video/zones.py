"""Lines that objects cross and areas that they stand in: read from JSON, counted frame by frame.

An object is where the middle of its box's lower edge is, for lines and for zones. What crosses and what stands inside
is decided by `sv.LineZone` and `sv.PolygonZone`; the sums are kept here, so that they outlast a change of resolution.
Drawing is left to `Annotator`.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.errors import VideoError

_ANCHOR = (sv.Position.BOTTOM_CENTER,)


class Shape(NamedTuple):
    """A line or zone as it is drawn.

    Attributes:
        points: [K, 2] int32 pixels; of a line, its start and end.
        closed: Whether it is a zone.
        text: Its name and counts.
    """

    points: npt.NDArray[np.int32]
    closed: bool
    text: str


class _Line:
    """A line with what crossed it so far."""

    def __init__(self, name: str, points: npt.NDArray[np.float64]) -> None:
        self.name, self.points = name, points
        self.zone: sv.LineZone | None = None
        self.crossed_in: Counter[str] = Counter()
        self.crossed_out: Counter[str] = Counter()

    @property
    def text(self) -> str:
        return f"{self.name}: {self.crossed_in.total()} in, {self.crossed_out.total()} out"

    def build(self, points: npt.NDArray[np.float64]) -> None:
        start, end = (sv.Point(float(x), float(y)) for x, y in points)
        self.zone = sv.LineZone(start, end, triggering_anchors=_ANCHOR)

    def update(self, detections: sv.Detections, names: npt.NDArray[np.object_]) -> None:
        assert self.zone is not None, "built before the first update"
        ids = track_ids(detections)
        tracked = ids >= 0  # the others have no history, so that they cannot cross
        crossed_in, crossed_out = self.zone.trigger(sv.Detections(detections.xyxy[tracked], tracker_id=ids[tracked]))
        self.crossed_in.update(names[tracked][crossed_in].tolist())
        self.crossed_out.update(names[tracked][crossed_out].tolist())

    def counts(self) -> dict[str, Any]:
        classes = sorted({*self.crossed_in, *self.crossed_out})
        return {
            "in": self.crossed_in.total(),
            "out": self.crossed_out.total(),
            "classes": {name: {"in": self.crossed_in[name], "out": self.crossed_out[name]} for name in classes},
        }

    def reset(self) -> None:
        self.zone = None
        self.crossed_in.clear()
        self.crossed_out.clear()


class _Area:
    """A polygon with what stands in it, and what ever did."""

    def __init__(self, name: str, points: npt.NDArray[np.float64]) -> None:
        self.name, self.points = name, points
        self.zone: sv.PolygonZone | None = None
        self.now: Counter[str] = Counter()
        self.ids: set[int] = set()

    @property
    def text(self) -> str:
        seen = f" ({len(self.ids)} so far)" if self.ids else ""
        return f"{self.name}: {self.now.total()}{seen}"

    def build(self, points: npt.NDArray[np.float64]) -> None:
        self.zone = sv.PolygonZone(np.rint(points).astype(np.int64), triggering_anchors=_ANCHOR)

    def update(self, detections: sv.Detections, names: npt.NDArray[np.object_]) -> None:
        assert self.zone is not None, "built before the first update"
        inside = self.zone.trigger(detections)
        self.now = Counter(names[inside].tolist())
        ids = track_ids(detections)
        self.ids.update(ids[inside & (ids >= 0)].tolist())

    def counts(self) -> dict[str, Any]:
        return {"now": self.now.total(), "ids": len(self.ids), "classes": dict(sorted(self.now.items()))}

    def reset(self) -> None:
        self.zone = None
        self.now.clear()
        self.ids.clear()


class Zones:
    """Lines and zones of one stream, with their counts; made by `Zones.read` or `Zones.from_dict`.

    Seen by somebody who walks a line from its start to its end, what crosses to the left is counted as in, to the
    right as out: of a line drawn from left to right, upwards is in.
    """

    def __init__(self, lines: Sequence[_Line], areas: Sequence[_Area], *, normalised: bool, source: str) -> None:
        self._lines, self._areas = tuple(lines), tuple(areas)
        self._items: tuple[_Line | _Area, ...] = (*self._lines, *self._areas)
        self._normalised, self._source = normalised, source
        self._resolution_wh: tuple[int, int] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Zones:
        """Read a JSON file; see `from_dict` for what it holds.

        Raises:
            VideoError: The file cannot be read, or is not JSON.
            ValueError: It holds something else; the message names the file and the place in it.
        """
        name = os.fspath(path)
        try:
            data = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise VideoError(f"{name}: the zones cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
            raise VideoError(f"{name} is not JSON: {error}") from error
        return cls.from_dict(data, source=name)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "zones") -> Zones:
        """Make zones of what a JSON file would hold.

        Args:
            data: `{"lines": [{"name": "door", "start": [x, y], "end": [x, y]}],
                "zones": [{"name": "queue", "polygon": [[x, y], ...]}]}`, either of which may be left out. Coordinates
                are pixels, or with `"normalised": true` fractions of the frame's width and height.
            source: What messages call it.

        Raises:
            ValueError: A key is unknown or missing, two lines or two zones share a name, a coordinate is not a finite
                number or no fraction where it should be, a line has no length or a polygon no area.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f'{source} must hold an object with "lines" or "zones", not {_shown(data)}')
        _check_keys(data, (), ("lines", "zones", "normalised"), source)
        normalised = data.get("normalised", False)
        if not isinstance(normalised, bool):
            raise ValueError(f'{source}: "normalised" must be true or false, not {_shown(normalised)}')
        lines, areas = [], []
        for where, name, entry in _entries(data, "lines", ("start", "end"), source):
            points = np.array([_point(entry[key], f'{where}: "{key}"', normalised) for key in ("start", "end")])
            if (points[0] == points[1]).all():
                raise ValueError(f"{where}: start and end are the same point, {_shown(entry['start'])}")
            lines.append(_Line(name, points))
        for where, name, entry in _entries(data, "zones", ("polygon",), source):
            areas.append(_Area(name, _polygon(entry["polygon"], where, normalised)))
        if not lines and not areas:
            raise ValueError(f'{source} names neither "lines" nor "zones"; there is nothing to count')
        return cls(lines, areas, normalised=normalised, source=source)

    def __repr__(self) -> str:
        names = ", ".join(repr(item.name) for item in self._items)
        return f"Zones({len(self._lines)} lines, {len(self._areas)} zones: {names})"

    def update(self, detections: sv.Detections, resolution_wh: tuple[int, int]) -> None:
        """Count one frame; once for every frame, those without detections too.

        Args:
            detections: Boxes in pixels. Rows without an id (`tracker_id` None or -1) count in zones, but at no line.
            resolution_wh: Width and height of the frame.

        Raises:
            ValueError: A line or zone lies outside a frame of this size.
        """
        if resolution_wh != self._resolution_wh:
            for item in self._items:
                item.build(self._pixels(item, resolution_wh))
            self._resolution_wh = resolution_wh
        names = np.array(class_names(detections), dtype=object)
        for item in self._items:
            item.update(detections, names)

    def counts(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return all counts, ready for JSON.

        Returns:
            `{"lines": {name: {"in": 3, "out": 1, "classes": {"dog": {"in": 3, "out": 1}}}},
            "zones": {name: {"now": 2, "ids": 5, "classes": {"dog": 2}}}}`: of lines the crossings so far; of zones the
            objects inside in the last frame, the number of different ids that ever were inside, and the classes of
            those inside.
        """
        return {
            "lines": {line.name: line.counts() for line in self._lines},
            "zones": {area.name: area.counts() for area in self._areas},
        }

    def reset(self) -> None:
        """Set all counts to zero, for another stream."""
        for item in self._items:
            item.reset()
        self._resolution_wh = None

    def shapes(self, resolution_wh: tuple[int, int]) -> list[Shape]:
        """Return what there is to draw in a frame of a size, lines first.

        Raises:
            ValueError: A line or zone lies outside a frame of this size.
        """
        return [
            Shape(np.rint(self._pixels(item, resolution_wh)).astype(np.int32), isinstance(item, _Area), item.text)
            for item in self._items
        ]

    def _pixels(self, item: _Line | _Area, resolution_wh: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Return the points of a line or zone in pixels, [K, 2]."""
        size = np.array(resolution_wh, np.float64)
        points = item.points * size if self._normalised else item.points
        outside = (points.max(0) < 0) | (points.min(0) > size)
        # A zone's mask reaches to its last corner, so that a distant one would take memory without end.
        if outside.any() or (points < -size).any() or (points > 2 * size).any():
            kind = "zone" if isinstance(item, _Area) else "line"
            corners = ", ".join(f"[{x:g}, {y:g}]" for x, y in points[:4])
            raise ValueError(
                f'{self._source}: {kind} "{item.name}" at {corners} lies outside a frame of '
                f"{resolution_wh[0]}x{resolution_wh[1]} pixels; correct it, or use fractions and "
                '"normalised": true to fit every size'
            )
        return points


def class_names(detections: sv.Detections, classes: Sequence[str] = ()) -> list[str]:
    """Return a name for each row: its `class_name`, or that of its class id in `classes`, or the id, or "object"."""
    given = detections.data.get("class_name")
    if given is not None:
        return [str(name) for name in given]
    if detections.class_id is None:
        return ["object"] * len(detections)
    ids = detections.class_id.tolist()
    return [classes[number] if 0 <= number < len(classes) else f"class {number}" for number in ids]


def track_ids(detections: sv.Detections) -> npt.NDArray[np.int64]:
    """Return the id of each row, [N]; negative (as trackers give to what they are not sure of) where there is none."""
    if detections.tracker_id is None:
        return np.full(len(detections), -1)
    return np.asarray(detections.tracker_id, np.int64)


def _entries(
    data: Mapping[str, Any], kind: str, keys: tuple[str, ...], source: str
) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return where each line or zone stands, its name and what it holds; its keys and name are checked."""
    entries = data.get(kind, [])
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f'{source}: "{kind}" must be a list, not {_shown(entries)}')
    found: list[tuple[str, str, Mapping[str, Any]]] = []
    for number, entry in enumerate(entries):
        where = f"{source}: {kind}[{number}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} must be an object with {_listed(('name', *keys))}, not {_shown(entry)}")
        _check_keys(entry, ("name", *keys), (), where)
        name = entry["name"]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f'{where}: "name" must be a text that is not empty, not {_shown(name)}')
        if any(name == other for _, other, _ in found):
            raise ValueError(f'{where}: the name "{name}" is taken; each of the {kind} needs its own')
        found.append((f'{where} "{name}"', name, entry))
    return found


def _check_keys(entry: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in needed and key not in optional:
            raise ValueError(f"{where}: unknown key {_shown(key)}; known are {_listed((*needed, *optional))}")
    for key in needed:
        if key not in entry:
            raise ValueError(f'{where}: "{key}" is missing; needed are {_listed(needed)}')


def _polygon(corners: object, where: str, normalised: bool) -> npt.NDArray[np.float64]:
    if not isinstance(corners, (list, tuple)) or len(corners) < 3:
        raise ValueError(f'{where}: "polygon" needs at least 3 corners [x, y], not {_shown(corners)}')
    points = np.array(
        [_point(corner, f"{where}: corner {number}", normalised) for number, corner in enumerate(corners)]
    )
    spread = points - points.mean(0)
    if np.linalg.matrix_rank(spread, tol=1e-9 * max(1.0, float(np.abs(points).max()))) < 2:
        raise ValueError(f"{where}: the corners lie on one line and enclose nothing: {_shown(corners)}")
    if not normalised and points.min() >= 0 and points.max() <= 1:
        raise ValueError(f'{where} is not larger than a pixel; if these are fractions, add "normalised": true')
    return points


def _point(value: object, where: str, normalised: bool) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{where} must be [x, y], not {_shown(value)}")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{where} must be two finite numbers, not {_shown(value)}")
        if normalised and not 0 <= number <= 1:
            raise ValueError(
                f'{where} must be fractions from 0 to 1, because "normalised" is true, not {_shown(value)}'
            )
    return float(value[0]), float(value[1])


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)


def _shown(value: object) -> str:
    """Return a value as JSON has it, shortened so that it fits in a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}..."
