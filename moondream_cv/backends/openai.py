"""The OpenAI dialect: chat completions with images, as many servers speak it.

Any such server answers questions and captions. Boxes and points need one that knows the two JSON schemas below, by
name; others answer text, which is refused and not guessed at.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from moondream_cv.backends import replies
from moondream_cv.backends.addresses import Address, find_key
from moondream_cv.backends.base import RemoteModel, changed, model_has_scores, models_of
from moondream_cv.backends.failures import Failure
from moondream_cv.backends.http import Http, Probe
from moondream_cv.backends.images import EncodedPicture
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

OPENAI = "https://api.openai.com/v1"
DEFAULT_MODEL = "moondream2"
CAPTION_PROMPTS = {
    "short": "Describe this image in one short sentence.",
    "normal": "Describe this image.",
    "long": "Describe this image at length and in detail.",
}

_CHAT = "/chat/completions"
_FORMS = {  # skill → key of the list, and the numbers of an item
    "detect": ("objects", ("x_min", "y_min", "x_max", "y_max", "confidence")),
    "point": ("points", ("x", "y", "confidence")),
}


class OpenAICompatible(RemoteModel):
    """A server with chat completions: answers and captions, streamed or not; boxes and points where it knows them."""

    skills = frozenset({"detect", "point", "query", "caption"})

    def __init__(
        self,
        base_url: str = OPENAI,
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
            base_url: The server, such as "http://localhost:8000/v1"; `/v1` is added where there is no path.
            api_key: The key; None takes `OPENAI_API_KEY`, where that is set, and "" sends none.
            model: The model that the server shall use; None: the setting `variant`, or else the first that it lists.
            has_scores: Whether the server's confidences are real; None asks its list of models when that is needed.
            timeout: Seconds that the server may take to answer, and between two pieces of a stream.
            retries: Tries after the first at the most, where the server is busy, fails or cannot be reached.
            backoff: Seconds before the first retry, doubled with each; what the server asks for comes first.
            max_in_flight: Requests that wait for the server at a time.
            image_format: What images are encoded as that are not files already: "jpeg" or "png".

        Raises:
            ValueError: An argument is out of range.
        """
        key, address = find_key(api_key, "OPENAI_API_KEY"), Address.of(base_url)
        http = Http(
            address if address.path else address.ending("/v1"),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            secrets=(key,),
            key_advice="; pass api_key= or set OPENAI_API_KEY",
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_idle=max_in_flight,
        )
        self.model = model
        self._first_model: str | None = None
        self._model_lock = threading.Lock()
        super().__init__(http, has_scores=has_scores, max_in_flight=max_in_flight, image_format=image_format)

    def _ask(self, request: Request, picture: EncodedPicture | None) -> Result:
        reply = self._http.post(_CHAT, self._body(request, picture))
        return self._read(_CHAT, lambda: self._parsed(request, reply))

    def _pieces(self, request: Request, picture: EncodedPicture | None) -> Iterator[Any]:
        # Thoughts have no place of their own in a stream of this dialect.
        if not isinstance(request, Query | Caption) or (isinstance(request, Query) and request.reasoning):
            yield from super()._pieces(request, picture)
            return
        ended = False
        for event in self._http.events(_CHAT, {**self._body(request, picture), "stream": True}):
            if event is None:
                return
            text, last = self._read(_CHAT, partial(_delta, event))
            ended = ended or last
            if text:
                yield text
        if not ended:
            raise self._http.error(_CHAT, "broke off: the stream ended before the text was complete")

    def _body(self, request: Request, picture: EncodedPicture | None) -> dict[str, Any]:
        settings = changed(request.settings)
        variant = None if self.model else settings.pop("variant", None)
        extras: dict[str, Any] = {}
        if isinstance(request, Detect | Point):
            prompt = request.object
            extras["response_format"] = _schema(request.skill)
        elif isinstance(request, Caption):
            prompt = CAPTION_PROMPTS[request.length]
        elif isinstance(request, Query):
            if request.spatial_refs:
                raise self._unsupported("take spatial_refs", "MoondreamAPI can")
            prompt = request.question
            extras.update({"reasoning": True} if request.reasoning else {})
        content: Any = prompt
        if picture is not None:
            image = {"type": "image_url", "image_url": {"url": picture.data_uri}}
            content = [image, {"type": "text", "text": prompt}]
        model = variant or self._model_name()
        return {"model": model, "messages": [{"role": "user", "content": content}], **extras, **settings}

    def _parsed(self, request: Request, reply: dict[str, Any]) -> Result:
        choice = _choice(reply)
        message = choice.get("message")
        if not isinstance(message, dict):
            raise Failure(f"answered a choice without a message: {replies.shown(choice)}")
        if isinstance(request, Detect | Point):
            return self._located(request, message.get("content"))
        text, cut, logprob = replies.text_of(message, "content"), _cut(choice), _mean_logprob(choice)
        if isinstance(request, Caption):
            return CaptionResult(text, cut, logprob)
        thoughts = replies.reasoning_of(message.get("reasoning"))
        if isinstance(request, Query) and request.reasoning and thoughts is None:
            raise self._unsupported("reason on this server, which answers without thoughts", "MoondreamAPI can")
        return QueryResult(text, thoughts, cut, logprob)

    def _located(self, request: Detect | Point, content: object) -> Result:
        try:
            found = json.loads(content) if isinstance(content, str) else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or _FORMS[request.skill][0] not in found:
            raise UnsupportedSkill(
                f"{self.url} answers text only, no boxes or points as JSON: {self._http.safe(replies.shown(content))}; "
                "MoondreamAPI and a model from moondream_cv.load() can detect and point"
            )
        most, flag = request.settings.max_objects, found.get("truncated")
        if isinstance(request, Detect):
            return DetectResult(*replies.limited(replies.objects_of(found, self.has_scores), most, flag))
        return PointResult(*replies.limited(replies.points_of(found, self.has_scores), most, flag))

    def _model_name(self) -> str:
        if self.model:
            return self.model
        with self._model_lock:
            if self._first_model is None:
                try:
                    entries = models_of(self._http.probe("/models").reply or {})
                except BackendError:
                    return DEFAULT_MODEL  # the request itself says what is wrong
                names = [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]
                self._first_model = next(iter(names), DEFAULT_MODEL)
            return self._first_model

    def _probe_scores(self) -> Probe:
        return self._http.probe("/models")

    def _says_scores(self, reply: dict[str, Any]) -> bool:
        return model_has_scores(reply, self.model)


def _schema(skill: str) -> dict[str, Any]:
    """The form of a reply, which also tells a server that knows it what is asked for."""
    key, names = _FORMS[skill]
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


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Failure(f"answered no choices: {replies.shown(reply)}")
    choice: dict[str, Any] = choices[0]
    return choice


def _delta(event: dict[str, Any]) -> tuple[str, bool]:
    """The text of a chunk, and whether it is the last one; that of a whole reply, where a server does not stream."""
    if event.get("choices") == []:  # the usage
        return "", False
    choice = _choice(event)
    message = choice.get("delta", choice.get("message"))
    text = (message.get("content") if isinstance(message, dict) else None) or ""
    if not isinstance(text, str):
        raise Failure(f"streamed {replies.shown(text)} where a text belongs")
    return text, choice.get("finish_reason") is not None or "message" in choice


def _cut(choice: dict[str, Any]) -> bool:
    return choice.get("finish_reason") == "length"


def _mean_logprob(choice: dict[str, Any]) -> float | None:
    """The mean log-probability of the tokens, where the server gives them."""
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    values = [replies.logprob_of(token) for token in tokens or () if isinstance(token, dict)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
