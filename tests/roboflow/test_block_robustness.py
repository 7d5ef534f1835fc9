"""What blocks keep to when things go wrong or come in an unusual form: tracks in crops of a video, outputs that cannot
be made, what is logged how often, passwords in URLs, folders that are deleted, odd values of fields, and memory.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import socket
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import supervision as sv

import moondream_cv
from moondream_cv.engine.local import LocalModel
from moondream_cv.errors import BackendError
from moondream_cv.requests import ErrorResult, Request
from moondream_cv.scenes import render_clip
from moondream_cv.scenes.clips import Clip
from moondream_cv.video.tracking import Tracker
from moondream_cv_blocks import ModelPool, pool
from tests.remote_server import Answer, RemoteServer, remote_server
from tests.roboflow_app import skip_without_server
from tests.workflows import BLOCKS, compiled, refusal, results, run, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

FINDERS = ("detect", "point", "track")
REQUIRED: dict[str, dict[str, Any]] = {
    "detect": {"class_names": ["dog"]},
    "point": {"class_names": ["dog"]},
    "query": {"question": "How many objects are there?"},
    "caption": {},
    "track": {"class_names": ["dog"]},
}
EMPTY: dict[str, dict[str, Any]] = {
    "detect": {"predictions": 0},
    "point": {"predictions": 0, "points": []},
    "query": {"answer": "", "reasoning": "", "grounding": []},
    "caption": {"caption": ""},
    "track": {"tracked_detections": 0, "new_instances": 0, "already_seen_instances": 0},
}
NO_IMAGE = np.zeros((0, 0, 3), np.uint8)
OUR_LOG = "moondream_cv_blocks.results"
OUT_OF_ORDER = "out of order"


class Looks:
    """The tiny model, which tells how often it was asked.

    Attributes:
        asked: How many requests came in each call.
        gives: Makes another result of a request, while it is set.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model, self.skills, self.has_scores = model, model.skills, model.has_scores
        self.asked: list[int] = []
        self.gives: Callable[[Request], Any] | None = None

    def run(self, requests: Sequence[Request]) -> Any:
        self.asked.append(len(requests))
        return self.model.run(requests) if self.gives is None else [self.gives(request) for request in requests]

    def close(self) -> None:
        """It belongs to somebody else."""


@pytest.fixture
def looks(tiny: LocalModel) -> Looks:
    return Looks(tiny)


def engine_of(definition: dict[str, Any], model: Looks | None = None) -> Any:
    """An engine with a pool of its own, in which `tiny` is this model."""
    models = ModelPool(device="cpu", timeout=5)
    if model is not None:
        models.add("tiny", model)  # type: ignore[arg-type]
    return compiled(definition, **{"moondream_cv_blocks.models": models})


def block_step(block: str, **fields: Any) -> dict[str, Any]:
    return step(block, **{**REQUIRED[block], **fields})


def in_video(bgr: np.ndarray, number: int, source: str = "camera") -> dict[str, Any]:
    """A frame as the stream runner passes it to the engine."""
    now = datetime.now(timezone.utc)
    metadata = {"video_identifier": source, "frame_number": number, "frame_timestamp": now, "fps": 30.0}
    return {"type": "numpy_object", "value": bgr, "video_metadata": metadata}


def check_failed(block: str, outputs: dict[str, Any], *says: str) -> None:
    """A block gives nothing on an image, and says why."""
    given = {name: len(value) if hasattr(value, "xyxy") else value for name, value in outputs.items()}
    message = given.pop("error_message")
    assert given == {**EMPTY[block], "error_status": True}
    assert all(words in message for words in says), message


# Tracks in crops of a video


NAMES = ["dog", "red circle"]
EVERY = 5
CROP = {"type": "roboflow_core/absolute_static_crop@v1", "name": "part", "images": "$inputs.image"}
STATIC = {**CROP, "x_center": 140, "y_center": 100, "width": 200, "height": 160}
SLICES = {  # left and right half
    "type": "roboflow_core/image_slicer@v2",
    "name": "part",
    "image": "$inputs.image",
    "slice_width": 160,
    "slice_height": 240,
    "overlap_ratio_width": 0.0,
    "overlap_ratio_height": 0.0,
}
PARTS = {"static crop": (STATIC, "crops", 1), "slices": (SLICES, "slices", 2)}
SEEDS = {"static crop": (2, 3), "slices": (6, 6)}  # clips in which each object stays within one of those parts
FORMS: dict[str, Callable[[np.ndarray, int], Any]] = {"video": in_video, "arrays": lambda bgr, number: bgr}
TRACKED = ("tracked_detections", "new_instances", "already_seen_instances")

Row = dict[str, Any]
Frame = list[dict[str, list[Row]]]  # of each part, what is in each output


def track_parts(part: str, model: Looks) -> Any:
    """An engine that tracks in each part of a frame."""
    cut, output, _ = PARTS[part]
    tracking = step("track", images=f"$steps.part.{output}", class_names=NAMES, every=EVERY)
    wanted = [f"step.{name}" for name in (*TRACKED, "error_message")]
    return engine_of(workflow(cut, tracking, outputs=wanted), model)


def tracked(engine: Any, *images: Any) -> list[Frame]:
    """What is serialised of each image: boxes in coordinates of the whole."""
    found = []
    for result in results(engine, list(images), serialize=True):
        values = {name: result[f"step.{name}"] for name in (*TRACKED, "error_message")}
        if isinstance(values["error_message"], str):  # there is one part, and no list of them
            values = {name: [value] for name, value in values.items()}
        assert set(values["error_message"]) == {""}
        rows = [
            {name: values[name][at]["predictions"] for name in TRACKED} for at in range(len(values["error_message"]))
        ]
        found.append(rows)
    return found


def numbers(rows: list[Row]) -> list[int]:
    return [row["tracker_id"] for row in rows]


def corners(row: Row) -> np.ndarray:
    x, y, width, height = (row[key] for key in ("x", "y", "width", "height"))
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def clips_of(part: str) -> list[Clip]:
    return [render_clip(seed, num_frames=18, names=NAMES, resolution_wh=(320, 240)) for seed in SEEDS[part]]


def bgr_frames(clip: Clip) -> list[np.ndarray]:
    return [np.ascontiguousarray(rgb[..., ::-1]) for rgb, _ in clip]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_frames_are_looked_at_when_they_are_due(part: str, form: str, looks: Looks) -> None:
    engine, looked = track_parts(part, looks), []
    for number, bgr in enumerate(bgr_frames(clips_of(part)[0]), 1):
        before = len(looks.asked)
        tracked(engine, FORMS[form](bgr, number))
        looked.append(len(looks.asked) - before)
    assert looked == [index % EVERY == 0 for index in range(len(looked))]
    assert set(looks.asked) == {PARTS[part][2] * len(NAMES)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_things_in_parts_of_frames_keep_their_numbers(part: str, form: str, looks: Looks) -> None:
    """And lie where they are in the whole frame."""
    engine, clip = track_parts(part, looks), clips_of(part)[0]
    owners: set[tuple[int, int, str]] = set()
    new: list[tuple[int, int]] = []
    for number, (bgr, (_, truth)) in enumerate(zip(bgr_frames(clip), clip, strict=True), 1):
        (frame,) = tracked(engine, FORMS[form](bgr, number))
        there = {item.name: np.array([item.xyxy]) for item in truth}
        assert len(frame) == PARTS[part][2]
        for at, outputs in enumerate(frame):
            assert sorted(numbers(outputs["tracked_detections"])) == sorted(
                numbers(outputs["new_instances"]) + numbers(outputs["already_seen_instances"])
            )
            new += [(at, one) for one in numbers(outputs["new_instances"])]
            for row in outputs["tracked_detections"]:
                overlap = sv.box_iou_batch(corners(row)[None], there[row["class"]])[0, 0]
                assert overlap > 0.5, (number, row, there)
                owners.add((at, row["tracker_id"], row["class"]))
    assert len(owners) == len(new) == len(set(new)) == len(NAMES)
    assert {name for _, _, name in owners} == set(NAMES)


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "in turn"])
def test_the_same_crop_of_two_cameras(together: bool, looks: Looks, tiny: LocalModel) -> None:
    clips = dict(zip(("left", "right"), clips_of("static crop"), strict=True))
    alone = {}
    for name, clip in clips.items():
        engine = track_parts("static crop", Looks(tiny))
        alone[name] = [tracked(engine, in_video(bgr, n, name))[0] for n, bgr in enumerate(bgr_frames(clip), 1)]
    engine = track_parts("static crop", looks)
    for index, pair in enumerate(zip(*map(bgr_frames, clips.values()), strict=True)):
        frames = [in_video(bgr, index + 1, name) for bgr, name in zip(pair, clips, strict=True)]
        found = tracked(engine, *frames) if together else [tracked(engine, frame)[0] for frame in frames]
        for name, frame in zip(clips, found, strict=True):
            check_same(frame, alone[name][index])
    due = len(range(0, len(clips["left"]), EVERY))
    assert sum(looks.asked) == due * len(clips) * len(NAMES)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("form", FORMS)
def test_parts_of_images_of_one_batch_are_apart(part: str, form: str, looks: Looks, tiny: LocalModel) -> None:
    """Also where nothing says that they are of different sources; the second image is the first from behind."""
    frames = bgr_frames(clips_of(part)[0])
    sources = [frames, frames[::-1]]
    alone = [track_parts(part, Looks(tiny)) for _ in sources]
    engine = track_parts(part, looks)
    for number, pair in enumerate(zip(*sources, strict=True), 1):
        images = [in_video(bgr, number, f"camera {at}") if form == "video" else bgr for at, bgr in enumerate(pair)]
        expected = [tracked(one, image)[0] for one, image in zip(alone, images, strict=True)]
        for here, there in zip(tracked(engine, *images), expected, strict=True):
            check_same(here, there)
    assert len(looks.asked) == len(range(0, len(frames), EVERY))


def check_same(here: Frame, there: Frame) -> None:
    """Numbers agree, and boxes but for what computing images together with others makes of them."""
    for one, other in zip(here, there, strict=True):
        for name in TRACKED:
            assert numbers(one[name]) == numbers(other[name])
            for row, expected in zip(one[name], other[name], strict=True):
                np.testing.assert_allclose(corners(row), corners(expected), atol=1)


# Outputs that cannot be made


def fail(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError(OUT_OF_ORDER)


@contextmanager
def broken_outputs(block: str, model: Looks, everywhere: bool) -> Iterator[None]:
    """Meanwhile a block fails on making outputs of what the model has given.

    Args:
        everywhere: Whether empty detections cannot be made either.
    """
    with pytest.MonkeyPatch.context() as patch:
        if block in FINDERS:
            patch.setattr(f"moondream_cv_blocks.{block}.as_prediction", fail)
            if everywhere:
                patch.setattr("moondream_cv_blocks.results.as_prediction", fail)
        else:
            model.gives = lambda request: object()
        try:
            yield
        finally:
            model.gives = None


@pytest.mark.parametrize("everywhere", [False, True], ids=["outputs", "empty ones too"])
@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_that_cannot_be_made(block: str, everywhere: bool, looks: Looks, bgr: np.ndarray) -> None:
    once = {"every": 1} if block == "track" else {}
    engine = engine_of(workflow(block_step(block, **once)), looks)
    with broken_outputs(block, looks, everywhere):
        failed = results(engine, [bgr, bgr])
    for outputs in failed:
        check_failed(block, outputs, OUT_OF_ORDER if block in FINDERS else "object")
    for outputs in results(engine, [bgr, bgr]):
        assert (outputs["error_status"], outputs["error_message"]) == (False, "")
        assert all(
            len(outputs[name]) for name in ("predictions", "answer", "caption", "new_instances") if name in outputs
        )


@pytest.mark.parametrize("block", BLOCKS)
def test_the_error_outputs_of_those_go_through_json(block: str, looks: Looks, bgr: np.ndarray) -> None:
    engine = engine_of(workflow(block_step(block)), looks)
    with broken_outputs(block, looks, everywhere=False):
        (outputs,) = results(engine, bgr, serialize=True)
    assert json.loads(json.dumps(outputs)) == outputs
    assert outputs["error_status"] is True


@pytest.fixture
def moving() -> list[np.ndarray]:
    """Frames of a dog and a red circle, both in sight all the while."""
    return bgr_frames(clips_of("static crop")[0])


def track_engine(model: Looks) -> Any:
    return engine_of(workflow(step("track", class_names=NAMES, every=EVERY)), model)


def ids(outputs: dict[str, Any], name: str = "tracked_detections") -> list[int]:
    return outputs[name].tracker_id.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("target", "at"),
    [("update of the tracker", EVERY), ("as_prediction", EVERY), ("as_prediction", 2)],
    ids=["tracker", "outputs of a look", "outputs between looks"],
)
def test_tracking_begins_anew_after_a_failure(
    target: str, at: int, looks: Looks, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, said = track_engine(looks), []
    for index, bgr in enumerate(moving):
        with monkeypatch.context() as patch:
            if index == at and target == "as_prediction":
                patch.setattr("moondream_cv_blocks.track.as_prediction", fail)
            elif index == at:
                patch.setattr(Tracker, "update", fail)
            said += results(engine, in_video(bgr, index + 1))
    check_failed("track", said[at], OUT_OF_ORDER)
    assert ids(said[at - 1]) == [1, 2]
    again = EVERY * (at // EVERY + 1)  # the next look
    assert ids(said[again], "new_instances") == ids(said[again]) == [3, 4]
    assert all(ids(outputs) == ids(outputs, "already_seen_instances") == [3, 4] for outputs in said[again + 1 :])
    assert len(looks.asked) == len(range(0, len(moving), EVERY))


@pytest.mark.parametrize("at", [EVERY, 2], ids=["at a look", "between looks"])
def test_the_error_of_a_tracker_stays_until_the_next_look(
    at: int, looks: Looks, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a model does: who counts must not take it for an empty scene."""
    engine = track_engine(looks)
    for index, bgr in enumerate(moving[: at + 2]):
        with monkeypatch.context() as patch:
            if index == at:
                patch.setattr("moondream_cv_blocks.track.as_prediction", fail)
            (outputs,) = results(engine, in_video(bgr, index + 1))
    assert outputs["error_status"] or ids(outputs) == [1, 2]


def test_what_is_new_on_a_frame_that_fails_is_new_on_the_next(
    looks: Looks, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moondream_cv_blocks import track

    given = track.as_prediction

    def fail_on_nothing(detections: sv.Detections, *rest: Any) -> Any:
        return given(detections, *rest) if len(detections) else fail()

    engine = track_engine(looks)
    with monkeypatch.context() as patch:
        patch.setattr(track, "as_prediction", fail_on_nothing)  # on the first frame nothing has been seen already
        check_failed("track", results(engine, in_video(moving[0], 1))[0], OUT_OF_ORDER)
    said = [results(engine, in_video(bgr, number))[0] for number, bgr in enumerate(moving[1:], 2)]
    shown = [number for outputs in said for number in ids(outputs)]
    assert sorted({n for outputs in said for n in ids(outputs, "new_instances")}) == sorted(set(shown))


# What is logged


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock of our own, `seconds`, and nothing logged so far."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("moondream_cv_blocks.results.time", SimpleNamespace(monotonic=lambda: clock.seconds))
    monkeypatch.setattr("moondream_cv_blocks.results._told", {})
    return clock


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """What the blocks have logged since the last call."""
    caplog.set_level(logging.DEBUG, logger="moondream_cv_blocks")

    def taken() -> list[logging.LogRecord]:
        records = [record for record in caplog.records if record.name == OUR_LOG]
        caplog.clear()
        return records

    return taken


Log = Callable[[], list[logging.LogRecord]]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_failure_of_a_stream_is_logged_once_a_minute(
    block: str, now: SimpleNamespace, log: Log, bgr: np.ndarray
) -> None:
    engine = engine_of(workflow(block_step(block, model="$inputs.model"), parameters=["model"]))

    def frames(model: str, count: int) -> list[str]:
        """What is logged of so many, of which one comes each second."""
        for _ in range(count):
            now.seconds += 1
            (outputs,) = results(engine, NO_IMAGE if model == "tiny" else bgr, model=model)
            assert outputs["error_status"] is True
        return [record.getMessage() for record in log()]

    one, other = "moondream3", "moondream4"
    often = {"track": 5}.get(block, 1)  # tracks look at one frame in five, and only a look that fails is logged
    (told,) = frames(one, 50)
    assert told.startswith(f"moondream_cv/{block}: there is no model 'moondream3'")
    (told,) = frames(other, often)
    assert "'moondream4'" in told
    (told,) = frames("tiny", 1)
    assert "no pixels" in told
    assert frames(one, often) == []
    (told,) = frames(one, 20)  # by now more than a minute has gone by since the first
    assert "'moondream3'" in told


def test_each_block_says_what_fails(now: SimpleNamespace, log: Log) -> None:
    steps = [block_step(block, name=block) for block in BLOCKS]
    engine = engine_of(workflow(*steps, outputs=[f"{block}.error_message" for block in BLOCKS]))
    for _ in range(3):
        engine.run(runtime_parameters={"image": NO_IMAGE})
    said = sorted(record.getMessage().partition(":")[0] for record in log())
    assert said == sorted(f"moondream_cv/{block}" for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("error", "expected"),
    [(BackendError("the server is away"), True), (ValueError("no such value"), True), (KeyError("a key"), False)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_meant_to_happen_is_logged_with_its_traceback(
    block: str, error: Exception, expected: bool, now: SimpleNamespace, log: Log, looks: Looks, bgr: np.ndarray
) -> None:
    def give(request: Request) -> ErrorResult:
        try:
            raise error
        except Exception as caught:
            return ErrorResult(caught)

    looks.gives = give
    (outputs,) = results(engine_of(workflow(block_step(block)), looks), bgr)
    check_failed(block, outputs, str(error))
    (record,) = log()
    assert record.levelno == (logging.WARNING if expected else logging.ERROR)
    if expected:
        assert not record.exc_info
    else:
        assert record.exc_info
        assert record.exc_info[1] is error
        assert record.exc_info[2] is not None


def test_few_messages_are_remembered(now: SimpleNamespace, log: Log) -> None:
    from moondream_cv_blocks import results as told

    engine = engine_of(workflow(block_step("caption", length="$inputs.length"), parameters=["length"]))
    small = np.zeros((8, 8, 3), np.uint8)
    for number in range(told.MOST_TOLD + 50):
        results(engine, small, length=f"length {number}")
        assert len(told._told) <= told.MOST_TOLD
    assert len(log()) == told.MOST_TOLD + 50  # all of them differ


def test_a_wrong_value_that_differs_on_each_frame_is_logged_once(
    now: SimpleNamespace, log: Log, looks: Looks, moving: list[np.ndarray]
) -> None:
    """Detections in the place of a text, as of a workflow that is put together wrongly."""
    asks = block_step("query", question="Where is {it}?", parameters={"it": "$steps.found.predictions"})
    engine = engine_of(workflow(block_step("detect", name="found"), asks), looks)
    for bgr in moving:
        (outputs,) = results(engine, bgr)
        check_failed("query", outputs, "parameters['it'] must be a text or a number, not Detections")
    assert len(log()) == 1


# Passwords in URLs


SECRETS = {"plain": ("s3cret-word", "s3cret-word"), "quoted": ("p%40ss-w0rd", "p@ss-w0rd")}  # as written, as meant
INFO = Answer({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
OURS = Answer({"models": [{"id": "tiny", "has_scores": True}]})
ROUTES = ("/v1/detect", "/v1/point", "/v1/query", "/v1/caption")


@pytest.fixture(params=SECRETS)
def secret(request: pytest.FixtureRequest) -> tuple[str, str]:
    return SECRETS[request.param]


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        yield running


@pytest.fixture
def closed_url() -> Iterator[str]:
    """Where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def with_password(url: str, secret: tuple[str, str]) -> str:
    return url.replace("://", f"://anna:{secret[0]}@")


def check_secret(secret: tuple[str, str], *texts: str) -> None:
    for text in texts:
        assert not [form for form in secret if form in text], text


def texts_of(error: BaseException | None) -> list[str]:
    """All that an error and those it is chained to would show."""
    found: list[str] = []
    while error is not None:
        found += [str(error), repr(error), str(getattr(error, "blocks_errors", ""))]
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("http://localhost:99999", {}),
        ("http://localhost:port", {}),
        ("http://local host", {}),
        ("http://localhost/?key=1", {}),
        ("ftp://localhost", {}),
        (" http://localhost:99999 ", {}),
        ("http://localhost:2020", {"images": "$inputs.nothing"}),
        ("http://localhost:2020", {"max_objects": 0, "max_tokens": 0}),
    ],
)
def test_a_password_is_not_shown_where_a_workflow_is_refused(
    block: str, url: str, fields: dict[str, Any], secret: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    from roboflow_workflows.errors import WorkflowError

    caplog.set_level(logging.DEBUG)
    with pytest.raises(WorkflowError) as caught:
        compiled(workflow(block_step(block, model=with_password(url, secret), **fields)))
    check_secret(secret, caplog.text, *texts_of(caught.value))


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_a_password_of_a_url_that_may_not_be_used_is_not_shown(
    when: str,
    secret: tuple[str, str],
    bgr: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(pool.ALLOWED, f"tiny,http://anna:{secret[0]}@localhost:2020")
    url = f"http://anna:{secret[0]}@localhost:2021"
    if when == "compiled":
        told = refusal(workflow(block_step("caption", model=url)))
    else:
        (outputs,) = run(workflow(block_step("caption", model="$inputs.model"), parameters=["model"]), bgr, model=url)
        told = outputs["error_message"]
    assert "'http://localhost:2021' may not be used here, only tiny, http://localhost:2020" in told
    check_secret(secret, told, caplog.text)


TROUBLES: dict[str, Callable[[RemoteServer, tuple[str, str]], Any]] = {
    "lacks the skill": lambda server, secret: server.on("/info", INFO),
    "does not say what it is": lambda server, secret: None,
    "wants a key": lambda server, secret: server.on("/v1/models", Answer({"error": f"not {secret[1]}"}, 401)),
    "repeats it": lambda server, secret: [
        server.on("/v1/models", OURS),
        *(server.on(route, Answer({"error": f"wrong: {secret[0]}, {secret[1]}"}, 403)) for route in ROUTES),
    ],
    "answers with it": lambda server, secret: [
        server.on("/v1/models", OURS),
        *(server.on(route, Answer([secret[1]])) for route in ROUTES),
    ],
}


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_password_is_not_shown_where_a_server_fails(
    block: str,
    trouble: str,
    by: str,
    server: RemoteServer,
    bgr: np.ndarray,
    now: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = SECRETS["quoted" if by == "literal" else "plain"]
    TROUBLES[trouble](server, secret)
    caplog.set_level(logging.DEBUG)
    outputs = asked(block, with_password(server.url, secret), by, bgr)
    host = server.url.removeprefix("http://")
    check_failed(block, outputs, "detect" if trouble == "lacks the skill" and block == "point" else host)
    check_secret(secret, outputs["error_message"], caplog.text)
    assert [record for record in caplog.records if record.name == OUR_LOG]
    assert all(one.headers["authorization"].startswith("Basic ") for one in server.asked)  # it was sent all the same


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_password_is_not_shown_where_no_server_is(
    block: str,
    by: str,
    closed_url: str,
    secret: tuple[str, str],
    bgr: np.ndarray,
    now: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    outputs = asked(block, with_password(closed_url, secret), by, bgr)
    check_failed(block, outputs, f"{closed_url}/v1/models is not reachable")
    check_secret(secret, outputs["error_message"], caplog.text)


def asked(block: str, model: str, by: str, bgr: np.ndarray) -> dict[str, Any]:
    """The outputs of a block whose model is written down, or comes from an input."""
    if by == "literal":
        (outputs,) = results(engine_of(workflow(block_step(block, model=model))), bgr)
    else:
        definition = workflow(block_step(block, model="$inputs.model"), parameters=["model"])
        (outputs,) = results(engine_of(definition), bgr, model=model)
    return outputs


def test_a_password_is_not_shown_where_the_scheme_was_forgotten(secret: tuple[str, str]) -> None:
    told = refusal(workflow(block_step("caption", model=f"anna:{secret[0]}@localhost:2020")))
    check_secret(secret, told)


# A folder that is deleted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    copy: Path = shutil.copytree(Path(moondream_cv.__file__).parent / "tiny", tmp_path / "my-model")
    return copy


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelPool]:
    """What all blocks share, for this test."""
    models = ModelPool(device="cpu")
    monkeypatch.setattr(pool, "_shared", models)
    yield models
    models.close()


@pytest.mark.parametrize("by", ["literal", "input"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened before", "never opened"])
def test_a_folder_that_is_deleted(by: str, opened: bool, shared: ModelPool, folder: Path, bgr: np.ndarray) -> None:
    """What was opened of it goes on working, also in workflows that are compiled afterwards."""
    before = shared.get(str(folder)) if opened else None
    shutil.rmtree(folder)
    if by == "input":
        definition = workflow(block_step("caption", model="$inputs.model"), parameters=["model"])
        (outputs,) = results(compiled(definition), bgr, model=str(folder))
    elif opened:
        (outputs,) = run(workflow(block_step("caption", model=str(folder))), bgr)
    else:
        assert "there is no model" in refusal(workflow(block_step("caption", model=str(folder))))
        return
    if opened:
        assert (outputs["error_message"], bool(outputs["caption"])) == ("", True)
        assert shared.get(str(folder)) is before
    else:
        check_failed("caption", outputs, "there is no model")


def test_a_folder_that_is_deleted_while_a_workflow_runs(shared: ModelPool, folder: Path, bgr: np.ndarray) -> None:
    engine = compiled(workflow(block_step("caption", model=str(folder))))
    (before,) = results(engine, bgr)
    shutil.rmtree(folder)
    assert results(engine, bgr) == [before]
    assert before["error_message"] == ""


def test_a_deleted_folder_that_is_allowed_under_another_spelling(
    shared: ModelPool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pool.ALLOWED, str(folder))
    monkeypatch.chdir(folder.parent)
    before = shared.get("./my-model")
    shutil.rmtree(folder)
    assert shared.get("./my-model") is before


# Values of fields


@pytest.mark.parametrize("block", FINDERS)
@pytest.mark.parametrize(
    "names",
    [["$5 bill"], ["dog", "$5 bill"], "dog, $5 bill"],
    ids=str,
)
def test_names_of_classes_with_a_dollar(block: str, names: Any, looks: Looks, bgr: np.ndarray) -> None:
    (outputs,) = results(engine_of(workflow(block_step(block, class_names=names)), looks), bgr)
    assert outputs["error_message"] == ""
    assert looks.asked == [1 if names == ["$5 bill"] else 2]


@pytest.mark.parametrize("question", ["Is it $20 or $30?", " $20 or $30?"])  # at the beginning the engine takes it
def test_a_question_with_a_dollar(question: str, looks: Looks, bgr: np.ndarray) -> None:
    check_asked(engine_of(workflow(block_step("query", question=question)), looks), looks, bgr, question)


def test_a_question_with_a_dollar_from_an_input(looks: Looks, bgr: np.ndarray) -> None:
    definition = workflow(block_step("query", question="$inputs.question"), parameters=["question"])
    check_asked(engine_of(definition, looks), looks, bgr, "$20 or $30?", question="$20 or $30?")


def test_the_field_takes_a_question_with_a_dollar() -> None:
    """It is not ours to refuse."""
    from moondream_cv_blocks.query import Manifest

    assert Manifest(**block_step("query", question="$20 or $30?")).question == "$20 or $30?"


def check_asked(engine: Any, looks: Looks, bgr: np.ndarray, expected: str, **parameters: Any) -> None:
    """The model is asked this, and answers."""
    questions: list[str] = []

    def give(request: Any) -> Any:
        questions.append(request.question)
        return looks.model.run([request])[0]

    looks.gives = give
    (outputs,) = results(engine, bgr, **parameters)
    assert outputs["error_message"] == ""
    assert questions == [expected]


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, field) for block in FINDERS for field in ("class_names", "confidence", "max_objects")),
        ("track", "every"),
        ("query", "question"),
        ("query", "max_tokens"),
        ("caption", "temperature"),
    ],
)
@pytest.mark.parametrize("value", ["$input.x", "$inputs", "$steps.x y.z"])
def test_what_only_looks_like_a_selector_is_refused(block: str, field: str, value: str) -> None:
    told = refusal(workflow(block_step(block, **{field: value})))
    assert told.startswith(f"{field}: ")
    assert "is no selector" in told


@pytest.mark.parametrize(
    ("block", "field"),
    [
        *((block, field) for block in FINDERS for field in ("confidence", "max_objects")),
        ("detect", "nms"),
        ("track", "nms"),
        ("track", "every"),
        *((block, field) for block in ("query", "caption") for field in ("max_tokens", "temperature")),
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers(block: str, field: str, value: bool, bgr: np.ndarray) -> None:
    """Neither where they are written down nor where they come from an input."""
    told = refusal(workflow(block_step(block, **{field: value})))
    assert told.startswith(f"{field}: ")
    assert str(value) in told
    definition = workflow(block_step(block, **{field: f"$inputs.{field}"}), parameters=[field])
    (outputs,) = run(definition, bgr, **{field: value})
    check_failed(block, outputs, field, str(value))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["a", "b"], "parameters['it'] must be a text or a number, not list: ['a', 'b']"),
        ({"a": 1}, "parameters['it'] must be a text or a number, not dict"),
        (None, "the placeholder {it}, and parameters has color"),
    ],
    ids=["list", "dict", "None"],
)
def test_parameters_that_are_no_text(value: Any, says: str, looks: Looks, bgr: np.ndarray) -> None:
    given = {"it": "$inputs.it", "color": "red"}
    step_ = block_step("query", question="Is {it} {color}?", parameters=given)
    (outputs,) = results(engine_of(workflow(step_, parameters=["it"]), looks), bgr, it=value)
    check_failed("query", outputs, says)
    assert looks.asked == []


def test_a_parameter_that_is_detections(looks: Looks, bgr: np.ndarray) -> None:
    asks = block_step("query", question="Where is {it}?", parameters={"it": "$steps.found.predictions"})
    engine = engine_of(workflow(block_step("detect", name="found"), asks), looks)
    (outputs,) = results(engine, bgr)
    check_failed("query", outputs, "parameters['it'] must be a text or a number, not Detections")


@pytest.mark.parametrize("block", BLOCKS)
def test_an_unreadable_image_keeps_its_message_where_the_server_is_down(
    block: str, closed_url: str, bgr: np.ndarray
) -> None:
    engine = engine_of(workflow(block_step(block, model=closed_url)))
    first, second, third = results(engine, [bgr, NO_IMAGE, bgr])
    check_failed(block, second, "no pixels")
    assert closed_url not in second["error_message"]
    for outputs in (first, third):
        check_failed(block, outputs, f"{closed_url}/v1/models is not reachable")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("model", ["tiny", "http://localhost:2020"])
def test_no_model_is_opened_where_nothing_can_be_read(
    block: str, model: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def refuse(name: str, **options: Any) -> Any:
        opened.append(name)
        raise BackendError("is opened")

    monkeypatch.setattr(pool, "load", refuse)
    monkeypatch.setattr(pool, "connect", refuse)
    engine = engine_of(workflow(block_step(block, model=model)))
    for outputs in results(engine, [NO_IMAGE, np.zeros((4, 4, 5), np.uint8)]):
        check_failed(block, outputs, "shape" if "shape" in outputs["error_message"] else "no pixels")
    assert opened == []
    check_failed(block, results(engine, [NO_IMAGE, bgr])[1], "is opened")  # by one that can be read it is
    assert opened == [model]


# Memory


@pytest.mark.parametrize("fails", [False, True], ids=["fine", "the model fails"])
def test_no_frame_is_kept(fails: bool, tiny: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that come in nor what the block has read of them."""
    from moondream_cv_blocks import track

    seen: list[weakref.ref[np.ndarray]] = []
    read = track.pixels_of

    def remembered(image: Any) -> np.ndarray:
        pixels = read(image)
        seen.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(track, "pixels_of", remembered)
    looks = Looks(tiny)
    if fails:
        looks.gives = lambda request: ErrorResult(BackendError("the server is away"))
    engine = engine_of(workflow(step("track", class_names=["red circle"], every=EVERY)), looks)
    frames, sources = bgr_frames(render_clip(2, num_frames=10, names=NAMES, resolution_wh=(96, 72))), 20
    for number, frame in enumerate(frames, 1):
        copies = [frame.copy() for _ in range(sources)]
        seen += map(weakref.ref, copies)
        said = results(engine, [in_video(copy, number, f"{at}") for at, copy in enumerate(copies)])
        assert [outputs["error_status"] for outputs in said] == [fails] * sources
    del copies, said
    gc.collect()
    assert len(seen) == 2 * sources * len(frames)
    assert len(looks.asked) == len(range(0, len(frames), EVERY))
    assert sum(reference() is not None for reference in seen) == 0
