"""`Zones`: count objects that cross lines and enter polygons.

The position of an object is the bottom center of its box, unless the file has other anchors. `crossings` detects line
crossings, and `sv.PolygonZone` the boxes inside a zone. The counts are stored here, so they survive a change of
resolution.
"""

from __future__ import annotations

import json
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.video.drawing.crossings import MAX_TRACKS, LineCrossings
from moondream_cv.video.drawing.zone_files import LineEntry, ZoneEntry, check_zone_file, zone_schema


class Shape(NamedTuple):
    """Line or zone to draw.

    Attributes:
        points: [K, 2] int32 pixels: the start and end of a line, or the corners of a zone.
        closed: Whether the shape is a zone.
        text: Name and counts.
    """

    points: npt.NDArray[np.int32]
    closed: bool
    text: str


class _Line:
    """Line with its crossings so far."""

    def __init__(self, entry: LineEntry) -> None:
        self.name, self.points = entry.name, entry.array()
        self._entry = entry
        self._crossings: LineCrossings | None = None
        self.crossed_in: Counter[str] = Counter()
        self.crossed_out: Counter[str] = Counter()

    @property
    def text(self) -> str:
        return f"{self.name}: {self.crossed_in.total()} in, {self.crossed_out.total()} out"

    def build(self, points: npt.NDArray[np.float64], resolution_wh: tuple[int, int]) -> None:
        self._crossings = LineCrossings(
            points,
            resolution_wh,
            anchors=_positions(self._entry.triggering_anchors),
            threshold=self._entry.minimum_crossing_threshold,
            distance=self._entry.minimum_crossing_distance,
        )

    def update(self, detections: sv.Detections, names: npt.NDArray[np.object_]) -> None:
        assert self._crossings is not None, "built before the first update"
        crossed_in, crossed_out = self._crossings.update(np.asarray(detections.xyxy, np.float64), track_ids(detections))
        self.crossed_in.update(names[crossed_in].tolist())
        self.crossed_out.update(names[crossed_out].tolist())

    def counts(self) -> dict[str, Any]:
        classes = sorted({*self.crossed_in, *self.crossed_out})
        return {
            "in": self.crossed_in.total(),
            "out": self.crossed_out.total(),
            "classes": {name: {"in": self.crossed_in[name], "out": self.crossed_out[name]} for name in classes},
        }

    def reset(self) -> None:
        self._crossings = None
        self.crossed_in.clear()
        self.crossed_out.clear()


class _Area:
    """Polygon with the objects inside and the IDs of all objects that have been inside."""

    def __init__(self, entry: ZoneEntry) -> None:
        self.name, self.points = entry.name, entry.array()
        self._entry = entry
        self._zone: sv.PolygonZone | None = None
        self._presence = _Presence(entry.minimum_crossing_threshold)
        self.now: Counter[str] = Counter()
        self.ids: set[int] = set()

    @property
    def text(self) -> str:
        seen = f" ({len(self.ids)} so far)" if self.ids else ""
        return f"{self.name}: {self.now.total()}{seen}"

    def build(self, points: npt.NDArray[np.float64], resolution_wh: tuple[int, int]) -> None:
        anchors = _positions(self._entry.triggering_anchors)
        self._zone = sv.PolygonZone(np.rint(points).astype(np.int64), triggering_anchors=anchors)

    def update(self, detections: sv.Detections, names: npt.NDArray[np.object_]) -> None:
        assert self._zone is not None, "built before the first update"
        ids = track_ids(detections)
        inside = self._presence.update(self._zone.trigger(detections), ids)
        self.now = Counter(names[inside].tolist())
        self.ids.update(ids[inside & (ids >= 0)].tolist())

    def counts(self) -> dict[str, Any]:
        return {"now": self.now.total(), "ids": len(self.ids), "classes": dict(sorted(self.now.items()))}

    def reset(self) -> None:
        self._zone = None
        self._presence = _Presence(self._entry.minimum_crossing_threshold)
        self.now.clear()
        self.ids.clear()


class _Presence:
    """Tracks in a zone, which enter after `threshold` consecutive frames inside and leave after as many outside."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._tracks: OrderedDict[int, tuple[bool, int]] = (
            OrderedDict()
        )  # in the zone, and consecutive frames of the opposite

    def update(self, inside: npt.NDArray[np.bool_], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which boxes count as in the zone, [N]. Boxes without a track ID count immediately.

        Args:
            inside: [N] whether each box is inside on this frame.
            ids: [N] track IDs; negative if there is none.
        """
        if self._threshold == 1:
            return inside
        counted = inside.copy()
        for index in np.flatnonzero(ids >= 0):
            present, run = self._tracks.pop(int(ids[index]), (False, 0))
            run = run + 1 if inside[index] != present else 0
            if run >= self._threshold:
                present, run = not present, 0
            self._tracks[int(ids[index])] = present, run
            counted[index] = present
        while len(self._tracks) > MAX_TRACKS + len(ids):
            self._tracks.popitem(last=False)
        return counted


class Zones:
    """Lines and zones of one stream with their counts. Create them with `Zones.read` or `Zones.from_dict`.

    Seen from a line's start to its end, a crossing to the left counts as in and a crossing to the right as out. At a
    line from left to right, upwards is in. An object that jitters on a line does not count, because it must be clear of
    the line by a fraction of its box (`minimum_crossing_distance`).
    """

    def __init__(self, lines: Sequence[_Line], areas: Sequence[_Area], *, normalized: bool, source: str) -> None:
        self._lines, self._areas = tuple(lines), tuple(areas)
        self._items: tuple[_Line | _Area, ...] = (*self._lines, *self._areas)
        self._normalized, self._source = normalized, source
        self._resolution_wh: tuple[int, int] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Zones:
        """Read a zone file in JSON. `from_dict` describes the format.

        Args:
            path: Path of the file; `~` is expanded.

        Raises:
            VideoError: The file cannot be read, or is not JSON.
            ValueError: The content is invalid. The message has the file and the place in it.
        """
        name = os.fspath(path)
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
            data = json.loads(text, object_pairs_hook=_without_duplicates)
        except OSError as error:
            raise VideoError(f"{name}: the zones cannot be read: {error.strerror or error}") from error
        except _DuplicateKey as error:
            raise ValueError(f"{name}: {error}") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
            raise VideoError(f"{name} is not JSON: {error}") from error
        return cls.from_dict(data, source=name)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "zones") -> Zones:
        """Create zones from the contents of a zone file.

        Args:
            data: `{"lines": [{"name": "door", "start": [x, y], "end": [x, y]}],
                "zones": [{"name": "queue", "polygon": [[x, y], ...]}]}`. One of the two keys may be omitted.
                Coordinates are pixels, or fractions of the frame's width and height with `"normalized": true`. Lines
                and zones have the options `triggering_anchors` and `minimum_crossing_threshold`, lines also
                `minimum_crossing_distance`. `json_schema` describes all keys.
            source: Name of the data in messages.

        Raises:
            ValueError: A key is unknown or missing, two lines or two zones have the same name, a value is out of range,
                a line has no length, or a polygon has no area.
        """
        file = check_zone_file(data, source)
        lines, areas = [_Line(entry) for entry in file.lines], [_Area(entry) for entry in file.zones]
        return cls(lines, areas, normalized=file.has_fractions, source=source)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON schema (draft 2020-12) of zone files, for editors and validators."""
        return zone_schema()

    def __repr__(self) -> str:
        names = ", ".join(repr(item.name) for item in self._items)
        return f"Zones({len(self._lines)} lines, {len(self._areas)} zones: {names})"

    def update(self, detections: sv.Detections, resolution_wh: tuple[int, int]) -> None:
        """Count one frame. Call this for every frame, including frames without detections.

        Args:
            detections: Boxes in pixels. Objects without a track ID (None or -1) count in zones, but not at lines.
            resolution_wh: Width and height of the frame.

        Raises:
            ValueError: A line or zone is outside a frame of this size.
        """
        if resolution_wh != self._resolution_wh:
            for item in self._items:
                item.build(self._pixels(item, resolution_wh), resolution_wh)
            self._resolution_wh = resolution_wh
        names = np.array(class_names(detections), dtype=object)
        for item in self._items:
            item.update(detections, names)

    def counts(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return all counts as JSON-compatible values.

        Returns:
            `{"lines": {name: {"in": 3, "out": 1, "classes": {"dog": {"in": 3, "out": 1}}}},
            "zones": {name: {"now": 2, "ids": 5, "classes": {"dog": 2}}}}`. Lines have their crossings so far. Zones
            have the number of objects inside on the last frame, the number of track IDs that have been inside, and the
            classes of the objects inside.
        """
        return {
            "lines": {line.name: line.counts() for line in self._lines},
            "zones": {area.name: area.counts() for area in self._areas},
        }

    def reset(self) -> None:
        """Reset all counts, for another stream."""
        for item in self._items:
            item.reset()
        self._resolution_wh = None

    def shapes(self, resolution_wh: tuple[int, int]) -> list[Shape]:
        """Return the lines and zones to draw, lines first.

        Args:
            resolution_wh: Width and height of the frame.

        Raises:
            ValueError: A line or zone is outside a frame of this size.
        """
        return [
            Shape(np.rint(self._pixels(item, resolution_wh)).astype(np.int32), isinstance(item, _Area), item.text)
            for item in self._items
        ]

    def _pixels(self, item: _Line | _Area, resolution_wh: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Return the points of a line or zone in pixels, [K, 2]."""
        size = np.array(resolution_wh, np.float64)
        points = item.points * size if self._normalized else item.points
        outside = (points.max(0) < 0) | (points.min(0) > size)
        # The mask of a zone extends to its last corner, so a distant corner would need unlimited memory.
        if outside.any() or (points < -size).any() or (points > 2 * size).any():
            kind = "zone" if isinstance(item, _Area) else "line"
            corners = ", ".join(f"[{x:g}, {y:g}]" for x, y in points[:4])
            raise ValueError(
                f'{self._source}: {kind} "{item.name}" at {corners} is outside a frame of '
                f"{resolution_wh[0]}x{resolution_wh[1]} pixels; correct it, or use fractions and "
                '"normalized": true for all sizes'
            )
        return points


def class_names(detections: sv.Detections, classes: Sequence[str] = ()) -> list[str]:
    """Return a name for each object: its `class_name`, the name of its class ID, "class ID", or "object"."""
    given = detections.data.get("class_name")
    if given is not None:
        return [str(name) for name in given]
    if detections.class_id is None:
        return ["object"] * len(detections)
    ids = detections.class_id.tolist()
    return [classes[number] if 0 <= number < len(classes) else f"class {number}" for number in ids]


def track_ids(detections: sv.Detections) -> npt.NDArray[np.int64]:
    """Return the track ID of each object, [N]; negative if it has none or is unconfirmed."""
    if detections.tracker_id is None:
        return np.full(len(detections), -1)
    return np.asarray(detections.tracker_id, np.int64)


def _positions(anchors: Sequence[str]) -> list[sv.Position]:
    return [sv.Position(anchor) for anchor in anchors]


class _DuplicateKey(Exception):
    """A JSON object has a key twice; Python would keep the last one."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(f'an object has the key "{key}" twice; merge them')
        found[key] = value
    return found
