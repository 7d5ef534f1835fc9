"""Moondream's own dialect: its cloud, Moondream Station, and this project's server.

    MoondreamAPI("http://localhost:2020").caption(image)

Segmentation and fine-tuning are left out. Gaze is offered if the server lists it, as `moondream-cv serve` does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from moondream_cv.backends import replies
from moondream_cv.backends.addresses import Address, find_key
from moondream_cv.backends.base import RemoteModel, changed, model_has_scores, model_has_skill
from moondream_cv.backends.failures import Failure
from moondream_cv.backends.http import Http, Probe
from moondream_cv.backends.images import EncodedPicture
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

CLOUD = "https://api.moondream.ai/v1"


class MoondreamAPI(RemoteModel):
    """Moondream over its own API: captions, answers, boxes, points and gaze; text can be streamed.

    Attributes:
        skills: Includes "gaze" if the server's list of models does, which is requested once.
    """

    def __init__(
        self,
        base_url: str = CLOUD,
        *,
        api_key: str | None = None,
        model: str | None = None,
        has_scores: bool | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_in_flight: int = 8,
        image_format: str = "jpeg",
    ) -> None:
        """Open no connection yet.

        Args:
            base_url: The server, with or without `/v1` at the end.
            api_key: The key; None takes `MOONDREAM_API_KEY`, where that is set, and "" sends none.
            model: The model that the server shall use; None: the setting `variant`, or else the server's own choice.
            has_scores: Whether the server's confidences are real; None asks its list of models when that is needed.
            timeout: Seconds that the server may take to answer, and between two pieces of a stream.
            retries: Tries after the first at the most, where the server is busy, fails or cannot be reached.
            backoff: Seconds before the first retry, doubled with each; what the server asks for comes first.
            max_in_flight: Requests that wait for the server at a time.
            image_format: What images are encoded as that are not files already: "jpeg" or "png".

        Raises:
            ValueError: An argument is out of range.
        """
        key = find_key(api_key, "MOONDREAM_API_KEY")
        http = Http(
            Address.of(base_url).ending("/v1"),
            headers={} if key is None else {"X-Moondream-Auth": key},
            secrets=(key,),
            key_advice="; pass api_key= or set MOONDREAM_API_KEY",
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_idle=max_in_flight,
        )
        self.model = model
        self._listed: Probe | None = None
        self._listed_lock = threading.Lock()
        super().__init__(http, has_scores=has_scores, max_in_flight=max_in_flight, image_format=image_format)

    @property
    def skills(self) -> frozenset[str]:  # type: ignore[override]
        """Skills of every server in this dialect, and gaze if the server lists it."""
        return _SKILLS | {"gaze"} if self._has_skill("gaze") else _SKILLS

    def _has_skill(self, skill: str) -> bool:
        if skill != "gaze":
            return skill in _SKILLS
        try:
            return model_has_skill(self._probe_scores().reply or {}, self.model, skill)
        except BackendError:
            return False  # the next call asks again

    def _ask(self, request: Request, picture: EncodedPicture | None) -> Result:
        path = f"/{request.skill}"
        reply = self._http.post(path, self._body(request, picture))
        return self._read(path, lambda: self._parsed(request, reply))

    def _pieces(self, request: Request, picture: EncodedPicture | None) -> Iterator[Any]:
        if not isinstance(request, Query | Caption):
            yield from super()._pieces(request, picture)
            return
        path, key = f"/{request.skill}", _TEXT_KEYS[request.skill]
        thoughtful = isinstance(request, Query) and request.reasoning
        events = self._http.events(path, {**self._body(request, picture), "stream": True})
        for event in events:
            if event is None:
                return
            if thoughtful:
                # A server that does not stream its thoughts still has them; the caller is promised some, if empty.
                thoughts = self._read(path, partial(replies.reasoning_of, event.get("reasoning")))
                yield thoughts or Reasoning("")
                thoughtful = False
            text = self._read(path, partial(_chunk, event, key))
            if text:
                yield text
            if event.get("completed") or key in event:
                return
        raise self._http.error(path, "broke off: the stream ended before the text was complete")

    def _body(self, request: Request, picture: EncodedPicture | None) -> dict[str, Any]:
        settings = changed(request.settings)
        model = self.model or settings.pop("variant", None)
        body: dict[str, Any] = {} if picture is None else {"image_url": picture.data_uri}
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

    def _parsed(self, request: Request, reply: dict[str, Any]) -> Result:
        most, flag = request.settings.max_objects, reply.get("truncated")
        if isinstance(request, Detect):
            return DetectResult(*replies.limited(replies.objects_of(reply, self.has_scores), most, flag))
        if isinstance(request, Point):
            return PointResult(*replies.limited(replies.points_of(reply, self.has_scores), most, flag))
        if isinstance(request, Gaze):
            return GazeResult(replies.gaze_of(reply))
        text, logprob = replies.text_of(reply, _TEXT_KEYS[request.skill]), replies.logprob_of(reply)
        cut = flag is True or reply.get("finish_reason") == "length"
        if isinstance(request, Caption):
            return CaptionResult(text, cut, logprob)
        thoughts = replies.reasoning_of(reply.get("reasoning"))
        return QueryResult(text, thoughts, cut, logprob)

    def _probe_scores(self) -> Probe:
        with self._listed_lock:
            if self._listed is not None:
                return self._listed
            probe = self._http.probe("/models")
            if probe.status and probe.status != 429 and probe.status < 500:
                self._listed = probe
            return probe

    def _says_scores(self, reply: dict[str, Any]) -> bool:
        return model_has_scores(reply, self.model)


_SKILLS = frozenset({"detect", "point", "query", "caption"})
_TEXT_KEYS = {"query": "answer", "caption": "caption"}


def _chunk(event: dict[str, Any], key: str) -> str:
    """The text of an event; that of one which is the whole reply, where a server does not stream."""
    text = event.get("chunk", event.get(key, ""))
    if not isinstance(text, str):
        raise Failure(f"streamed {replies.shown(text)} where a text belongs")
    return text
