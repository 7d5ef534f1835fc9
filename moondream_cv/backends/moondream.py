"""Client for the Moondream API: Moondream's cloud, Moondream Station and `moondream-cv serve`.

    MoondreamAPI("http://localhost:2020").caption(image)

Segmentation and fine-tuning are not supported.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from moondream_cv._inherited_options import inherit_options
from moondream_cv.backends import responses
from moondream_cv.backends.base import RemoteModel, RemoteOptions, changed_settings, model_has_scores, model_has_skill
from moondream_cv.backends.http import Probe
from moondream_cv.backends.images import EncodedImage
from moondream_cv.backends.retries import AttemptError
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import BackendError
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectResult,
    Gaze,
    GazeResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Reasoning,
    Request,
    Result,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

CLOUD = "https://api.moondream.ai/v1"


@inherit_options
class MoondreamAPI(RemoteModel):
    """Moondream API: detect, point, query, caption and gaze, with streaming of text.

    The API key is read from `MOONDREAM_API_KEY`.

    Attributes:
        skills: Skills of the API; "gaze" only if the server's list of models has it, which is requested once.
        model: Model that the server should use.
    """

    _key_variables = ("MOONDREAM_API_KEY",)
    _key_header = ("X-Moondream-Auth", "{}")

    def __init__(self, base_url: str = CLOUD, *, model: str | None = None, **options: Unpack[RemoteOptions]) -> None:
        """Create a client for a server. The first request opens the connection.

        Args:
            base_url: URL of the server, with or without `/v1` at the end.
            model: Model that the server should use. None uses the setting `variant`, or else the server's default.

        Raises:
            ValueError: An argument is out of range.
        """
        self.model = model
        self._models_probe: Probe | None = None
        self._models_lock = threading.Lock()
        super().__init__(ServerURL.parse(base_url).with_suffix("/v1"), **options)

    @property
    def skills(self) -> frozenset[str]:  # type: ignore[override]
        """Skills of every server, and gaze if the server lists it."""
        return _SKILLS | {"gaze"} if self._has_skill("gaze") else _SKILLS

    def _has_skill(self, skill: str) -> bool:
        if skill != "gaze":
            return skill in _SKILLS
        try:
            return model_has_skill(self._probe_server().body or {}, self.model, skill)
        except BackendError:
            return False  # the next call queries again

    def _send_request(self, request: Request, image: EncodedImage | None) -> Result:
        path = f"/{request.skill}"
        body = self._http.post(path, self._request_body(request, image))
        return self._parse(path, lambda: self._parse_result(request, body))

    def _stream_request(self, request: Request, image: EncodedImage | None) -> Iterator[Any]:
        if not isinstance(request, Query | Caption):
            yield from super()._stream_request(request, image)
            return
        path, key = f"/{request.skill}", _TEXT_KEYS[request.skill]
        awaits_reasoning = isinstance(request, Query) and request.reasoning
        events = self._http.stream_events(path, {**self._request_body(request, image), "stream": True})
        for event in events:
            if event is None:
                return
            if awaits_reasoning:
                # The first part is always the reasoning, even if the server returns none.
                reasoning = self._parse(path, partial(responses.parse_reasoning, event.get("reasoning")))
                yield reasoning or Reasoning("")
                awaits_reasoning = False
            text = self._parse(path, partial(_event_text, event, key))
            if text:
                yield text
            if event.get("completed") or key in event:
                return
        raise self._http.error(path, "closed the connection early: the stream ended before the text was complete")

    def _request_body(self, request: Request, image: EncodedImage | None) -> dict[str, Any]:
        settings = changed_settings(request.settings)
        model = self.model or settings.pop("variant", None)
        body: dict[str, Any] = {} if image is None else {"image_url": image.data_uri}
        if isinstance(request, Detect | Point):
            body["object"] = request.object
        elif isinstance(request, Caption):
            body["length"] = request.length
        elif isinstance(request, Gaze):
            body.update({"eye": list(request.eye), **({"force_detect": True} if request.force else {})})
        elif isinstance(request, Query):
            body["question"] = request.question
            body.update({"reasoning": True} if request.reasoning else {})
            body.update({"spatial_refs": [list(ref) for ref in request.spatial_refs]} if request.spatial_refs else {})
        body.update({"model": model} if model else {})
        body.update({"settings": settings} if settings else {})
        return body

    def _parse_result(self, request: Request, body: dict[str, Any]) -> Result:
        limit, flag = request.settings.max_objects, body.get("truncated")
        if isinstance(request, Detect):
            return DetectResult(*responses.truncate(responses.parse_objects(body, self.has_scores), limit, flag))
        if isinstance(request, Point):
            return PointResult(*responses.truncate(responses.parse_points(body, self.has_scores), limit, flag))
        if isinstance(request, Gaze):
            return GazeResult(responses.parse_gaze(body))
        text, logprob = responses.parse_text(body, _TEXT_KEYS[request.skill]), responses.parse_logprob(body)
        truncated = flag is True or body.get("finish_reason") == "length"
        if isinstance(request, Caption):
            return CaptionResult(text, truncated, logprob)
        reasoning = responses.parse_reasoning(body.get("reasoning"))
        return QueryResult(text, reasoning, truncated, logprob)

    def _probe_server(self) -> Probe:
        with self._models_lock:
            if self._models_probe is not None:
                return self._models_probe
            probe = self._http.probe("/models")
            if probe.status and probe.status != 429 and probe.status < 500:
                self._models_probe = probe
            return probe

    def _reports_scores(self, body: dict[str, Any]) -> bool:
        return model_has_scores(body, self.model)


_SKILLS = frozenset({"detect", "point", "query", "caption"})
_TEXT_KEYS = {"query": "answer", "caption": "caption"}


def _event_text(event: dict[str, Any], key: str) -> str:
    """Return the text of an event, which is a chunk or, from a server that does not stream, the whole response."""
    text = event.get("chunk", event.get(key, ""))
    if not isinstance(text, str):
        raise AttemptError(f"streamed an invalid chunk, expected a string: {responses.excerpt(text)}")
    return text
