"""fal's dialect: Moondream 2 as an app on fal.run, or anything that answers like it.

Only its synchronous endpoint is spoken; its queue, uploads and webhooks are left out.
"""

from __future__ import annotations

from typing import Any

from moondream_cv.backends import replies
from moondream_cv.backends.addresses import Address, find_key
from moondream_cv.backends.base import RemoteModel, changed
from moondream_cv.backends.http import Http
from moondream_cv.backends.images import EncodedPicture
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Request,
    Result,
)

FAL = "https://fal.run"
APP = "/fal-ai/moondream2"
_PATHS = {"caption": "", "query": "/visual-query", "detect": "/object-detection", "point": "/point-object-detection"}


class Fal(RemoteModel):
    """Moondream 2 on fal: captions, answers, boxes and points."""

    skills = frozenset({"detect", "point", "query", "caption"})

    def __init__(
        self,
        base_url: str = FAL,
        *,
        api_key: str | None = None,
        has_scores: bool | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_in_flight: int = 8,
        image_format: str = "jpeg",
    ) -> None:
        """Open no connection yet.

        Args:
            base_url: The server; `/fal-ai/moondream2` is added where the path does not end so.
            api_key: The key; None takes `FAL_KEY`, where that is set, and "" sends none.
            has_scores: Whether the server's confidences are real; None is False, as fal gives none.
            timeout: Seconds that the server may take to answer.
            retries: Tries after the first at the most, where the server is busy, fails or cannot be reached.
            backoff: Seconds before the first retry, doubled with each; what the server asks for comes first.
            max_in_flight: Requests that wait for the server at a time.
            image_format: What images are encoded as that are not files already: "jpeg" or "png".

        Raises:
            ValueError: An argument is out of range.
        """
        key = find_key(api_key, "FAL_KEY")
        http = Http(
            Address.of(base_url).ending(APP),
            headers={} if key is None else {"Authorization": f"Key {key}"},
            secrets=(key,),
            key_advice="; pass api_key= or set FAL_KEY",
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_idle=max_in_flight,
        )
        super().__init__(http, has_scores=has_scores or False, max_in_flight=max_in_flight, image_format=image_format)

    def _ask(self, request: Request, picture: EncodedPicture | None) -> Result:
        path = _PATHS[request.skill]
        reply = self._http.post(path, self._body(request, picture))
        size = None if picture is None else picture.size
        return self._read(path, lambda: self._parsed(request, reply, size))

    def _body(self, request: Request, picture: EncodedPicture | None) -> dict[str, Any]:
        if picture is None:
            raise self._unsupported("answer without an image", "MoondreamAPI can")
        body: dict[str, Any] = {"image_url": picture.data_uri}
        if isinstance(request, Detect | Point):
            body["object"] = request.object
        elif isinstance(request, Caption):
            body.update({} if request.length == "normal" else {"length": request.length})
        elif isinstance(request, Query):
            if request.reasoning or request.spatial_refs:
                asked = "reason" if request.reasoning else "take spatial_refs"
                raise self._unsupported(asked, "MoondreamAPI can")
            body["prompt"] = request.question
        settings = changed(request.settings)
        return {**body, "settings": settings} if settings else body

    def _parsed(self, request: Request, reply: dict[str, Any], size: tuple[int, int] | None) -> Result:
        most, flag = request.settings.max_objects, reply.get("truncated")
        if isinstance(request, Detect):
            boxes = replies.objects_of(reply, self.has_scores, size)
            return DetectResult(*replies.limited(boxes, most, flag, sent=False))
        if isinstance(request, Point):
            points = replies.points_of(reply, self.has_scores, size, key="objects")
            return PointResult(*replies.limited(points, most, flag, sent=False))
        text, logprob = replies.text_of(reply, "output"), replies.logprob_of(reply)
        cut = flag is True or reply.get("finish_reason") == "length"
        if isinstance(request, Caption):
            return CaptionResult(text, cut, logprob)
        return QueryResult(text, None, cut, logprob)
