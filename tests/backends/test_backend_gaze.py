"""Gaze over the Moondream API, if the server lists it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moondream_cv.backends import MoondreamAPI
from moondream_cv.errors import BackendError, UnsupportedSkill
from tests.helpers.remote_server import RemoteServer, Reply

LISTED = {"models": [{"id": "a", "skills": ["caption", "gaze"]}, {"id": "b", "skills": ["caption"]}]}
OTHERS = {"detect", "point", "query", "caption"}


def test_request_and_response_format(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/models", Reply(LISTED))
    server.on("/v1/gaze", Reply({"gaze": {"x": 0.25, "y": 1}}), Reply({"gaze": None}))
    with MoondreamAPI(server.url, has_scores=True) as model:
        forced = model.detect_gaze(frame, (0.5, 0.25), unstable_settings={"force_detect": True})
        assert forced == {"gaze": {"x": 0.25, "y": 1.0}}
        assert model.detect_gaze(frame, (0, 1)) == {"gaze": None}
    first, second = (request.body for request in server.to("/v1/gaze"))
    assert first.pop("image_url").startswith("data:image/jpeg;base64,")
    assert first == {"eye": [0.5, 0.25], "force_detect": True}
    assert (second["eye"], "force_detect" in second) == ([0, 1], False)
    assert len(server.to("/v1/models")) == 1


@pytest.mark.parametrize(
    ("reply", "model", "listed"),
    [
        (Reply(LISTED), None, True),
        (Reply(LISTED), "a", True),
        (Reply(LISTED), "b", False),
        (Reply({"models": [{"id": "a"}]}), None, False),
        (Reply({"models": [{"id": "a", "skills": "gaze"}]}), None, False),
        (Reply({"data": []}), None, False),
        (Reply([]), None, False),
        (Reply({}, 404), None, False),
    ],
)
def test_gaze_is_offered_if_the_server_lists_it(
    server: RemoteServer, frame: np.ndarray, reply: Reply, model: str | None, listed: bool
) -> None:
    server.on("/v1/models", reply).on("/v1/gaze", Reply({"gaze": None}))
    with MoondreamAPI(server.url, model=model) as api:
        assert api.skills == (OTHERS | {"gaze"} if listed else OTHERS)
        if not listed:
            with pytest.raises(UnsupportedSkill, match="MoondreamAPI cannot gaze"):
                api.detect_gaze(frame, (0.5, 0.5))
        assert api.has_scores is False
    assert len(server.to("/v1/models")) == 1


@pytest.mark.parametrize("passing", [Reply({}, 503), Reply({}, 429), Reply(fault="reset")])
def test_failed_list_of_models_is_requested_again(server: RemoteServer, passing: Reply) -> None:
    server.on("/v1/models", passing, Reply(LISTED))
    with MoondreamAPI(server.url) as model:
        assert model.skills == OTHERS
        assert "gaze" in model.skills


def test_other_skills_do_not_request_the_list_of_models(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/caption", Reply({"caption": "a"}))
    with MoondreamAPI(server.url) as model:
        model.caption(frame)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply", [{}, {"gaze": 1}, {"gaze": []}, {"gaze": {"x": 1}}, {"gaze": {"x": "1", "y": 0}}, {"gaze": {"x": None}}]
)
def test_invalid_responses_raise(server: RemoteServer, frame: np.ndarray, reply: dict[str, Any]) -> None:
    server.on("/v1/models", Reply(LISTED)).on("/v1/gaze", Reply(reply))
    with MoondreamAPI(server.url) as model, pytest.raises(BackendError, match="/v1/gaze returned"):
        model.detect_gaze(frame, (0.5, 0.5))
