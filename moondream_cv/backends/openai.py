"""Client for OpenAI-compatible servers: chat completions with images.

Every such server supports query and caption. Detect and point need a server that supports the two JSON schemas below,
by name; if a server returns text instead, an error is raised, and the text is not interpreted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from moondream_cv._inherited_options import inherit_options
from moondream_cv.backends import responses
from moondream_cv.backends.base import RemoteModel, RemoteOptions, changed_settings, listed_models, model_has_scores
from moondream_cv.backends.http import Probe
from moondream_cv.backends.images import EncodedImage
from moondream_cv.backends.retries import AttemptError
from moondream_cv.backends.server_url import ServerURL
from moondream_cv.errors import BackendError, UnsupportedSkill
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

OPENAI = "https://api.openai.com/v1"
DEFAULT_MODEL = "moondream2"
CAPTION_PROMPTS = {
    "short": "Describe this image in one short sentence.",
    "normal": "Describe this image.",
    "long": "Describe this image at length and in detail.",
}

_CHAT = "/chat/completions"
_FIELDS = {  # skill → key of the list, and the numbers of an item
    "detect": ("objects", ("x_min", "y_min", "x_max", "y_max", "confidence")),
    "point": ("points", ("x", "y", "confidence")),
}


@inherit_options
class OpenAICompatible(RemoteModel):
    """OpenAI-compatible server: query and caption, with streaming; detect and point if the server supports them.

    The API key is read from `OPENAI_API_KEY`.

    Attributes:
        model: Model that the server should use.
    """

    skills = frozenset({"detect", "point", "query", "caption"})

    _key_variables = ("OPENAI_API_KEY",)

    def __init__(self, base_url: str = OPENAI, *, model: str | None = None, **options: Unpack[RemoteOptions]) -> None:
        """Create a client for a server. The first request opens the connection.

        Args:
            base_url: URL of the server, such as "http://localhost:8000/v1"; `/v1` is appended if there is no path.
            model: Model that the server should use. None uses the setting `variant`, or else the first model that the
                server lists.

        Raises:
            ValueError: An argument is out of range.
        """
        server = ServerURL.parse(base_url)
        self.model = model
        self._first_model: str | None = None
        self._model_lock = threading.Lock()
        super().__init__(server if server.path else server.with_suffix("/v1"), **options)

    def _send_request(self, request: Request, image: EncodedImage | None) -> Result:
        body = self._http.post(_CHAT, self._request_body(request, image))
        return self._parse(_CHAT, lambda: self._parse_result(request, body))

    def _stream_request(self, request: Request, image: EncodedImage | None) -> Iterator[Any]:
        # A stream of this dialect has no field for reasoning.
        if not isinstance(request, Query | Caption) or (isinstance(request, Query) and request.reasoning):
            yield from super()._stream_request(request, image)
            return
        ended = False
        for event in self._http.stream_events(_CHAT, {**self._request_body(request, image), "stream": True}):
            if event is None:
                return
            text, is_last = self._parse(_CHAT, partial(_parse_delta, event))
            ended = ended or is_last
            if text:
                yield text
        if not ended:
            raise self._http.error(_CHAT, "closed the connection early: the stream ended before the text was complete")

    def _request_body(self, request: Request, image: EncodedImage | None) -> dict[str, Any]:
        settings = changed_settings(request.settings)
        variant = None if self.model else settings.pop("variant", None)
        extras: dict[str, Any] = {}
        if isinstance(request, Detect | Point):
            prompt = request.object
            extras["response_format"] = _schema(request.skill)
        elif isinstance(request, Caption):
            prompt = CAPTION_PROMPTS[request.length]
        elif isinstance(request, Query):
            if request.spatial_refs:
                raise self._unsupported("use spatial_refs")
            prompt = request.question
            extras.update({"reasoning": True} if request.reasoning else {})
        content: Any = prompt
        if image is not None:
            image_part = {"type": "image_url", "image_url": {"url": image.data_uri}}
            content = [image_part, {"type": "text", "text": prompt}]
        model = variant or self._model_name()
        return {"model": model, "messages": [{"role": "user", "content": content}], **extras, **settings}

    def _parse_result(self, request: Request, body: dict[str, Any]) -> Result:
        choice = _first_choice(body)
        message = choice.get("message")
        if not isinstance(message, dict):
            raise AttemptError(f"returned a choice without a message: {responses.excerpt(choice)}")
        if isinstance(request, Detect | Point):
            return self._parse_locations(request, message.get("content"))
        text, truncated = responses.parse_text(message, "content"), choice.get("finish_reason") == "length"
        logprob = _mean_logprob(choice)
        if isinstance(request, Caption):
            return CaptionResult(text, truncated, logprob)
        reasoning = responses.parse_reasoning(message.get("reasoning"))
        if isinstance(request, Query) and request.reasoning and reasoning is None:
            raise self._unsupported("return reasoning from this server, which sends none")
        return QueryResult(text, reasoning, truncated, logprob)

    def _parse_locations(self, request: Detect | Point, content: object) -> Result:
        try:
            found = json.loads(content) if isinstance(content, str) else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or _FIELDS[request.skill][0] not in found:
            raise UnsupportedSkill(
                f"{self.url} returned text instead of JSON with {_FIELDS[request.skill][0]}: "
                f"{self._http.redact(responses.excerpt(content))}; use MoondreamAPI or a model from moondream_cv.load()"
            )
        limit, flag = request.settings.max_objects, found.get("truncated")
        if isinstance(request, Detect):
            return DetectResult(*responses.truncate(responses.parse_objects(found, self.has_scores), limit, flag))
        return PointResult(*responses.truncate(responses.parse_points(found, self.has_scores), limit, flag))

    def _model_name(self) -> str:
        if self.model:
            return self.model
        with self._model_lock:
            if self._first_model is None:
                try:
                    entries = listed_models(self._http.probe("/models").body or {})
                except BackendError:
                    return DEFAULT_MODEL  # the request itself will raise the error
                names = [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]
                self._first_model = next(iter(names), DEFAULT_MODEL)
            return self._first_model

    def _probe_server(self) -> Probe:
        return self._http.probe("/models")

    def _reports_scores(self, body: dict[str, Any]) -> bool:
        return model_has_scores(body, self.model)


def _schema(skill: str) -> dict[str, Any]:
    """Return the response format of a skill; its name selects the skill on servers that support it."""
    key, names = _FIELDS[skill]
    item = {
        "type": "object",
        "properties": {name: {"type": "number"} for name in names},
        "required": list(names),
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {key: {"type": "array", "items": item}, "truncated": {"type": "boolean"}},
        "required": [key, "truncated"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": f"moondream_{skill}", "strict": True, "schema": schema}}


def _first_choice(body: dict[str, Any]) -> dict[str, Any]:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise AttemptError(f"returned no choices: {responses.excerpt(body)}")
    choice: dict[str, Any] = choices[0]
    return choice


def _parse_delta(event: dict[str, Any]) -> tuple[str, bool]:
    """Return the text of a chunk or, from a server that does not stream, of a response; and whether it is the last."""
    if event.get("choices") == []:  # token usage
        return "", False
    choice = _first_choice(event)
    message = choice.get("delta", choice.get("message"))
    text = (message.get("content") if isinstance(message, dict) else None) or ""
    if not isinstance(text, str):
        raise AttemptError(f"streamed an invalid chunk, expected a string: {responses.excerpt(text)}")
    return text, choice.get("finish_reason") is not None or "message" in choice


def _mean_logprob(choice: dict[str, Any]) -> float | None:
    """Return the mean log-probability of the tokens; None if the response has none."""
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    values = [responses.parse_logprob(token) for token in tokens or () if isinstance(token, dict)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
