"""Test Roboflow's core blocks after the blocks of this plugin: filters, trackers, counters, zones, crops and SAM.

The expected values are the ground truth of the scene or clip, or the result of `Detector`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv import Detector, Pointer
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import Scene, render_clip, render_scene
from moondream_cv.scenes.clips import Clip
from moondream_cv_blocks.pool import shared_pool
from tests.helpers.detector_suite import IN_BATCHES, SCORE
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import as_bgr, compile_workflow, run_engine, run_workflow, step, video_frame, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["bus", "dog", "blue star", "red circle"]  # not in drawing order
FRAMES = 80
FPS = 10.0
MIDDLE_XY = (160, 120)  # of a frame

OUTPUTS = [("detect", "predictions"), ("point", "predictions"), ("track", "tracked_detections")]
every_class_block = pytest.mark.parametrize(("block", "output"), OUTPUTS, ids=[block for block, _ in OUTPUTS])


def core(block: str, name: str, **fields: Any) -> dict[str, Any]:
    """Return a step with one of Roboflow's blocks, such as "dynamic_crop@v1"."""
    return {"type": f"roboflow_core/{block}", "name": name, **fields}


def detect(name: str = "detect", **fields: Any) -> dict[str, Any]:
    return step("detect", name, **{"class_names": NAMES, **fields})


def point(**fields: Any) -> dict[str, Any]:
    return step("point", "point", **{"class_names": NAMES, **fields})


def frames(clip: Clip) -> Iterator[dict[str, Any]]:
    """Yield the frames of a clip as the engine accepts them."""
    for number, (image, _) in enumerate(clip, 1):
        yield video_frame(as_bgr(image), number, "clip", FPS)


def overlap(xyxy: Any, item: Any) -> float:
    """Return the IoU of a box and an object's box."""
    return float(sv.box_iou_batch(np.reshape(xyxy, (1, 4)), np.array([item.xyxy]))[0, 0])


def corners(found: dict[str, Any]) -> list[float]:
    """Return the xyxy box of a serialized detection."""
    x, y, width, height = (found[key] for key in ("x", "y", "width", "height"))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


@pytest.fixture(scope="module")
def clip() -> Clip:
    """Return a clip of four objects with different names that do not occlude each other."""
    return render_clip(1, num_frames=FRAMES, names=["dog", "bus", "cat", "red circle"], resolution_wh=(320, 240))


# Predictions


@pytest.mark.parametrize(("block", "kind"), [("detect", Detector), ("point", Pointer)])
def test_predictions_match_the_detector(tiny: LocalModel, bgr: np.ndarray, block: str, kind: Any) -> None:
    other = as_bgr(render_scene(7, resolution_wh=(400, 300), names=["dog", "bus", "dog"], style="plain").image)
    images = [bgr, other]
    for result, image in zip(run_workflow(workflow(step(block, class_names=NAMES)), images), images, strict=True):
        found, exact = result["predictions"], kind(tiny)(image, NAMES)
        assert len(found) > 0
        np.testing.assert_allclose(found.xyxy, exact.xyxy, rtol=0, atol=IN_BATCHES)
        np.testing.assert_allclose(found.confidence, exact.confidence, rtol=0, atol=SCORE)
        assert found.class_id.tolist() == exact.class_id.tolist()
        assert found["class_name"].tolist() == exact["class_name"].tolist()


@every_class_block
def test_class_ids_follow_the_order_of_class_names(bgr: np.ndarray, block: str, output: str) -> None:
    for names in (NAMES, NAMES[::-1], ["umbrella", *NAMES]):
        (result,) = run_workflow(workflow(step(block, class_names=names)), bgr)
        found = result[output]
        assert sorted(found["class_name"]) == sorted(NAMES)
        assert [names[number] for number in found.class_id] == found["class_name"].tolist()


@every_class_block
def test_detection_ids_are_unique(bgr: np.ndarray, block: str, output: str) -> None:
    engine = compile_workflow(workflow(step(block, class_names=NAMES)))
    found = [result[output] for _ in range(2) for result in run_engine(engine, [bgr, bgr])]
    ids = np.concatenate([detections["detection_id"] for detections in found]).tolist()
    assert all(isinstance(number, str) for number in ids)
    assert len(set(ids)) == len(ids) == 4 * len(NAMES)


@every_class_block
@pytest.mark.parametrize("names", [NAMES, ["umbrella"]], ids=["detections", "no detections"])
def test_predictions_have_all_columns(bgr: np.ndarray, block: str, output: str, names: list[str]) -> None:
    """Without detections, the values are in the metadata."""
    (result,) = run_workflow(workflow(step(block, class_names=names)), bgr)
    found = result[output]
    count = len(NAMES) if names == NAMES else 0
    height, width = bgr.shape[:2]
    expected = {
        "parent_id": "image",
        "root_parent_id": "image",
        "parent_coordinates": [0, 0],
        "root_parent_coordinates": [0, 0],
        "parent_dimensions": [height, width],
        "root_parent_dimensions": [height, width],
        "image_dimensions": [height, width],
        "prediction_type": "keypoint-detection" if block == "point" else "object-detection",
    }
    assert len(found) == count
    assert {key: found[key].tolist() for key in expected} == {key: [value] * count for key, value in expected.items()}
    assert found["class_name"].shape == found["detection_id"].shape == found.confidence.shape == (count,)
    if not count:
        del expected["prediction_type"]
        assert {key: found.metadata[key] for key in expected} == expected


# Filters and properties


@pytest.mark.parametrize("kept", [["dog"], ["red circle", "bus"], ["umbrella"]])
def test_detections_filter_filters_by_class(bgr: np.ndarray, kept: list[str]) -> None:
    condition = {
        "type": "BinaryStatement",
        "left_operand": {
            "type": "DynamicOperand",
            "operations": [{"type": "ExtractDetectionProperty", "property_name": "class_name"}],
        },
        "comparator": {"type": "in (Sequence)"},
        "right_operand": {"type": "DynamicOperand", "operand_name": "kept"},
    }
    operation = {"type": "DetectionsFilter", "filter_operation": {"type": "StatementGroup", "statements": [condition]}}
    definition = workflow(
        detect(),
        core(
            "detections_filter@v1",
            "filter",
            predictions="$steps.detect.predictions",
            operations=[operation],
            operations_parameters={"kept": "$inputs.kept"},
        ),
        parameters=["kept"],
        outputs=["detect.predictions", "filter.predictions"],
    )
    (result,) = run_workflow(definition, bgr, kept=kept)
    before, after = result["detect.predictions"], result["filter.predictions"]
    expected = before[np.isin(before["class_name"], kept)]
    assert after["class_name"].tolist() == [name for name in NAMES if name in kept]
    assert after["detection_id"].tolist() == expected["detection_id"].tolist()
    assert np.array_equal(after.xyxy, expected.xyxy)


@every_class_block
@pytest.mark.parametrize("names", [NAMES, ["umbrella"]], ids=["detections", "no detections"])
def test_property_definition_reads_count_and_names(bgr: np.ndarray, block: str, output: str, names: list[str]) -> None:
    data = f"$steps.find.{output}"
    class_names = {"type": "DetectionsPropertyExtract", "property_name": "class_name"}
    definition = workflow(
        step(block, "find", class_names=names),
        core("property_definition@v1", "count", data=data, operations=[{"type": "SequenceLength"}]),
        core("property_definition@v1", "names", data=data, operations=[class_names]),
        outputs=["count.output", "names.output"],
    )
    (result,) = run_workflow(definition, bgr)
    expected = NAMES if names == NAMES else []
    assert result["count.output"] == len(expected)
    assert sorted(result["names.output"]) == sorted(expected)


# Trackers, lines and zones


@pytest.mark.parametrize("tracker", ["bytetrack", "sort", "ocsort", "botsort"])
def test_trackers_keep_ids_and_line_counter_counts_crossings(clip: Clip, tracker: str) -> None:
    """After detect, each object keeps its track ID, and an object that crosses the line is counted once."""
    tracked = "$steps.track.tracked_detections"
    _, line_y = MIDDLE_XY
    engine = compile_workflow(
        workflow(
            detect(class_names=list(clip.names)),
            core(f"trackers_{tracker}@v1", "track", image="$inputs.image", detections="$steps.detect.predictions"),
            core(
                "line_counter@v2",
                "line",
                image="$inputs.image",
                detections=tracked,
                line_segment=[[0, line_y], [320, line_y]],
            ),
            outputs=[
                "track.tracked_detections",
                "track.new_instances",
                "line.count_in",
                "line.count_out",
                "line.detections_in",
                "line.detections_out",
            ],
        )
    )
    owners: dict[int, set[str]] = {}
    new, crossed_up, crossed_down = 0, [], []
    for image in frames(clip):
        (result,) = run_engine(engine, image)
        found = result["track.tracked_detections"]
        for number, name in zip(found.tracker_id, found["class_name"], strict=True):
            owners.setdefault(int(number), set()).add(str(name))
        new += len(result["track.new_instances"])
        crossed_up += result["line.detections_in"]["class_name"].tolist()
        crossed_down += result["line.detections_out"]["class_name"].tolist()
    assert sorted(map(sorted, owners.values())) == sorted([name] for name in clip.names)
    assert new == len(clip.names)
    assert (crossed_up, crossed_down) == crossings(clip, line_y)
    assert (result["line.count_in"], result["line.count_out"]) == (len(crossed_up), len(crossed_down))


def crossings(clip: Clip, line_y: float) -> tuple[list[str], list[str]]:
    """Return the names of the objects whose box moves completely above a horizontal line, and completely below it."""
    up, down = [], []
    above: dict[int, bool] = {}
    for _, objects in clip:
        for item in objects:
            _, top, _, bottom = item.xyxy
            if top < line_y < bottom:
                continue
            is_above = bottom <= line_y
            if above.get(item.track_id, is_above) != is_above:
                (up if is_above else down).append(item.name)
            above[item.track_id] = is_above
    return up, down


@pytest.mark.parametrize("tracker", ["moondream_cv", "bytetrack", "sort", "ocsort", "botsort"])
def test_trackers_and_counters_accept_empty_frames(clip: Clip, tracker: str) -> None:
    """The frames have no objects of the class."""
    detections = "$steps.track.tracked_detections"
    if tracker == "moondream_cv":
        steps = [step("track", "track", class_names=["umbrella"])]
    else:
        track = core(f"trackers_{tracker}@v1", "track", image="$inputs.image", detections="$steps.detect.predictions")
        steps = [detect(class_names=["umbrella"]), track]
    line = core(
        "line_counter@v2", "line", image="$inputs.image", detections=detections, line_segment=[[0, 120], [320, 120]]
    )
    outputs = ["track.tracked_detections", "track.new_instances", "line.count_in", "line.count_out"]
    engine = compile_workflow(workflow(*steps, line, outputs=outputs))
    for image in itertools.islice(frames(clip), 3):
        (result,) = run_engine(engine, image)
        assert len(result["track.tracked_detections"]) == len(result["track.new_instances"]) == 0
        assert (result["line.count_in"], result["line.count_out"]) == (0, 0)


def test_time_in_zone_measures_tracks(clip: Clip) -> None:
    """Objects in the left half at the end of the clip have the expected time in the zone."""
    middle_x, _ = MIDDLE_XY
    engine = compile_workflow(
        workflow(
            step("track", "track", class_names=list(clip.names), every=2),
            core(
                "time_in_zone@v3",
                "zone",
                image="$inputs.image",
                detections="$steps.track.tracked_detections",
                zone=[[0, 0], [middle_x, 0], [middle_x, 240], [0, 240]],
            ),
            outputs=["zone.timed_detections"],
        )
    )
    for image in frames(clip):
        (result,) = run_engine(engine, image)
    timed = result["zone.timed_detections"]
    seconds = dict(zip(timed["class_name"].tolist(), timed["time_in_zone"].tolist(), strict=True))
    expected = {name: count / FPS for name, count in frames_on_the_left(clip, middle_x).items()}
    assert 0 < len(expected) < len(clip.names)
    assert seconds == pytest.approx(expected, abs=0.3)  # some centers are on the border for a few frames


def frames_on_the_left(clip: Clip, middle_x: float) -> dict[str, int]:
    """Return how many frames ago each object that is in the left half at the end entered it."""
    since: dict[str, int] = {}
    for number, (_, objects) in enumerate(clip):
        left = {item.name for item in objects if item.center[0] < middle_x}
        since = {name: since.get(name, number) for name in left}
    return {name: len(clip) - 1 - number for name, number in since.items()}


# Crops


CROPS = [
    detect(class_names=["bus", "dog"]),
    core(
        "detection_offset@v1",
        "wider",
        predictions="$steps.detect.predictions",
        offset_width=120,  # the tiny model does not detect objects that fill the image
        offset_height=120,
    ),
    core("dynamic_crop@v1", "crop", images="$inputs.image", predictions="$steps.wider.predictions"),
]


@pytest.fixture(scope="module")
def apart() -> Scene:
    """Return a scene of a dog and a bus, far from each other and from the corner, so that each has a separate crop."""
    return render_scene(24, resolution_wh=(320, 240), names=["dog", "bus"], style="plain")


def on_crops(block: str, *steps: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
    """Return a workflow that crops detections with a margin, and runs a block for "dog" on each crop."""
    return workflow(
        *CROPS, step(block, "again", images="$steps.crop.crops", class_names=["dog"]), *steps, outputs=outputs
    )


@pytest.mark.parametrize(("block", "kind"), [("detect", Detector), ("point", Pointer)])
def test_detections_in_crops_map_to_the_original_image(tiny: LocalModel, apart: Scene, block: str, kind: Any) -> None:
    """Detections in a crop are in pixels of the crop, with the position of the crop in the image."""
    from roboflow_workflows.core_steps.common.utils import sv_detections_to_root_coordinates

    definition = on_crops(block, outputs=["crop.crops", "again.predictions"])
    definition["outputs"][-1]["coordinates_system"] = "own"
    (result,) = run_workflow(definition, as_bgr(apart.image))
    assert len(result["crop.crops"]) == 2
    in_dogs_crop = result["again.predictions"][1]
    crop = result["crop.crops"][1]
    exact = kind(tiny)(crop.numpy_image, ["dog"])
    assert len(exact) == 1
    np.testing.assert_allclose(in_dogs_crop.xyxy, exact.xyxy, rtol=0, atol=IN_BATCHES)

    origin = crop.parent_metadata.origin_coordinates
    shift = np.array([origin.left_top_x, origin.left_top_y] * 2)
    assert (shift > 0).all()
    in_image = sv_detections_to_root_coordinates(in_dogs_crop)
    np.testing.assert_allclose(in_image.xyxy, exact.xyxy + shift, rtol=0, atol=IN_BATCHES)
    assert is_on(in_image.xyxy[0], apart.named("dog")[0])
    if block == "point":
        np.testing.assert_allclose(in_image["keypoints_xy"][0], in_image.xyxy[:, :2], rtol=0, atol=IN_BATCHES)


def is_on(xyxy: Any, item: Any) -> bool:
    """Return whether a box matches an object, or a point is inside its box."""
    left, top, right, bottom = xyxy
    if (left, top) != (right, bottom):
        return overlap(xyxy, item) > 0.7
    return bool(item.xyxy[0] < left < item.xyxy[2] and item.xyxy[1] < top < item.xyxy[3])


@pytest.mark.parametrize("block", ["detect", "point"])
def test_serialized_detections_in_crops_have_both_coordinates(apart: Scene, block: str) -> None:
    """The default is pixels of the image; the own coordinates are pixels of the crop, with its origin in the image."""
    definition = on_crops(block, outputs=["again.predictions"])
    definition["outputs"].append({**definition["outputs"][0], "name": "own", "coordinates_system": "own"})
    (result,) = run_workflow(definition, as_bgr(apart.image), serialize=True)
    ((in_image,), (in_crop,)) = (result[name][1]["predictions"] for name in ("again.predictions", "own"))
    assert result["again.predictions"][1]["image"] == {"width": 320, "height": 240}
    assert is_on(corners(in_image), apart.named("dog")[0])
    assert in_image["parent_id"] == in_crop["root_parent_id"] == "image"
    assert in_crop["parent_id"] not in ("image", in_crop["detection_id"])
    origin = in_crop["parent_origin"]
    assert origin == in_crop["root_parent_origin"]
    assert (origin["width"], origin["height"]) == (320, 240)
    shift = [origin["offset_x"], origin["offset_y"]] * 2
    assert corners(in_image) == pytest.approx(np.add(corners(in_crop), shift).tolist(), abs=IN_BATCHES)
    if block == "point":
        (key_point,) = in_image["keypoints"]
        assert (key_point["x"], key_point["y"]) == pytest.approx((in_image["x"], in_image["y"]), abs=IN_BATCHES)


def test_detections_stitch_merges_detections_of_crops(apart: Scene) -> None:
    """Crops without detections are accepted."""
    stitch = core(
        "detections_stitch@v1",
        "stitch",
        reference_image="$inputs.image",
        predictions="$steps.again.predictions",
        overlap_filtering_strategy="nms",
    )
    (result,) = run_workflow(
        on_crops("detect", stitch, outputs=["again.predictions", "stitch.predictions"]), as_bgr(apart.image)
    )
    assert [len(found) for found in result["again.predictions"]] == [0, 1]
    stitched = result["stitch.predictions"]
    assert stitched["class_name"].tolist() == ["dog"]
    assert is_on(stitched.xyxy[0], apart.named("dog")[0])


# Visualizations


def drawn_on(block: str, find: dict[str, Any], image: np.ndarray, **fields: Any) -> np.ndarray:
    """Return a mask of the pixels that a visualization of a step's predictions changes, [H, W] bool."""
    predictions = f"$steps.{find['name']}.predictions"
    definition = workflow(find, core(block, "draw", image="$inputs.image", predictions=predictions, **fields))
    (result,) = run_workflow(definition, image)
    drawn = result["image"].numpy_image
    assert drawn.shape == image.shape
    mask: np.ndarray = (drawn != image).any(axis=2)
    return mask


def check_near(drawn: np.ndarray, boxes: np.ndarray, margin: int) -> None:
    """Assert that pixels change within a margin of each box, and nowhere else."""
    assert len(boxes) > 0
    regions = np.zeros((len(boxes), *drawn.shape), bool)
    for region, (left, top, right, bottom) in zip(regions, np.round(boxes).astype(int), strict=True):
        region[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = True
    assert (drawn & regions).any(axis=(1, 2)).all()
    assert not (drawn & ~regions.any(axis=0)).any()


VISUALIZATIONS = {  # block → fields, and the margin of the drawing around a box or point in pixels
    "bounding_box_visualization@v1": ({}, 4),
    "blur_visualization@v1": ({"padding": 3}, 4),
    "corner_visualization@v1": ({}, 20),
    "dot_visualization@v1": ({}, 8),
    "label_visualization@v1": ({"text_scale": 0.4}, 90),
    "label_visualization@v2": ({"text": "Class and Confidence", "text_scale": 0.4}, 130),
    "pixelate_visualization@v1": ({"pixel_size": 8}, 4),
}


@pytest.mark.parametrize("block", VISUALIZATIONS)
def test_visualizations_draw_detections(tiny: LocalModel, bgr: np.ndarray, block: str) -> None:
    fields, margin = VISUALIZATIONS[block]
    drawn = drawn_on(block, detect(), bgr, **fields)
    check_near(drawn, Detector(tiny)(bgr, NAMES).xyxy, margin)


KEY_POINTS = {  # annotator → fields and margin
    "vertex": ({"radius": 5}, 8),
    "vertex_label": ({"text_scale": 0.3, "text_padding": 2}, 40),
}


@pytest.mark.parametrize("annotator", KEY_POINTS)
def test_keypoint_visualization_draws_points(tiny: LocalModel, bgr: np.ndarray, annotator: str) -> None:
    fields, margin = KEY_POINTS[annotator]
    drawn = drawn_on("keypoint_visualization@v1", point(), bgr, annotator_type=annotator, **fields)
    check_near(drawn, Pointer(tiny)(bgr, NAMES).xyxy, margin)


@pytest.mark.parametrize(
    "block",
    ["bounding_box_visualization@v1", "blur_visualization@v1", "dot_visualization@v1", "label_visualization@v2"],
)
def test_visualizations_draw_points(tiny: LocalModel, bgr: np.ndarray, block: str) -> None:
    """A point is drawn like a box without area."""
    names = ["dog", "bus"]  # blurring a shape of one color is invisible
    fields, margin = VISUALIZATIONS[block]
    drawn = drawn_on(block, point(class_names=names), bgr, **fields)
    check_near(drawn, Pointer(tiny)(bgr, names).xyxy, margin)


@pytest.mark.parametrize("block", [*VISUALIZATIONS, "keypoint_visualization@v1"])
def test_visualizations_of_no_detections_leave_the_image_unchanged(bgr: np.ndarray, block: str) -> None:
    fields, _ = VISUALIZATIONS.get(block, ({"annotator_type": "vertex"}, 0))
    assert not drawn_on(block, point(class_names=["umbrella"]), bgr, **fields).any()


# Combined predictions


def test_consensus_keeps_detections_of_both_steps(bgr: np.ndarray) -> None:
    """Detections of one step only are removed."""
    definition = workflow(
        detect("first", class_names=["dog", "bus"]),
        detect("second", class_names=["red circle", "dog"]),
        core(
            "detections_consensus@v1",
            "consensus",
            predictions_batches=["$steps.first.predictions", "$steps.second.predictions"],
            required_votes=2,
        ),
        outputs=["first.predictions", "consensus.predictions", "consensus.object_present"],
    )
    (result,) = run_workflow(definition, bgr)
    first, agreed = result["first.predictions"], result["consensus.predictions"]
    assert agreed["class_name"].tolist() == ["dog"]
    np.testing.assert_allclose(agreed.xyxy, first[first["class_name"] == "dog"].xyxy, rtol=0, atol=IN_BATCHES)
    assert result["consensus.object_present"] is True


def test_detections_merge_returns_the_enclosing_box(bgr: np.ndarray) -> None:
    merge = core("detections_merge@v1", "merge", predictions="$steps.detect.predictions")
    (result,) = run_workflow(workflow(detect(), merge, outputs=["detect.predictions", "merge.predictions"]), bgr)
    boxes = result["detect.predictions"].xyxy
    expected = [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)]
    assert result["merge.predictions"].xyxy.tolist() == [pytest.approx(expected)]


# Points for SAM


def test_points_have_the_format_of_sam(tiny: LocalModel, bgr: np.ndarray) -> None:
    from roboflow_workflows.core_steps.models.foundation.segment_anything_common.visual_prompt import (
        normalise_labeled_points,
    )

    (result,) = run_workflow(workflow(point()), bgr)
    expected = [(float(x), float(y), True) for x, y in Pointer(tiny)(bgr, NAMES).xyxy[:, :2]]
    assert len(expected) == len(NAMES)
    np.testing.assert_allclose(normalise_labeled_points(result["points"]), expected, rtol=0, atol=IN_BATCHES)


# SAM's block uses the same points for all images of a batch, so the batch must have one image.
FIRST_POINTS = [
    point(class_names=["dog"], max_objects=1),
    core("dimension_collapse@v1", "batch", data="$steps.point.points"),
    core(
        "property_definition@v1",
        "points",
        data="$steps.batch.output",
        operations=[{"type": "SequenceAggregate", "mode": "first"}],
    ),
]


def test_points_can_be_connected_to_sam(bgr: np.ndarray) -> None:
    """The engine accepts their kind and dimension, and the points are those of the image."""
    sam = core("sam3_interactive@v1", "sam", images="$inputs.image", points="$steps.points.output")
    needed = {"workflows_core.model_manager": None, "workflows_core.api_key": None}
    compile_workflow(workflow(*FIRST_POINTS, sam), **needed)
    (result,) = run_workflow(workflow(*FIRST_POINTS, outputs=["point.points", "points.output"]), bgr)
    assert len(result["point.points"]) == 1
    assert result["points.output"] == result["point.points"]


@pytest.mark.parametrize("find", [detect(), point()], ids=["detect", "point"])
def test_predictions_can_be_connected_to_sam_as_boxes(find: dict[str, Any]) -> None:
    boxes = f"$steps.{find['name']}.predictions"
    sam = core("sam3_interactive@v1", "sam", images="$inputs.image", boxes=boxes)
    compile_workflow(workflow(find, sam), **{"workflows_core.model_manager": None, "workflows_core.api_key": None})


# Shared models


FOUR_STEPS = workflow(
    detect(),
    point(),
    step("caption", "caption"),
    step("query", "query", question="What is this?"),
    outputs=["detect.predictions", "point.points", "caption.caption", "query.answer"],
)


def images_encoded(engine: Any, seed: int) -> tuple[int, int]:
    """Return how often the shared tiny model encodes a new image in a first and a second run.

    Args:
        engine: Compiled workflow.
        seed: Seed of the image, different for each test.
    """
    cache = shared_pool().get("tiny").image_cache  # type: ignore[attr-defined]
    image = np.random.default_rng(seed).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    counts = []
    for _ in range(2):
        before, lookups = cache.misses, cache.hits + cache.misses
        run_engine(engine, image)
        assert cache.hits + cache.misses - lookups == len(FOUR_STEPS["steps"]), "another model was used"
        counts.append(cache.misses - before)
    return counts[0], counts[1]


def test_steps_share_a_model_and_its_encoded_images() -> None:
    assert images_encoded(compile_workflow(FOUR_STEPS), seed=1) == (1, 0)


def test_workflows_share_a_model_and_its_encoded_images(bgr: np.ndarray) -> None:
    """An image that one workflow has encoded is not encoded again."""
    model: Any = shared_pool().get("tiny")
    image = np.ascontiguousarray(255 - bgr)
    run_workflow(workflow(detect()), image)
    hits, misses = model.image_cache.hits, model.image_cache.misses
    run_workflow(workflow(point()), image)
    run_workflow(workflow(step("track", class_names=NAMES)), image)
    assert (model.image_cache.hits, model.image_cache.misses) == (hits + 2, misses)
    assert shared_pool().get("tiny") is model


def test_concurrent_steps_share_encoded_images() -> None:
    """Roboflow's HTTP server runs up to eight steps of a workflow concurrently."""
    from roboflow_workflows.execution_engine.core import ExecutionEngine

    engine = ExecutionEngine.init(workflow_definition=FOUR_STEPS, init_parameters={}, max_concurrent_steps=8)
    assert images_encoded(engine, seed=2) == (1, 0)
