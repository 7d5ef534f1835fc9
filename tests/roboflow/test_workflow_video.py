"""Test the blocks in Roboflow's stream runners on a video file: every frame is returned in order, despite failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import ErrorResult, Request, Result
from moondream_cv.scenes import render_clip
from moondream_cv.scenes.clips import Clip
from moondream_cv_blocks import ModelPool
from tests.helpers.clips import deadline, write_clip
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

FRAMES = 60
NAMES = ["dog", "red circle"]
EVERY = 5
LINE = 280  # x in pixels; only the red circle crosses it
SECONDS = 240  # time limit of a pipeline
FAILED_CALLS = range(20, 30)  # calls of the model that fail if it runs on every frame

Prediction = tuple[dict[str, Any], Any]  # outputs, and the runner's `VideoFrame`


class FailingModel:
    """A model that fails in some calls.

    Attributes:
        calls: Number of calls.
    """

    def __init__(self, model: LocalModel, fails: Callable[[int], bool], raises: bool) -> None:
        self.model, self.skills, self.has_scores = model, model.skills, model.has_scores
        self.fails, self.raises, self.calls = fails, raises, 0

    def run(self, requests: Sequence[Request]) -> list[Result]:
        self.calls += 1
        if not self.fails(self.calls - 1):
            return self.model.run(requests)
        if self.raises:
            raise ConnectionError("the server is down")
        return [ErrorResult(ConnectionError("the server is down")) for _ in requests]

    def close(self) -> None:
        """Do nothing; the model is shared."""


def streamvision_pipeline(video: str | list[str], definition: dict[str, Any], pool: ModelPool, **options: Any) -> Any:
    """Return a pipeline of streamvision, which requires neither an API key nor `inference`."""
    from streamvision.stream.pipeline import InferencePipeline

    return InferencePipeline.init_with_workflow(
        video,
        workflow_specification=definition,
        workflow_init_parameters={"moondream_cv_blocks.models": pool},
        step_error_handler=None,
        **options,
    )


def inference_pipeline(video: str | list[str], definition: dict[str, Any], pool: ModelPool, **options: Any) -> Any:
    """Return a pipeline of `inference`."""
    from inference import InferencePipeline

    return InferencePipeline.init_with_workflow(
        video,
        workflow_specification=definition,
        workflow_init_parameters={"moondream_cv_blocks.models": pool},
        **options,
    )


RUNNERS = {"streamvision": streamvision_pipeline, "inference": inference_pipeline}


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return RUNNERS[request.param]


def run_pipeline(
    start: Callable[..., Any], video: str | list[str], definition: dict[str, Any], model: Any, **options: Any
) -> list[Prediction]:
    """Run a pipeline until the video ends, and return the outputs of all frames."""
    pool, out = ModelPool(), []
    pool.add("tiny", model)
    pipeline = start(video, definition, pool, on_prediction=lambda *given: out.append(given), **options)
    with deadline(SECONDS):
        pipeline.start()
        pipeline.join()
    return out


def check_frames(out: Sequence[Prediction], clip: Clip) -> None:
    """Assert that all frames are returned in order, with the right image."""
    assert [frame.frame_id for _, frame in out] == list(range(1, FRAMES + 1))
    for (_, frame), (rgb, _) in zip(out, clip, strict=True):
        assert np.abs(frame.image[..., ::-1].astype(int) - rgb).mean() < 8  # compression artifacts


def failures(out: Sequence[Prediction], name: str) -> list[int]:
    """Return the indices of the frames on which a step failed, and assert its error messages."""
    failed = [index for index, (outputs, _) in enumerate(out) if outputs[f"{name}.error_status"]]
    for index in failed:
        assert "the server is down" in out[index][0][f"{name}.error_message"]
    return failed


def box_drawing(predictions: str) -> dict[str, Any]:
    return {
        "type": "roboflow_core/bounding_box_visualization@v1",
        "name": "boxes",
        "image": "$inputs.image",
        "predictions": predictions,
    }


@pytest.fixture(scope="module")
def clip() -> Clip:
    return render_clip(1, num_frames=FRAMES, names=["dog", "red circle", "dog"], resolution_wh=(320, 240))


@pytest.fixture(scope="module")
def video(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return str(write_clip(path, (rgb[..., ::-1] for rgb, _ in clip)))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the working directory, into which the runners write profiles."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def counting_workflow() -> dict[str, Any]:
    """Return a workflow that tracks, counts line crossings and draws boxes."""
    return workflow(
        step("track", "objects", class_names=NAMES, every=EVERY),
        {
            "type": "roboflow_core/line_counter@v2",
            "name": "line",
            "image": "$inputs.image",
            "detections": "$steps.objects.tracked_detections",
            "line_segment": [[LINE, 0], [LINE, 240]],
        },
        box_drawing("$steps.objects.tracked_detections"),
        outputs=[
            *(f"objects.{name}" for name in ("tracked_detections", "new_instances", "error_status", "error_message")),
            *(f"line.{name}" for name in ("count_in", "count_out")),
            "boxes.image",
        ],
    )


@pytest.fixture(scope="module")
def detect_workflow() -> dict[str, Any]:
    """Return a workflow that detects objects and draws boxes."""
    return workflow(
        step("detect", "objects", class_names=NAMES),
        box_drawing("$steps.objects.predictions"),
        outputs=["objects.predictions", "objects.error_status", "objects.error_message", "boxes.image"],
    )


def crossings(clip: Clip) -> int:
    """Return how many objects are on different sides of the line in the first and the last frame."""
    sides = [{o.track_id: (o.xyxy[0] + o.xyxy[2]) / 2 > LINE for o in clip.frame(at)[1]} for at in (0, -1)]
    return sum(sides[0][track_id] != sides[1][track_id] for track_id in sides[0].keys() & sides[1].keys())


def test_track_and_line_counter_over_a_video(
    runner: Callable[..., Any], video: str, clip: Clip, counting_workflow: dict[str, Any], tiny: LocalModel
) -> None:
    model = FailingModel(tiny, lambda call: False, raises=False)
    out = run_pipeline(runner, video, counting_workflow, model)
    check_frames(out, clip)
    assert failures(out, "objects") == []
    assert model.calls == FRAMES // EVERY
    news = [number for outputs, _ in out for number in outputs["objects.new_instances"].tracker_id.tolist()]
    assert news == list(range(1, len(clip.names) + 1))
    last = out[-1][0]
    assert last["line.count_in"] + last["line.count_out"] == crossings(clip) == 1
    for outputs, frame in out:
        drawn = outputs["boxes.image"].numpy_image
        assert drawn.shape == frame.image.shape
        assert len(outputs["objects.tracked_detections"]) > 0
        assert not np.array_equal(drawn, frame.image)


def test_detect_over_a_video(
    runner: Callable[..., Any], video: str, clip: Clip, detect_workflow: dict[str, Any], tiny: LocalModel
) -> None:
    out = run_pipeline(runner, video, detect_workflow, tiny)
    check_frames(out, clip)
    assert failures(out, "objects") == []
    assert all(len(outputs["objects.predictions"]) >= 2 for outputs, _ in out)


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "returns errors"])
def test_video_continues_after_model_failures(
    runner: Callable[..., Any],
    video: str,
    clip: Clip,
    detect_workflow: dict[str, Any],
    tiny: LocalModel,
    raises: bool,
) -> None:
    out = run_pipeline(runner, video, detect_workflow, FailingModel(tiny, FAILED_CALLS.__contains__, raises))
    check_frames(out, clip)
    assert failures(out, "objects") == list(FAILED_CALLS)
    for index, (outputs, frame) in enumerate(out):
        assert (len(outputs["objects.predictions"]) == 0) == (index in FAILED_CALLS)
        assert np.array_equal(outputs["boxes.image"].numpy_image, frame.image) == (index in FAILED_CALLS)


@pytest.mark.parametrize("call", [0, 6, FRAMES // EVERY - 1])
def test_track_continues_after_a_failed_keyframe(
    video: str, clip: Clip, counting_workflow: dict[str, Any], tiny: LocalModel, call: int
) -> None:
    out = run_pipeline(
        streamvision_pipeline, video, counting_workflow, FailingModel(tiny, lambda number: number == call, raises=True)
    )
    check_frames(out, clip)
    assert [index for index, (outputs, _) in enumerate(out) if outputs["objects.error_status"]] == list(
        range(call * EVERY, (call + 1) * EVERY)
    )
    numbers = {n for outputs, _ in out for n in outputs["objects.tracked_detections"].tracker_id.tolist()}
    assert numbers == {1, 2, 3}
    assert out[-1][0]["line.count_in"] + out[-1][0]["line.count_out"] == 1


def test_video_continues_if_the_model_always_fails(
    video: str, clip: Clip, counting_workflow: dict[str, Any], tiny: LocalModel
) -> None:
    out = run_pipeline(
        streamvision_pipeline, video, counting_workflow, FailingModel(tiny, lambda call: True, raises=True)
    )
    check_frames(out, clip)
    assert failures(out, "objects") == list(range(FRAMES))
    assert all(len(outputs["objects.tracked_detections"]) == 0 for outputs, _ in out)


def test_two_videos_are_tracked_separately(
    video: str, clip: Clip, counting_workflow: dict[str, Any], tiny: LocalModel, tmp_path: Path
) -> None:
    """The frames of both videos arrive in batches."""
    backwards = write_clip(tmp_path / "backwards.mp4", [rgb[..., ::-1] for rgb, _ in reversed(list(clip))])
    model = FailingModel(tiny, lambda call: False, raises=False)
    batches = run_pipeline(streamvision_pipeline, [video, str(backwards)], counting_workflow, model)
    for source in (0, 1):
        out = [(outputs[source], frames[source]) for outputs, frames in batches if frames[source] is not None]
        assert [frame.frame_id for _, frame in out] == list(range(1, FRAMES + 1))
        assert {frame.source_id for _, frame in out} == {source}
        assert out[-1][0]["line.count_in"] + out[-1][0]["line.count_out"] == 1
    assert model.calls == FRAMES // EVERY


def test_track_accepts_workflow_parameters(video: str, tiny: LocalModel) -> None:
    definition = workflow(
        step("track", "objects", class_names="$inputs.names", every="$inputs.every"),
        outputs=["objects.tracked_detections"],
        parameters=["names", "every"],
    )
    model = FailingModel(tiny, lambda call: False, raises=False)
    out = run_pipeline(
        streamvision_pipeline, video, definition, model, workflows_parameters={"names": "red circle", "every": 10}
    )
    assert model.calls == FRAMES // 10
    assert {name for outputs, _ in out for name in outputs["objects.tracked_detections"].data["class_name"]} == {
        "red circle"
    }


@pytest.mark.parametrize("runner", RUNNERS)
def test_pipeline_without_a_custom_pool(runner: str, video: str, clip: Clip, detect_workflow: dict[str, Any]) -> None:
    """The blocks use the shared pool."""
    out: list[Prediction] = []
    options: dict[str, Any] = {
        "workflow_specification": detect_workflow,
        "on_prediction": lambda *given: out.append(given),
    }
    if runner == "streamvision":
        from streamvision.stream.pipeline import InferencePipeline

        options |= {"workflow_init_parameters": {}, "step_error_handler": None}
    else:
        from inference import InferencePipeline
    pipeline = InferencePipeline.init_with_workflow(video, **options)
    with deadline(SECONDS):
        pipeline.start()
        pipeline.join()
    check_frames(out, clip)
    assert failures(out, "objects") == []
