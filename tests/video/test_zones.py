"""Lines and zones. Run with `pytest tests/video/test_zones.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.video.zones import Zones

pytestmark = pytest.mark.compat

SIZE = (200, 100)
DOOR = {"name": "door", "start": [0, 50], "end": [200, 50]}
QUEUE = {"name": "queue", "polygon": [[0, 0], [100, 0], [100, 100], [0, 100]]}


def standing(
    feet: Sequence[tuple[float, float]], ids: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> sv.Detections:
    """Boxes of 10×20 pixels that stand at points."""
    names = names or ["dog"] * len(feet)
    xyxy = np.array([(x - 5, y - 20, x + 5, y) for x, y in feet], np.float32).reshape(-1, 4)
    return sv.Detections(
        xyxy,
        confidence=np.ones(len(feet), np.float32),
        class_id=np.array([("dog", "cat").index(name) for name in names], int),
        tracker_id=None if ids is None else np.array(ids, int),
        data={"class_name": np.array(names, dtype=str)},
    )


def walk(zones: Zones, *frames: sv.Detections) -> dict[str, Any]:
    for detections in frames:
        zones.update(detections, SIZE)
    return zones.counts()


def test_a_line_counts_what_crosses_it_by_direction_and_class() -> None:
    up = [standing([(50, y), (150, 110 - y)], [1, 2], ["dog", "cat"]) for y in (80, 60, 40, 20)]
    assert walk(Zones.from_dict({"lines": [DOOR]}), *up)["lines"]["door"] == {
        "in": 1,
        "out": 1,
        "classes": {"cat": {"in": 0, "out": 1}, "dog": {"in": 1, "out": 0}},
    }


def test_coming_back_counts_as_well() -> None:
    there_and_back = [standing([(50, y)], [7]) for y in (80, 30, 80, 30)]
    counts = walk(Zones.from_dict({"lines": [DOOR]}), *there_and_back)["lines"]["door"]
    assert (counts["in"], counts["out"]) == (2, 1)


def test_passing_beside_a_line_does_not_count() -> None:
    short = {"name": "door", "start": [0, 50], "end": [100, 50]}
    counts = walk(Zones.from_dict({"lines": [short]}), *[standing([(150, y)], [7]) for y in (80, 60, 40, 20)])
    assert (counts["lines"]["door"]["in"], counts["lines"]["door"]["out"]) == (0, 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ids", [None, [-1]])
def test_without_an_id_nothing_crosses_but_zones_count(ids: list[int] | None) -> None:
    zones = Zones.from_dict({"lines": [DOOR], "zones": [QUEUE]})
    counts = walk(zones, *[standing([(50, y)], ids) for y in (80, 60, 40, 20)])
    assert counts["lines"]["door"] == {"in": 0, "out": 0, "classes": {}}
    assert counts["zones"]["queue"] == {"now": 1, "ids": 0, "classes": {"dog": 1}}


def test_a_row_without_an_id_takes_nothing_from_the_others() -> None:
    frames = [standing([(20, 110 - y), (50, y)], [-1, 3], ["cat", "dog"]) for y in (80, 60, 40)]
    counts = walk(Zones.from_dict({"lines": [DOOR]}), *frames)
    assert counts["lines"]["door"]["classes"] == {"dog": {"in": 1, "out": 0}}


def test_a_zone_counts_what_is_inside_now_and_the_ids_that_ever_were() -> None:
    zones = Zones.from_dict({"zones": [QUEUE]})
    counts = walk(
        zones,
        standing([(50, 50), (60, 60), (150, 50)], [1, 2, 3], ["dog", "cat", "dog"]),
        standing([(50, 50), (160, 60), (150, 50)], [1, 2, 3], ["dog", "cat", "dog"]),
        standing([(50, 50), (70, 60), (30, 50)], [1, 4, -1], ["dog", "cat", "dog"]),
    )
    assert counts["zones"]["queue"] == {"now": 3, "ids": 3, "classes": {"cat": 1, "dog": 2}}
    assert walk(zones, sv.Detections.empty())["zones"]["queue"] == {"now": 0, "ids": 3, "classes": {}}


def test_an_object_is_where_its_box_stands() -> None:
    lower_half = {"name": "floor", "polygon": [[0, 50], [200, 50], [200, 100], [0, 100]]}
    zones = Zones.from_dict({"zones": [lower_half]})
    assert walk(zones, standing([(50, 55), (50, 45)]))["zones"]["floor"]["now"] == 1  # most of both lies above


def test_fractions_fit_every_size_and_counts_outlast_a_change() -> None:
    zones = Zones.from_dict(
        {
            "normalised": True,
            "lines": [{"name": "door", "start": [0, 0.5], "end": [1, 0.5]}],
            "zones": [{"name": "left", "polygon": [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]}],
        }
    )
    for (width, height), names in (((200, 100), "dog"), ((640, 480), "cat")):
        for y in (0.9, 0.7, 0.3):
            detections = standing([(0.25 * width, y * height)], [5], [names])
            zones.update(detections, (width, height))
    counts = zones.counts()
    assert counts["lines"]["door"]["classes"] == {"cat": {"in": 1, "out": 0}, "dog": {"in": 1, "out": 0}}
    assert counts["zones"]["left"] == {"now": 1, "ids": 1, "classes": {"cat": 1}}
    assert zones.shapes((640, 480))[0].points.tolist() == [[0, 240], [640, 240]]
    assert zones.shapes((640, 480))[1].text == "left: 1 (1 so far)"


def test_reset_begins_at_zero() -> None:
    zones = Zones.from_dict({"lines": [DOOR], "zones": [QUEUE]})
    empty = zones.counts()
    assert walk(zones, *[standing([(50, y)], [1]) for y in (80, 20)]) != empty
    zones.reset()
    assert zones.counts() == empty
    assert walk(zones, standing([(50, 80)], [1]))["lines"]["door"]["in"] == 0  # what was seen before is forgotten


def test_counts_are_ready_for_json(tmp_path: Path) -> None:
    path = tmp_path / "zones.json"
    path.write_text(json.dumps({"lines": [DOOR], "zones": [QUEUE]}), encoding="utf-8-sig")
    zones = Zones.read(path)
    assert repr(zones) == "Zones(1 lines, 1 zones: 'door', 'queue')"
    counts = walk(zones, *[standing([(50, y)], [1]) for y in (80, 20)])
    assert json.loads(json.dumps(counts)) == counts
    unnamed = sv.Detections(np.array([[0, 0, 10, 10]], np.float32))
    zones.update(unnamed, SIZE)
    assert zones.counts()["zones"]["queue"]["classes"] == {"object": 1}


def line(**changes: object) -> dict[str, Any]:
    return {"lines": [{**DOOR, **changes}]}


def zone(polygon: object, **more: object) -> dict[str, Any]:
    return {"zones": [{"name": "queue", "polygon": polygon}], **more}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r'must hold an object with "lines" or "zones", not \[\]'),
        ({}, 'names neither "lines" nor "zones"'),
        ({"line": []}, 'unknown key "line"; known are "lines", "zones", "normalised"'),
        ({"lines": {}}, r'"lines" must be a list, not \{\}'),
        ({"lines": [5]}, r'lines\[0\] must be an object with "name", "start", "end", not 5'),
        (line(colour="red"), r'lines\[0\]: unknown key "colour"; known are "name", "start", "end"'),
        ({"lines": [{"name": "door", "start": [0, 1]}]}, r'lines\[0\]: "end" is missing'),
        (line(name=" "), r'"name" must be a text that is not empty, not " "'),
        ({"lines": [DOOR, DOOR]}, r'lines\[1\]: the name "door" is taken'),
        (line(start=[1, 2, 3]), r'lines\[0\] "door": "start" must be \[x, y\], not \[1, 2, 3\]'),
        (line(start=[1, "2"]), r'two finite numbers, not \[1, "2"\]'),
        (line(start=[True, 2]), r"two finite numbers, not \[true, 2\]"),
        (line(start=[float("nan"), 2]), r"two finite numbers, not \[NaN, 2\]"),
        (line(start=[float("inf"), 2]), r"two finite numbers, not \[Infinity, 2\]"),
        (line(start=[200, 50]), r"start and end are the same point, \[200, 50\]"),
        (zone([[0, 0], [5, 5]]), r"at least 3 corners \[x, y\], not \[\[0, 0\], \[5, 5\]\]"),
        (zone("round"), 'at least 3 corners .* not "round"'),
        (zone([[0, 0], [5, 5], 7]), r'zones\[0\] "queue": corner 2 must be \[x, y\], not 7'),
        (zone([[0, 0], [5, 5], [9, 9]]), "lie on one line and enclose nothing"),
        (zone([[0, 0], [0.5, 0], [0.5, 1]]), 'if these are fractions, add "normalised": true'),
        (zone([[0, 0], [50, 0], [50, 90]], normalised=True), r"fractions from 0 to 1, .* not \[50, 0\]"),
        (zone([[0, 0], [50, 0], [50, 90]], normalised="yes"), '"normalised" must be true or false, not "yes"'),
    ],
)
def test_what_is_wrong_is_named(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as refused:
        Zones.read(path)
    assert str(refused.value).startswith(str(path))
    with pytest.raises(ValueError, match=message):
        Zones.from_dict(data)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"none\.json: the zones cannot be read: No such file"):
        Zones.read(tmp_path / "none.json")
    for content in (b"{'lines': []}", b"\xff\xfe\x00", b"[" * 100_000, b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(VideoError, match=r"bad\.json is not JSON: "):
            Zones.read(tmp_path / "bad.json")


@pytest.mark.parametrize("shift", [(300, 0), (0, -150), (10**9, 0)])
def test_outside_the_frame_is_an_error_with_the_size(shift: tuple[int, int]) -> None:
    corners = [[x + shift[0], y + shift[1]] for x, y in ((0, 0), (90, 0), (90, 90))]
    zones = Zones.from_dict(zone(corners))
    with pytest.raises(ValueError, match=r'zones: zone "queue" at .* outside a frame of 200x100 pixels'):
        zones.update(sv.Detections.empty(), SIZE)
    with pytest.raises(ValueError, match="outside a frame"):
        zones.shapes(SIZE)


def test_partly_outside_is_allowed() -> None:
    zones = Zones.from_dict(zone([[-50, -50], [100, -50], [100, 150], [-50, 150]]))
    assert walk(zones, standing([(50, 50), (150, 50)]))["zones"]["queue"]["now"] == 1
