"""Our blocks under Roboflow's stream runners, over a video file: every frame comes out, in order, whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moondream_cv.engine.local import LocalModel
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
LINE = 280  # x in pixels: the red circle crosses it, and nothing else does
SECONDS = 240  # after which a runner hangs
FAILING = range(20, 30)  # the calls of the model in the midst, where it is asked for each frame

Prediction = tuple[dict[str, Any], Any]  # outputs, and the runner's `VideoFrame`


class Failing:
    """A model that is out of order for some calls.

    Attributes:
        calls: How often it was asked.
    """

    def __init__(self, model: LocalModel, fails: Callable[[int], bool], raises: bool) -> None:
        self.model, self.skills, self.has_scores = model, model.skills, model.has_scores
        self.fails, self.raises, self.calls = fails, raises, 0

    def run(self, requests: Sequence[Request]) -> list[Result]:
        self.calls += 1
        if not self.fails(self.calls - 1):
            return self.model.run(requests)
        if self.raises:
            raise ConnectionError("nobody is there")
        return [ErrorResult(ConnectionError("nobody is there")) for _ in requests]

    def close(self) -> None:
        """It belongs to somebody else."""


def neutral(video: str | list[str], definition: dict[str, Any], pool: ModelPool, **options: Any) -> Any:
    """A pipeline of streamvision, which needs neither a key nor `inference`."""
    from streamvision.stream.pipeline import InferencePipeline

    return InferencePipeline.init_with_workflow(
        video,
        workflow_specification=definition,
        workflow_init_parameters={"moondream_cv_blocks.models": pool},
        step_error_handler=None,
        **options,
    )


def of_inference(video: str | list[str], definition: dict[str, Any], pool: ModelPool, **options: Any) -> Any:
    """A pipeline of `inference`."""
    from inference import InferencePipeline

    return InferencePipeline.init_with_workflow(
        video,
        workflow_specification=definition,
        workflow_init_parameters={"moondream_cv_blocks.models": pool},
        **options,
    )


RUNNERS = {"streamvision": neutral, "inference": of_inference}


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return RUNNERS[request.param]


def played(
    start: Callable[..., Any], video: str | list[str], definition: dict[str, Any], model: Any, **options: Any
) -> list[Prediction]:
    """What comes out of a pipeline until the video ends."""
    pool, out = ModelPool(), []
    pool.add("tiny", model)
    pipeline = start(video, definition, pool, on_prediction=lambda *given: out.append(given), **options)
    with deadline(SECONDS):
        pipeline.start()
        pipeline.join()
    return out


def check_frames(out: Sequence[Prediction], clip: Clip) -> None:
    """All of them, in order, and each the one that it says it is."""
    assert [frame.frame_id for _, frame in out] == list(range(1, FRAMES + 1))
    for (_, frame), (rgb, _) in zip(out, clip, strict=True):
        assert np.abs(frame.image[..., ::-1].astype(int) - rgb).mean() < 8  # what the codec makes of it


def failures(out: Sequence[Prediction], name: str) -> list[int]:
    """On which frames a step has failed; it has said why, and found nothing there."""
    failed = [index for index, (outputs, _) in enumerate(out) if outputs[f"{name}.error_status"]]
    for index in failed:
        assert "nobody is there" in out[index][0][f"{name}.error_message"]
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
    """Runners write profiles into the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def counting() -> dict[str, Any]:
    """Track → line counter → drawing."""
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
def detecting() -> dict[str, Any]:
    """Detect → drawing."""
    return workflow(
        step("detect", "objects", class_names=NAMES),
        box_drawing("$steps.objects.predictions"),
        outputs=["objects.predictions", "objects.error_status", "objects.error_message", "boxes.image"],
    )


def crossings(clip: Clip) -> int:
    """How many objects go from one side of the line to the other, by the truth of the first and last frames."""
    sides = [{o.track_id: (o.xyxy[0] + o.xyxy[2]) / 2 > LINE for o in clip.frame(at)[1]} for at in (0, -1)]
    return sum(sides[0][track_id] != sides[1][track_id] for track_id in sides[0].keys() & sides[1].keys())


def test_track_and_count(
    runner: Callable[..., Any], video: str, clip: Clip, counting: dict[str, Any], tiny: LocalModel
) -> None:
    model = Failing(tiny, lambda call: False, raises=False)
    out = played(runner, video, counting, model)
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


def test_detect(
    runner: Callable[..., Any], video: str, clip: Clip, detecting: dict[str, Any], tiny: LocalModel
) -> None:
    out = played(runner, video, detecting, tiny)
    check_frames(out, clip)
    assert failures(out, "objects") == []
    assert all(len(outputs["objects.predictions"]) >= 2 for outputs, _ in out)


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "gives an error"])
def test_a_model_that_fails_in_the_midst(
    runner: Callable[..., Any],
    video: str,
    clip: Clip,
    detecting: dict[str, Any],
    tiny: LocalModel,
    raises: bool,
) -> None:
    out = played(runner, video, detecting, Failing(tiny, FAILING.__contains__, raises))
    check_frames(out, clip)
    assert failures(out, "objects") == list(FAILING)
    for index, (outputs, frame) in enumerate(out):
        assert (len(outputs["objects.predictions"]) == 0) == (index in FAILING)
        assert np.array_equal(outputs["boxes.image"].numpy_image, frame.image) == (index in FAILING)


@pytest.mark.parametrize("call", [0, 6, FRAMES // EVERY - 1])
def test_a_look_that_fails(video: str, clip: Clip, counting: dict[str, Any], tiny: LocalModel, call: int) -> None:
    out = played(neutral, video, counting, Failing(tiny, lambda number: number == call, raises=True))
    check_frames(out, clip)
    assert [index for index, (outputs, _) in enumerate(out) if outputs["objects.error_status"]] == list(
        range(call * EVERY, (call + 1) * EVERY)
    )
    numbers = {n for outputs, _ in out for n in outputs["objects.tracked_detections"].tracker_id.tolist()}
    assert numbers == {1, 2, 3}
    assert out[-1][0]["line.count_in"] + out[-1][0]["line.count_out"] == 1


def test_a_model_that_never_answers(video: str, clip: Clip, counting: dict[str, Any], tiny: LocalModel) -> None:
    out = played(neutral, video, counting, Failing(tiny, lambda call: True, raises=True))
    check_frames(out, clip)
    assert failures(out, "objects") == list(range(FRAMES))
    assert all(len(outputs["objects.tracked_detections"]) == 0 for outputs, _ in out)


def test_two_videos_at_once(video: str, clip: Clip, counting: dict[str, Any], tiny: LocalModel, tmp_path: Path) -> None:
    """Frames of both come in batches, and numbers and crossings are those of each one."""
    backwards = write_clip(tmp_path / "backwards.mp4", [rgb[..., ::-1] for rgb, _ in reversed(list(clip))])
    model = Failing(tiny, lambda call: False, raises=False)
    batches = played(neutral, [video, str(backwards)], counting, model)
    for source in (0, 1):
        out = [(outputs[source], frames[source]) for outputs, frames in batches if frames[source] is not None]
        assert [frame.frame_id for _, frame in out] == list(range(1, FRAMES + 1))
        assert {frame.source_id for _, frame in out} == {source}
        assert out[-1][0]["line.count_in"] + out[-1][0]["line.count_out"] == 1
    assert model.calls == FRAMES // EVERY


def test_parameters_of_the_workflow(video: str, tiny: LocalModel) -> None:
    definition = workflow(
        step("track", "objects", class_names="$inputs.names", every="$inputs.every"),
        outputs=["objects.tracked_detections"],
        parameters=["names", "every"],
    )
    model = Failing(tiny, lambda call: False, raises=False)
    out = played(neutral, video, definition, model, workflows_parameters={"names": "red circle", "every": 10})
    assert model.calls == FRAMES // 10
    assert {name for outputs, _ in out for name in outputs["objects.tracked_detections"].data["class_name"]} == {
        "red circle"
    }


@pytest.mark.parametrize("runner", RUNNERS)
def test_as_users_write_it(runner: str, video: str, clip: Clip, detecting: dict[str, Any]) -> None:
    """Without a pool of one's own: the blocks bring theirs."""
    out: list[Prediction] = []
    options: dict[str, Any] = {"workflow_specification": detecting, "on_prediction": lambda *given: out.append(given)}
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
