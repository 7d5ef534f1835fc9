"""Client for fal: Moondream 2 as an app on fal.run, or a server with the same API.

Uses the synchronous endpoint only; the queue, uploads and webhooks are not supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moondream_cv._inherited_options import inherit_options
from moondream_cv.backends import responses
from moondream_cv.backends.base import RemoteModel, RemoteOptions, changed_settings
from moondream_cv.backends.images import EncodedImage
from moondream_cv.backends.server_url import ServerURL
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

if TYPE_CHECKING:
    from typing_extensions import Unpack

FAL = "https://fal.run"
APP = "/fal-ai/moondream2"
_PATHS = {"caption": "", "query": "/visual-query", "detect": "/object-detection", "point": "/point-object-detection"}


@inherit_options
class Fal(RemoteModel):
    """Moondream 2 on fal: detect, point, query and caption.

    The API key is read from `FAL_KEY`. fal returns no scores: `has_scores` is False unless set to True.
    """

    skills = frozenset({"detect", "point", "query", "caption"})

    _key_variables = ("FAL_KEY",)
    _key_header = ("Authorization", "Key {}")

    def __init__(self, base_url: str = FAL, **options: Unpack[RemoteOptions]) -> None:
        """Create a client for a server. The first request opens the connection.

        Args:
            base_url: URL of the server; `/fal-ai/moondream2` is appended unless the path ends with it.

        Raises:
            ValueError: An argument is out of range.
        """
        super().__init__(ServerURL.parse(base_url).with_suffix(APP), **options)

    def _send_request(self, request: Request, image: EncodedImage | None) -> Result:
        path = _PATHS[request.skill]
        body = self._http.post(path, self._request_body(request, image))
        size = None if image is None else image.size
        return self._parse(path, lambda: self._parse_result(request, body, size))

    def _request_body(self, request: Request, image: EncodedImage | None) -> dict[str, Any]:
        if image is None:
            raise self._unsupported("answer without an image")
        body: dict[str, Any] = {"image_url": image.data_uri}
        if isinstance(request, Detect | Point):
            body["object"] = request.object
        elif isinstance(request, Caption):
            body.update({} if request.length == "normal" else {"length": request.length})
        elif isinstance(request, Query):
            if request.reasoning or request.spatial_refs:
                raise self._unsupported("return reasoning" if request.reasoning else "use spatial_refs")
            body["prompt"] = request.question
        settings = changed_settings(request.settings)
        return {**body, "settings": settings} if settings else body

    def _parse_result(self, request: Request, body: dict[str, Any], size: tuple[int, int] | None) -> Result:
        limit, flag = request.settings.max_objects, body.get("truncated")
        if isinstance(request, Detect):
            boxes = responses.parse_objects(body, self.has_scores, size)
            return DetectResult(*responses.truncate(boxes, limit, flag, limit_sent=False))
        if isinstance(request, Point):
            points = responses.parse_points(body, self.has_scores, size, key="objects")
            return PointResult(*responses.truncate(points, limit, flag, limit_sent=False))
        text, logprob = responses.parse_text(body, "output"), responses.parse_logprob(body)
        truncated = flag is True or body.get("finish_reason") == "length"
        if isinstance(request, Caption):
            return CaptionResult(text, truncated, logprob)
        return QueryResult(text, None, truncated, logprob)
