"""`Annotator`: drawing into frames. Run with `pytest tests/video/test_annotation.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import supervision as sv

from moondream_cv.video.drawing import annotation
from moondream_cv.video.drawing.annotation import Annotator
from moondream_cv.video.drawing.panel import Panel, Pen
from moondream_cv.video.drawing.zones import Zones

pytestmark = pytest.mark.compat

Picture = npt.NDArray[np.uint8]
ZONES = {
    "normalised": True,
    "lines": [{"name": "door", "start": [0.1, 0.5], "end": [0.9, 0.5]}],
    "zones": [
        {"name": "queue", "polygon": [[0.1, 0.1], [0.4, 0.1], [0.4, 0.9], [0.1, 0.9]]},
        {"name": "counter", "polygon": [[0.1, 0.1], [0.5, 0.1], [0.5, 0.8], [0.2, 0.8]]},
    ],
}


def gray(width: int = 640, height: int = 360) -> Picture:
    return np.full((height, width, 3), 90, np.uint8)


def noise(width: int = 640, height: int = 360) -> Picture:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def found(
    boxes: Sequence[Sequence[float]],
    ids: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    class_ids: Sequence[int] | None = None,
    scores: bool = True,
) -> sv.Detections:
    count = len(boxes)
    return sv.Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        confidence=np.full(count, 0.87, np.float32) if scores else None,
        class_id=np.array(class_ids or [0] * count, int),
        tracker_id=None if ids is None else np.array(ids, int),
        data={"class_name": np.array(names or ["dog"] * count, dtype=str)},
    )


def changed(before: Picture, after: Picture) -> npt.NDArray[np.bool_]:
    """Return whether each pixel differs, [H, W]."""
    return np.asarray((before != after).any(2))


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the texts that are drawn."""
    written: list[str] = []
    plate = Pen.plate

    def note(pen: Pen, text: str, color: annotation.BGR) -> Picture:
        if text not in written:
            written.append(text)
        return plate(pen, text, color)

    monkeypatch.setattr(Pen, "plate", note)
    return written


@pytest.mark.parametrize("size", [(320, 240), (641, 361), (1280, 720)])
@pytest.mark.parametrize("what", [*annotation.KINDS, "none"])
def test_annotator_does_not_modify_its_inputs(what: str, size: tuple[int, int]) -> None:
    image = noise(*size)
    before = image.copy()
    image.flags.writeable = False
    annotator = Annotator(what)
    for step in range(2):
        box = (30, 40 + 20 * step, 130, 150 + 20 * step)
        shown = annotator(image, found([box, (-20, -20, 40, 60), (310, 10, 310, 10)], [1, 2, 3]), step / 30)
    assert shown.shape == image.shape
    assert shown.dtype == np.uint8
    assert shown.flags.writeable
    assert not np.shares_memory(image, shown)
    assert (image == before).all()
    assert changed(image, shown).any() == (what != "none")


@pytest.mark.parametrize("what", ["box,label,trace,dot,blur,pixelate", "none"])
def test_frames_without_detections_are_unchanged(what: str) -> None:
    image = noise()
    annotator = Annotator(what)
    for detections in (sv.Detections.empty(), found([], []), found([])):
        assert (annotator(image, detections) == image).all()


@pytest.mark.parametrize(
    ("what", "unknown"),
    [("boxes", "boxes"), ("box,labels", "labels"), (["box", "mask"], "mask"), ("box,none", "none"), ("", "")],
)
def test_unknown_annotations_are_rejected(what: Any, unknown: str) -> None:
    with pytest.raises(ValueError, match=f"'{unknown}' is unknown; use any of box, label, trace, dot, blur, pixelate"):
        Annotator(what)


def test_annotations_may_be_a_string_or_a_sequence() -> None:
    assert Annotator(" box , label").what == Annotator(("label", "box")).what == Annotator().what
    assert Annotator("none").what == Annotator(()).what == frozenset()
    with pytest.raises(ValueError, match="color_by must be one of class, id, got 'size'"):
        Annotator(color_by="size")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), "u1")]
)
def test_other_image_types_are_rejected(image: Any) -> None:
    with pytest.raises(ValueError, match=r"must be \[H, W, 3\] uint8 BGR, got \["):
        Annotator()(image, sv.Detections.empty())


def test_non_contiguous_images_are_annotated() -> None:
    wide = noise(1280, 360)
    for view in (wide[:, :640], wide[::-1, ::2], wide[..., ::-1]):
        expected = Annotator()(view.copy(), found([(50, 50, 90, 90)]))
        assert (Annotator()(view, found([(50, 50, 90, 90)])) == expected).all()


def test_labels_show_name_track_id_and_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    annotator = Annotator("label", ("dog", "cat"))
    boxes = [(10, 50, 60, 90), (100, 50, 160, 90)]
    annotator(gray(), found(boxes, [3, -1]))
    annotator(gray(), found(boxes, scores=False))
    annotator(gray(), sv.Detections(np.array(boxes, np.float32), class_id=np.array([1, 7])))
    annotator(gray(), sv.Detections(np.array(boxes, np.float32)))
    assert sorted(written) == ["cat", "class 7", "dog", "dog #3 0.87", "dog 0.87", "object"]


def test_long_names_are_shortened_before_the_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    Annotator()(gray(320, 240), found([(10, 50, 60, 90)], [12], ["a person in a red jacket " * 5]))
    assert written[0].startswith("a person in")
    assert written[0].endswith("... #12 0.87")


def test_labels_replace_letters_without_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    Annotator()(gray(), found([(10, 50, 60, 90)], names=["café\nсобака \U0010fffd"]))
    assert written == ["café собака ? 0.87"]


@pytest.mark.parametrize("size", [(16, 16), (320, 240), (1920, 1080)])
def test_labels_stay_inside_the_image(size: tuple[int, int]) -> None:
    width, height = size
    text_height = Pen.for_resolution(size).plate_height
    for left, top in ((0, 0), (width - 5, 0), (0, height - 5), (width - 5, height - 5), (width // 2, -3)):
        image = gray(*size)
        drawn = changed(image, Annotator("label")(image, found([(left, top, left + 5, top + 5)])))
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        assert len(rows) == min(height, text_height)
        assert drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a complete plate


def test_labels_do_not_overlap() -> None:
    image = gray()
    one = changed(image, Annotator("label")(image, found([(300, 150, 360, 200)]))).sum()
    near = [(300 + 3 * step, 150 + 3 * step, 360, 200) for step in range(4)]
    assert changed(image, Annotator("label")(image, found(near))).sum() == 4 * one


def test_labels_keep_their_places_if_the_order_of_objects_changes() -> None:
    image, boxes = gray(), [(100, 100, 200, 200), (110, 95, 220, 210)]
    there = Annotator("label")(image, found(boxes, [4, 9], ["dog", "cat"]))
    back = Annotator("label")(image, found(boxes[::-1], [9, 4], ["cat", "dog"]))
    assert (there == back).all()


@pytest.mark.parametrize("ground", [0, 90, 255])
def test_label_text_contrasts_with_its_plate(ground: int) -> None:
    image = np.full((240, 320, 3), ground, np.uint8)
    for class_id in range(20):
        shown = Annotator("label")(image, found([(50, 100, 200, 150)], class_ids=[class_id]))
        plate = shown[changed(image, shown)].astype(float) @ (0.114, 0.587, 0.299)
        assert plate.max() - plate.min() > 80


def colors_of(picture: Picture, boxes: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the colors in the middle of the left sides of boxes."""
    return [tuple(picture[(box[1] + box[3]) // 2, box[0]].tolist()) for box in boxes]


def test_color_by_class_or_track_id() -> None:
    boxes = [(20, 20, 90, 90), (120, 20, 190, 90), (220, 20, 290, 90), (320, 20, 390, 90)]
    detections = found(boxes, [5, 6, 25, -1], class_ids=[0, 1, 0, 21])
    by_class = colors_of(Annotator("box")(gray(), detections), boxes)
    assert by_class == [sv.ColorPalette.DEFAULT.by_idx(index).as_bgr() for index in (0, 1, 0, 21)]
    annotator = Annotator("box", color_by="id")
    by_id = colors_of(annotator(gray(), detections), boxes)
    assert by_id == [*(sv.ColorPalette.DEFAULT.by_idx(index).as_bgr() for index in (5, 6, 25)), (150, 150, 150)]
    assert colors_of(annotator(gray(), detections[2:]), boxes[2:]) == by_id[2:]  # independent of the other objects
    assert colors_of(annotator(gray(), found(boxes)), boxes) == [(150, 150, 150)] * 4


@pytest.mark.parametrize("size", [(320, 240), (640, 360), (3840, 2160)])
def test_box_that_fills_the_frame_shows_all_sides(size: tuple[int, int]) -> None:
    shown = Annotator("box")(gray(*size), found([(0, 0, *size)]))
    line = Pen.for_resolution(size).line
    drawn = changed(gray(*size), shown)
    for side in (drawn[:line], drawn[-line:], drawn[:, :line].T, drawn[:, -line:].T):
        assert side[:, line:-line].all()  # without the corners, which are round


def test_boxes_without_area_are_dots_and_boxes_outside_are_not_drawn() -> None:
    image = gray()
    drawn = changed(image, Annotator("box")(image, found([(100, 100, 100, 100)])))
    assert drawn[100, 100]
    assert 20 < drawn.sum() < 400
    outside = found([(-50, -50, -10, -10), (700, 10, 800, 90), (1e9, 0, 2e9, 50), (9, 9, 50, 50)])
    outside.xyxy[3] = np.nan  # new versions of supervision reject NaN in the constructor
    assert (Annotator("box,label,dot,blur,pixelate")(image, outside) == image).all()


@pytest.mark.parametrize("what", ["blur", "pixelate"])
@pytest.mark.parametrize(
    "box",
    [
        (100, 100, 300, 300),
        (100, 50, 160, 350),
        (10, 10, 40, 40),
        (10, 10, 15, 16),
        (10, 10, 12, 12),
        (-90, 100, 110, 300),
        (630, 100, 640, 300),
        (600, -300, 900, 200),
        (0, 0, 640, 360),
    ],
)
def test_redacted_boxes_lose_detail_and_the_rest_is_unchanged(what: str, box: tuple[int, ...]) -> None:
    image = noise()
    shown = Annotator(what)(image, found([box]))
    left, top, right, bottom = np.clip(box, 0, (640, 360, 640, 360)).tolist()
    outside = np.ones(image.shape[:2], bool)
    outside[top:bottom, left:right] = False
    assert (shown[outside] == image[outside]).all()
    # Between neighbors, noise differs by 85 on average.
    region = shown[top:bottom, left:right].astype(float)
    steps = np.concatenate([np.abs(np.diff(region, axis=axis)).ravel() for axis in (0, 1)])
    assert steps.mean() < 8
    assert len(np.unique(region.reshape(-1, 3), axis=0)) <= (32 if what == "pixelate" else region.size)


@pytest.mark.parametrize("what", ["blur", "pixelate"])
@pytest.mark.parametrize("side", [6, 24, 60, 300])
def test_fine_patterns_are_unrecognizable_after_redaction(what: str, side: int) -> None:
    """Stripes of a twelfth of the box, as fine as facial features, become nearly uniform gray."""
    image = gray()
    stripe = max(1, side // 12)
    image[10 : 10 + side, 10 : 10 + side] = 255 * ((np.arange(side) // stripe) % 2)[None, :, None]
    region = Annotator(what)(image, found([(10, 10, 10 + side, 10 + side)]))[10 : 10 + side, 10 : 10 + side]
    assert region.std() < 45  # 127 without redaction


def trace(frames: Iterable[sv.Detections], times: Iterable[float], image: Picture) -> npt.NDArray[np.bool_]:
    annotator = Annotator("trace")
    for detections, time in zip(frames, times, strict=True):
        shown = annotator(image, detections, time)
    return changed(image, shown)


def at(x: float, tracker_id: int | None = 1) -> sv.Detections:
    """Return a box of 20×20 pixels with its bottom center at x, 200."""
    return found([(x - 10, 180, x + 10, 200)], None if tracker_id is None else [tracker_id])


def test_trace_connects_past_positions() -> None:
    drawn = trace([at(100 + 5 * step) for step in range(30)], [step / 30 for step in range(30)], gray())
    assert drawn[200, 100:245].all()
    assert not drawn[:190].any()
    assert not drawn[:, 255:].any()


@pytest.mark.parametrize("times", [[step / 30 for step in range(120)], [0.0] * 120], ids=["with times", "without"])
def test_trace_is_two_seconds_long(times: list[float]) -> None:
    columns = np.flatnonzero(trace([at(20 + 5 * step) for step in range(120)], times, gray()).any(0))
    assert abs(columns[0] - (20 + 5 * 59)) <= 8
    assert abs(columns[-1] - (20 + 5 * 119)) <= 8


def test_trace_restarts_where_a_track_returns_elsewhere() -> None:
    frames = [at(100), at(105), at(110), *[sv.Detections.empty()] * 5, at(400), at(405), at(410)]
    drawn = trace(frames, [step / 30 for step in range(len(frames))], gray())
    assert drawn[200, 400:410].all()
    assert not drawn[:, :390].any()


def test_trace_continues_after_a_short_loss() -> None:
    frames = [at(100), at(105), sv.Detections.empty(), at(115), at(120)]
    assert trace(frames, [step / 30 for step in range(5)], gray())[200, 100:120].all()


def test_trace_restarts_after_a_jump() -> None:
    drawn = trace([at(100), at(105), at(500), at(505)], [0.0, 0.1, 0.2, 0.3], gray())
    assert drawn[200, 500:505].all()
    assert not drawn[:, :490].any()


@pytest.mark.parametrize("tracker_id", [None, -1])
def test_untracked_objects_have_no_trace(tracker_id: int | None) -> None:
    assert not trace([at(100 + 5 * step, tracker_id) for step in range(9)], [0.0] * 9, gray()).any()


def test_decreasing_time_resets_traces_and_panel() -> None:
    annotator = Annotator("trace", panel=True)
    for time, x in ((0.0, 100), (0.1, 110), (0.2, 120), (0.0, 130)):
        shown = annotator(gray(), at(x, int(x)), time)
    once = Annotator("trace", panel=True)(gray(), at(130, 130))
    assert (shown == once).all()


@pytest.mark.parametrize("size", [(320, 240), (640, 360), (1920, 1080)])
def test_zone_counts_do_not_overlap(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    place = annotation._place

    def note(*arguments: Any) -> annotation.Rectangle:
        places.append(place(*arguments))
        return places[-1]

    monkeypatch.setattr(annotation, "_place", note)
    written, zones = texts(monkeypatch), Zones.from_dict(ZONES)
    zones.update(found([(0.2 * size[0], 0.2 * size[1], 0.3 * size[0], 0.4 * size[1])], [1]), size)
    shown = Annotator("label", zones=zones)(gray(*size), sv.Detections.empty())
    assert written == ["door: 0 in, 0 out", "queue: 1 (1 so far)", "counter: 1 (1 so far)"]
    assert len(places) == 3
    covered = np.zeros(size[::-1], int)
    for left, top, right, bottom in places:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        covered[top:bottom, left:right] += 1
    assert covered.max() == 1
    assert (shown[round(0.6 * size[1]), round(0.1 * size[0])] == 255).all()


def test_line_arrow_points_to_the_in_side() -> None:
    for start, end in (((20, 50), (180, 50)), ((180, 60), (20, 40)), ((90, 95), (110, 5))):
        zones = Zones.from_dict({"lines": [{"name": "door", "start": list(start), "end": list(end)}]})
        stem = annotation._arrow(zones.shapes((200, 100))[0].points, 30)[0].astype(float)
        direction = stem[1] - stem[0]
        for step in (-1, 1):
            x, y = stem[0] + step * direction
            zones.update(found([(x - 2, y - 2, x + 2, y)], [1]), (200, 100))
        assert zones.counts()["lines"]["door"]["in"] == 1


@pytest.mark.parametrize("size", [(320, 240), (640, 360), (641, 361), (3840, 2160)])
def test_panel_is_drawn_right_of_the_image(size: tuple[int, int]) -> None:
    image = noise(*size)
    annotator = Annotator("none", ("dog", "cat"), panel=True)
    shown = annotator(image, found([(5, 5, 90, 90)], [1]))
    assert shown.shape == (size[1], annotator.output_wh(size)[0], 3)
    assert (shown[:, : size[0]] == image).all()
    assert (shown.shape[1] - size[0]) % 2 == 0
    assert shown[:, size[0] :].std() > 5
    assert Annotator().output_wh(size) == size


def panel_rows(panel: Panel, zones: Zones | None = None) -> list[list[tuple[str, str, str]]]:
    return [[(row.name, row.first, row.second) for row in (s.head, *s.entries)] for s in panel._sections(zones)]


def test_panel_counts_current_and_total_objects() -> None:
    panel = Panel(("dog", "cat"), None)
    assert panel_rows(panel) == [[("Objects", "now", ""), ("dog", "0", ""), ("cat", "0", "")]]
    panel.update(found([(0, 0, 9, 9)] * 3, [1, 2, -1], ["dog", "dog", "bird"], [0, 0, 2]))
    panel.update(found([(0, 0, 9, 9)] * 2, [2, 3], ["dog", "dog"]))
    zones = Zones.from_dict(ZONES)
    assert panel_rows(panel, zones) == [
        [("Objects", "now", "total"), ("dog", "2", "3"), ("cat", "0", "0"), ("bird", "0", "0")],
        [("Zones", "now", ""), ("queue", "0", ""), ("counter", "0", "")],
        [("Lines", "in", "out"), ("door", "0", "0")],
    ]
    panel.reset()
    assert panel_rows(panel)[0][1:] == [("dog", "0", ""), ("cat", "0", "")]


def test_panel_with_many_classes_keeps_zones_and_detected_classes() -> None:
    panel = Panel([f"class {number}" for number in range(50)], None)
    panel.update(found([(0, 0, 9, 9)], [1], ["class 40"], [40]))
    kept = panel._sections(None)[0].shortened(6).entries
    assert [row.name for row in kept] == ["class 40", "class 0", "class 1", "class 2", "+46 more"]
    for size in ((16, 16), (320, 240)):  # smaller than the panel
        annotator = Annotator("box,label", panel._classes, zones=Zones.from_dict(ZONES), panel=True)
        assert annotator(gray(*size), sv.Detections.empty()).shape[0] == size[1]
