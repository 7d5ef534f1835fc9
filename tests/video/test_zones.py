"""Lines and zones. Run with `pytest tests/video/test_zones.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.video.drawing.zones import Zones

pytestmark = pytest.mark.compat

SIZE = (200, 100)
DOOR = {"name": "door", "start": [0, 50], "end": [200, 50]}
QUEUE = {"name": "queue", "polygon": [[0, 0], [100, 0], [100, 100], [0, 100]]}


def standing(
    feet: Sequence[tuple[float, float]], ids: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> sv.Detections:
    """Return boxes of 10×20 pixels whose lower edge is centered on a point."""
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


def test_line_counts_crossings_by_direction_and_class() -> None:
    up = [standing([(50, y), (150, 110 - y)], [1, 2], ["dog", "cat"]) for y in (80, 60, 40, 20)]
    assert walk(Zones.from_dict({"lines": [DOOR]}), *up)["lines"]["door"] == {
        "in": 1,
        "out": 1,
        "classes": {"cat": {"in": 0, "out": 1}, "dog": {"in": 1, "out": 0}},
    }


def test_returning_object_counts_in_both_directions() -> None:
    there_and_back = [standing([(50, y)], [7]) for y in (80, 30, 80, 30)]
    counts = walk(Zones.from_dict({"lines": [DOOR]}), *there_and_back)["lines"]["door"]
    assert (counts["in"], counts["out"]) == (2, 1)


def test_passing_the_end_of_a_line_does_not_count() -> None:
    short = {"name": "door", "start": [0, 50], "end": [100, 50]}
    counts = walk(Zones.from_dict({"lines": [short]}), *[standing([(150, y)], [7]) for y in (80, 60, 40, 20)])
    assert (counts["lines"]["door"]["in"], counts["lines"]["door"]["out"]) == (0, 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ids", [None, [-1]])
def test_untracked_objects_count_in_zones_only(ids: list[int] | None) -> None:
    zones = Zones.from_dict({"lines": [DOOR], "zones": [QUEUE]})
    counts = walk(zones, *[standing([(50, y)], ids) for y in (80, 60, 40, 20)])
    assert counts["lines"]["door"] == {"in": 0, "out": 0, "classes": {}}
    assert counts["zones"]["queue"] == {"now": 1, "ids": 0, "classes": {"dog": 1}}


def test_untracked_object_does_not_affect_the_others() -> None:
    frames = [standing([(20, 110 - y), (50, y)], [-1, 3], ["cat", "dog"]) for y in (80, 60, 40)]
    counts = walk(Zones.from_dict({"lines": [DOOR]}), *frames)
    assert counts["lines"]["door"]["classes"] == {"dog": {"in": 1, "out": 0}}


def test_zone_counts_current_objects_and_all_track_ids() -> None:
    zones = Zones.from_dict({"zones": [QUEUE]})
    counts = walk(
        zones,
        standing([(50, 50), (60, 60), (150, 50)], [1, 2, 3], ["dog", "cat", "dog"]),
        standing([(50, 50), (160, 60), (150, 50)], [1, 2, 3], ["dog", "cat", "dog"]),
        standing([(50, 50), (70, 60), (30, 50)], [1, 4, -1], ["dog", "cat", "dog"]),
    )
    assert counts["zones"]["queue"] == {"now": 3, "ids": 3, "classes": {"cat": 1, "dog": 2}}
    assert walk(zones, sv.Detections.empty())["zones"]["queue"] == {"now": 0, "ids": 3, "classes": {}}


def test_position_is_the_bottom_center_of_the_box() -> None:
    lower_half = {"name": "floor", "polygon": [[0, 50], [200, 50], [200, 100], [0, 100]]}
    zones = Zones.from_dict({"zones": [lower_half]})
    assert walk(zones, standing([(50, 55), (50, 45)]))["zones"]["floor"]["now"] == 1  # most of both boxes is above


def test_fractions_scale_with_the_frame_and_counts_survive() -> None:
    zones = Zones.from_dict(
        {
            "normalized": True,
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


def test_reset_clears_all_counts() -> None:
    zones = Zones.from_dict({"lines": [DOOR], "zones": [QUEUE]})
    empty = zones.counts()
    assert walk(zones, *[standing([(50, y)], [1]) for y in (80, 20)]) != empty
    zones.reset()
    assert zones.counts() == empty
    assert walk(zones, standing([(50, 80)], [1]))["lines"]["door"]["in"] == 0  # earlier positions are cleared


def test_counts_are_json_compatible(tmp_path: Path) -> None:
    path = tmp_path / "zones.json"
    path.write_text(json.dumps({"lines": [DOOR], "zones": [QUEUE]}), encoding="utf-8-sig")
    zones = Zones.read(path)
    assert repr(zones) == "Zones(1 lines, 1 zones: 'door', 'queue')"
    counts = walk(zones, *[standing([(50, y)], [1]) for y in (80, 20)])
    assert json.loads(json.dumps(counts)) == counts
    unnamed = sv.Detections(np.array([[0, 0, 10, 10]], np.float32))
    zones.update(unnamed, SIZE)
    assert zones.counts()["zones"]["queue"]["classes"] == {"object": 1}


# Jitter ----------------------------------------------------------------------------------------------------------


def crossings(zones: dict[str, Any], *frames: sv.Detections) -> tuple[int, int]:
    counts = walk(Zones.from_dict(zones), *frames)["lines"]["door"]
    return counts["in"], counts["out"]


def at(*heights: float, x: float = 50, number: int = 7) -> list[sv.Detections]:
    """Return a box of 10×20 pixels on each frame, with its lower edge centered on (x, height)."""
    return [standing([(x, height)], [number]) for height in heights]


TREMBLE = [50 + 1.5 * (-1) ** number for number in range(40)]


def test_supervision_line_zone_counts_jitter() -> None:
    """Control for the tests below: supervision counts jitter on the same frames."""
    zone = sv.LineZone(sv.Point(0, 50), sv.Point(200, 50), triggering_anchors=(sv.Position.BOTTOM_CENTER,))
    for detections in at(*TREMBLE):
        zone.trigger(detections)
    assert (zone.in_count, zone.out_count) == (20, 19)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [], (0, 0)),
        ([80, 60], [], (0, 0)),  # stops on the line
        ([80, 60], [60, 80], (0, 0)),  # turns around on the line
        ([80, 60], [40, 20], (1, 0)),  # waits on the line, then crosses
        ([20, 40], [60, 80], (0, 1)),
        ([], [40, 20], (0, 0)),  # starts on the line
        ([], [60, 80], (0, 0)),
    ],
)
@pytest.mark.parametrize("step", [1, 7])  # with a period of one frame, and slowly
def test_jitter_on_a_line_counts_only_when_clear_of_it(
    before: list[float], after: list[float], expected: tuple[int, int], step: int
) -> None:
    heights = [*before, *np.repeat(TREMBLE, step), *after]
    assert crossings({"lines": [DOOR]}, *at(*heights)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_random_jitter_does_not_count(seed: int) -> None:
    offsets = np.random.default_rng(seed).normal(0, 0.05 * 20, 1000)  # 5 % of the box's height
    assert crossings({"lines": [DOOR]}, *at(*(50 + offsets))) == (0, 0)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([99, 1], (1, 0)),  # within one frame
        ([60, 45], (1, 0)),  # and the video ends
        ([52, 40], (1, 0)),  # first seen on the line
        ([51, 49, 47, 40], (1, 0)),  # first seen on the line, and moves straight across
        ([48, 60], (0, 1)),
        ([52, 60], (0, 0)),  # first seen on the line, and leaves on the same side
        ([80, 20, 80, 20], (2, 1)),
        ([80, 47.5], (0, 0)),  # still on the line
    ],
)
def test_crossing_counts_once_when_the_box_is_clear_of_the_line(
    heights: list[float], expected: tuple[int, int]
) -> None:
    assert crossings({"lines": [DOOR]}, *at(*heights)) == expected


@pytest.mark.parametrize("amplitude", [3, 5, 7, 9, 15])  # box height: 20 pixels
def test_jitter_beyond_the_distance_stops_counting(amplitude: float) -> None:
    heights = [50 + amplitude * (-1) ** number for number in range(100)]
    assert sum(crossings({"lines": [DOOR]}, *at(*heights))) <= (0 if amplitude < 4 else 3)


def test_real_back_and_forth_motion_counts_every_time() -> None:
    assert crossings({"lines": [DOOR]}, *at(*[80, 20] * 20)) == (20, 19)


def test_distance_is_a_fraction_of_the_box_across_the_line() -> None:
    upright = {"name": "door", "start": [100, 100], "end": [100, 0]}  # the in side is left
    for distance, expected in ((0.2, 1), (0.4, 0), (0, 1)):  # the box is 10 pixels wide: 2, 4 and 0 pixels
        frames = [standing([(x, 60)], [7]) for x in (130, 97)]
        data = {"lines": [{**upright, "minimum_crossing_distance": distance}]}
        assert crossings(data, *frames) == (expected, 0)
    assert crossings(line(minimum_crossing_distance=0), *at(*TREMBLE)) == (20, 19)


@pytest.mark.parametrize(("y", "heights"), [(99, [50, 100]), (1, [50, 0]), (100, [50, 100])])
def test_line_near_the_edge_counts_objects_that_leave_the_frame(y: float, heights: list[float]) -> None:
    door = {"name": "door", "start": [0, y], "end": [200, y], "minimum_crossing_distance": 1}
    assert sum(crossings({"lines": [door]}, *at(*heights))) == 1


def test_track_lost_on_the_line_still_crosses() -> None:
    absent = [sv.Detections.empty()] * 100
    assert crossings({"lines": [DOOR]}, *at(80, 60), *absent, *at(40)) == (1, 0)
    assert crossings({"lines": [DOOR]}, *at(80, 60), *absent, *at(70)) == (0, 0)


def test_path_around_the_end_of_a_line_does_not_count() -> None:
    short = {"lines": [{"name": "door", "start": [0, 50], "end": [100, 50]}]}
    around = [standing([place], [7]) for place in ((50, 80), (150, 80), (150, 20), (50, 20))]
    assert crossings(short, *around) == (0, 0)
    assert crossings(short, *around, *at(80)) == (0, 1)  # and back through the line
    diagonal = [standing([place], [7]) for place in ((80, 80), (110, 30))]
    assert crossings(short, *diagonal) == (1, 0)  # intersects the line at 98, before its end


@pytest.mark.parametrize(
    ("threshold", "heights", "expected"),
    [
        (3, [80, 20, 20, 80, 80, 80], (0, 0)),
        (3, [80, 20, 20, 20, 80, 80], (1, 0)),
        (3, [80, 20, 20, 20, 80, 80, 80], (1, 1)),
        (3, [80, 20, 50, 20, 50, 20], (1, 0)),  # on the line counts as neither side
        (2, [51, 20, 20], (1, 0)),
        (1, [80, 20, 80], (1, 1)),
    ],
)
def test_minimum_crossing_threshold_requires_frames_on_the_other_side(
    threshold: int, heights: list[float], expected: tuple[int, int]
) -> None:
    assert crossings(line(minimum_crossing_threshold=threshold), *at(*heights)) == expected


@pytest.mark.parametrize(
    ("anchors", "heights", "expected"),
    [
        (["BOTTOM_CENTER"], [80, 45], 1),
        (["TOP_CENTER"], [90, 72, 64], 1),  # the box is 20 pixels high: its top at 70, 52, 44
        (["CENTER"], [80, 62, 55], 1),
        (["TOP_LEFT", "TOP_RIGHT", "BOTTOM_LEFT", "BOTTOM_RIGHT"], [80, 64, 55], 0),
        (["TOP_LEFT", "TOP_RIGHT", "BOTTOM_LEFT", "BOTTOM_RIGHT"], [80, 64, 55, 45], 1),
    ],
)
def test_triggering_anchors_set_the_position_at_a_line(anchors: list[str], heights: list[float], expected: int) -> None:
    for end in range(1, len(heights)):
        assert crossings(line(triggering_anchors=anchors), *at(*heights[:end])) == (0, 0)
    assert crossings(line(triggering_anchors=anchors), *at(*heights)) == (expected, 0)


def test_triggering_anchors_set_the_position_in_a_zone() -> None:
    upper = {"name": "queue", "polygon": [[0, 0], [200, 0], [200, 50], [0, 50]]}
    frame = standing([(50, 45), (50, 60), (50, 90)])
    for anchors, expected in ((["TOP_CENTER"], 2), (["BOTTOM_CENTER"], 1), (["TOP_CENTER", "BOTTOM_CENTER"], 1)):
        zones = Zones.from_dict({"zones": [{**upper, "triggering_anchors": anchors}]})
        assert walk(zones, frame)["zones"]["queue"]["now"] == expected


def test_zone_threshold_ignores_brief_entries() -> None:
    inside, outside = (standing([(x, 50)], [7]) for x in (99, 101))
    zones = Zones.from_dict(queue(minimum_crossing_threshold=3))
    seen = [walk(zones, frame)["zones"]["queue"] for frame in [inside, outside] * 5]
    assert seen[-1] == {"now": 0, "ids": 0, "classes": {}}
    now = [walk(zones, frame)["zones"]["queue"]["now"] for frame in [inside] * 3 + [outside, outside, inside]]
    assert now == [0, 0, 1, 1, 1, 1]
    now = [walk(zones, frame)["zones"]["queue"]["now"] for frame in [outside] * 3]
    assert now == [1, 1, 0]
    assert walk(zones, standing([(50, 50)]))["zones"]["queue"] == {"now": 1, "ids": 1, "classes": {"dog": 1}}
    zones.reset()
    assert [walk(zones, inside)["zones"]["queue"]["now"] for _ in range(3)] == [0, 0, 1]


# File format --------------------------------------------------------------------------------------------------------


def line(**changes: object) -> dict[str, Any]:
    return {"lines": [{**DOOR, **changes}]}


def zone(polygon: object = QUEUE["polygon"], **more: object) -> dict[str, Any]:
    return {"zones": [{"name": "queue", "polygon": polygon}], **more}


def queue(**changes: object) -> dict[str, Any]:
    return {"zones": [{**QUEUE, **changes}]}


FRACTIONS = {"name": "door", "start": [0, 0.5], "end": [1, 0.5]}

VALID: list[dict[str, Any]] = [
    {"lines": [DOOR]},
    {"zones": [QUEUE]},
    {"lines": [DOOR], "zones": [QUEUE]},
    {"lines": [DOOR], "zones": []},
    {"$schema": "docs/zones.schema.json", "lines": [DOOR]},
    {"normalized": True, "lines": [FRACTIONS]},
    {"normalised": True, "lines": [FRACTIONS]},
    {"normalized": False, "lines": [DOOR]},
    line(name="Tür 1"),
    line(start=[-10.5, 1e3]),
    line(minimum_crossing_threshold=3, minimum_crossing_distance=0, triggering_anchors=["CENTER"]),
    line(minimum_crossing_threshold=3.0, minimum_crossing_distance=1),
    line(triggering_anchors=["TOP_LEFT", "TOP_RIGHT", "BOTTOM_LEFT", "BOTTOM_RIGHT"]),
    queue(minimum_crossing_threshold=2, triggering_anchors=["TOP_CENTER"]),
    zone([[0, 0], [0.5, 0], [0.5, 1]], normalized=True),
]

INVALID: list[tuple[Any, str]] = [
    ([], r'must contain an object with "lines" or "zones", got \[\]'),
    (None, r'must contain an object with "lines" or "zones", got null'),
    ({}, 'has neither "lines" nor "zones"'),
    ({"lines": [], "zones": []}, 'has neither "lines" nor "zones"'),
    ({"line": []}, 'unknown key "line"; did you mean "lines"'),
    ({"shapes": [], "lines": [DOOR]}, 'unknown key "shapes"; known keys are .*"normalized", .*"lines", "zones"'),
    ({"lines": {}}, r'"lines" must be a list, got \{\}'),
    ({"lines": [5]}, r'lines\[0\] must be an object with "name", "start", "end", got 5'),
    ({"$schema": 5, "lines": [DOOR]}, r'"\$schema" must be a string, got 5'),
    (
        line(color="red"),
        r'lines\[0\] "door": unknown key "color"; known keys are "name", "start", "end", "triggering_anchors"',
    ),
    (queue(minimum_crossing_distance=0), r'zones\[0\] "queue": unknown key "minimum_crossing_distance"'),
    ({"lines": [{"name": "door", "stat": [0, 1], "end": [2, 3]}]}, 'unknown key "stat"; did you mean "start"'),
    (
        {"lines": [{"name": "door", "start": [0, 1]}]},
        r'lines\[0\] "door": "end" is missing; required are "name", "start"',
    ),
    (line(name=" "), r'lines\[0\]: "name" must be a non-empty string, got " "'),
    (line(name=7), '"name" must be a non-empty string, got 7'),
    (line(start=[1, 2, 3]), r'lines\[0\] "door": "start" must be \[x, y\], got \[1, 2, 3\]'),
    (line(start=[1, "2"]), r'two finite numbers, got \[1, "2"\]'),
    (line(start=[True, 2]), r"two finite numbers, got \[true, 2\]"),
    (line(start=[10**400, 2]), r"two finite numbers, got \[1000"),
    (zone([[0, 0], [5, 5]]), r'zones\[0\] "queue": "polygon" needs at least 3 corners .* got \[\[0, 0\], \[5, 5\]\]'),
    (zone("round"), 'at least 3 corners .* got "round"'),
    (zone([[0, 0], [5, 5], 7]), r'zones\[0\] "queue": corner 2 must be \[x, y\], got 7'),
    (zone([[0, 0], [50, 0], [50, 90]], normalized=True), r'"queue" must have fractions .* got \[50, 0\]'),
    (zone([[0, 0], [50, 0], [50, 90]], normalised=True), r'"queue" must have fractions .* got \[50, 0\]'),
    ({"normalized": True, "lines": [DOOR]}, r'lines\[0\] "door" must have fractions .* got \[0, 50\]'),
    (zone(normalized="yes"), '"normalized" must be true or false, got "yes"'),
    (zone(normalized=1), '"normalized" must be true or false, got 1'),
    ({"normalized": True, "normalised": True, "lines": [FRACTIONS]}, 'has both "normalized" and "normalised"'),
    (
        line(triggering_anchors=["BOTTOM"]),
        r'"door": "triggering_anchors" has the unknown anchor "BOTTOM"; use any of "CENTER"',
    ),
    (line(triggering_anchors=["CENTER_OF_MASS"]), 'the unknown anchor "CENTER_OF_MASS"'),
    (line(triggering_anchors=[["CENTER"]]), r'the unknown anchor \["CENTER"\]'),
    (
        line(triggering_anchors="CENTER"),
        r'must be a list of one or more anchors, such as \["BOTTOM_CENTER"\], got "CENTER"',
    ),
    (queue(triggering_anchors=[]), r"must be a list of one or more anchors, .* got \[\]"),
    (queue(triggering_anchors=["CENTER", "CENTER"]), "must have unique anchors"),
    (line(minimum_crossing_threshold=0), "must be an integer number of frames from 1 to 1000, got 0"),
    (line(minimum_crossing_threshold=1.5), "an integer number of frames from 1 to 1000, got 1.5"),
    (line(minimum_crossing_threshold="3"), 'an integer number of frames from 1 to 1000, got "3"'),
    (queue(minimum_crossing_threshold=True), "an integer number of frames from 1 to 1000, got true"),
    (line(minimum_crossing_distance=-0.1), "a fraction of the box from 0 to 1, got -0.1"),
    (line(minimum_crossing_distance=None), "a fraction of the box from 0 to 1, got null"),
]

# No JSON schema can express these.
ONLY_IN_CODE: list[tuple[Any, str]] = [
    ({"lines": [DOOR, DOOR]}, r'lines\[1\]: the name "door" is taken'),
    (line(start=[200, 50]), r'lines\[0\] "door": start and end are the same point, \[200, 50\]'),
    (zone([[0, 0], [5, 5], [9, 9]]), r"are collinear and enclose no area: \[\[0, 0\], \[5, 5\], \[9, 9\]\]"),
    (zone([[0, 0], [0.5, 0], [0.5, 1]]), 'if these are fractions, add "normalized": true'),
    ({"lines": [FRACTIONS]}, r'lines\[0\] "door" is not larger than one pixel; if these are fractions'),
    (line(start=[float("nan"), 2]), r"two finite numbers, got \[NaN, 2\]"),
    (line(start=[float("inf"), 2]), r"two finite numbers, got \[Infinity, 2\]"),
]


def schema_accepts(data: Any) -> bool:
    return jsonschema.Draft202012Validator(Zones.json_schema()).is_valid(data)


@pytest.mark.parametrize("data", VALID, ids=json.dumps)
def test_schema_and_reader_accept_valid_files(data: Any) -> None:
    assert schema_accepts(data)
    Zones.from_dict(data)


@pytest.mark.parametrize(("data", "message"), INVALID, ids=json.dumps)
def test_schema_rejects_invalid_files(data: Any, message: str) -> None:
    assert not schema_accepts(data)


@pytest.mark.parametrize(("data", "message"), INVALID + ONLY_IN_CODE, ids=json.dumps)
def test_errors_have_file_place_value_and_fix(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as raised:
        Zones.read(path)
    assert str(raised.value).startswith(str(path))
    with pytest.raises(ValueError, match=message):
        Zones.from_dict(data)


def test_published_schema_is_current_and_valid() -> None:
    published = json.loads((Path(__file__).parents[2] / "docs" / "zones.schema.json").read_text(encoding="utf-8"))
    assert published == Zones.json_schema(), "run scripts/zone_schema.py"
    jsonschema.Draft202012Validator.check_schema(published)


def test_documentation_examples_are_valid_zone_files() -> None:
    text = (Path(__file__).parents[2] / "docs" / "zones.md").read_text(encoding="utf-8")
    examples = [json.loads(part.partition("```")[0]) for part in text.split("```json\n")[1:]]
    assert len(examples) >= 2
    for example in examples:
        assert schema_accepts(example)
        Zones.from_dict(example)


def test_every_key_is_documented_in_the_schema_and_on_the_page() -> None:
    schema = Zones.json_schema()
    page = (Path(__file__).parents[2] / "docs" / "zones.md").read_text(encoding="utf-8")
    objects = [schema, *schema["$defs"].values()]
    keys = {key for part in objects for key in part["properties"]}
    assert {"triggering_anchors", "minimum_crossing_threshold", "minimum_crossing_distance", "normalized"} <= keys
    assert all(field["description"] for part in objects for field in part["properties"].values())
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_duplicate_keys_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text(f'{{"lines": [{json.dumps(DOOR)}], "lines": []}}')  # Python's decoder would keep the last one
    with pytest.raises(ValueError, match=r'twice\.json: an object has the key "lines" twice; merge them'):
        Zones.read(path)


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"none\.json: the zones cannot be read: No such file"):
        Zones.read(tmp_path / "none.json")
    for content in (b"{'lines': []}", b"\xff\xfe\x00", b"[" * 100_000, b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(VideoError, match=r"bad\.json is not JSON: "):
            Zones.read(tmp_path / "bad.json")


@pytest.mark.parametrize("shift", [(300, 0), (0, -150), (10**9, 0)])
def test_lines_and_zones_outside_the_frame_are_rejected(shift: tuple[int, int]) -> None:
    corners = [[x + shift[0], y + shift[1]] for x, y in ((0, 0), (90, 0), (90, 90))]
    zones = Zones.from_dict(zone(corners))
    with pytest.raises(ValueError, match=r'zones: zone "queue" at .* outside a frame of 200x100 pixels'):
        zones.update(sv.Detections.empty(), SIZE)
    with pytest.raises(ValueError, match="outside a frame"):
        zones.shapes(SIZE)


def test_lines_and_zones_partly_outside_are_allowed() -> None:
    zones = Zones.from_dict(zone([[-50, -50], [100, -50], [100, 150], [-50, 150]]))
    assert walk(zones, standing([(50, 50), (150, 50)]))["zones"]["queue"]["now"] == 1
