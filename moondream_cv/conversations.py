"""Conversations in the layout of OpenAI's chat completions, as the turns of a `Chat`.

Moondream 2 has no trained format of conversations. The rules are those of the inference engine of the model's authors:
a system message precedes the first question, and images belong to user messages.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moondream_cv.requests import Turn

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        role: One of `ROLES`.
        text: Text; several texts are joined with line breaks.
        images: Images in order.
    """

    role: str
    text: str
    images: tuple[Any, ...] = ()


def make_turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Return the turns of a conversation.

    System and developer messages precede the first question, each followed by an empty line. Messages of tools, and
    messages of the assistant without text, such as calls of tools, are left out.

    Args:
        messages: Messages in order.

    Raises:
        ValueError: There is no user message, the last message is not a question, or a message of another role has
            images.
    """
    # Check the messages
    for message in messages:
        if message.images and message.role != "user":
            raise ValueError(
                f"images are supported in user messages only, got one in a message of the role {message.role!r}"
            )
    if not any(message.role == "user" for message in messages):
        raise ValueError('at least one message must have the role "user"')

    # Pair questions and answers
    turns: list[Turn] = []
    for message in messages:
        if message.role == "user":
            turns.append(Turn(message.text, images=message.images))
        elif message.role == "assistant" and message.text:
            if turns and turns[-1].answer is None:
                turns[-1] = replace(turns[-1], answer=message.text)
            else:
                turns.append(Turn(None, message.text))
    if turns[-1].answer is not None:
        raise ValueError("the last message must be a question of the user, got an answer of the assistant")
    if not (turns[-1].question or "").strip():
        raise ValueError("the last user message must have text")

    # Put the system messages in front of the first question
    system = "".join(f"{m.text}\n\n" for m in messages if m.role in SYSTEM_ROLES and m.text.strip())
    first = next(i for i, turn in enumerate(turns) if turn.question is not None)
    turns[first] = replace(turns[first], question=f"{system}{turns[first].question}")
    return tuple(turns)


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Return the turns of a conversation of OpenAI messages.

    Args:
        messages: Dicts with `role` and `content`: text, or a list of the parts `{"type": "text", "text": ...}` and
            `{"type": "image_url", "image_url": {"url": ...}}`. Besides data URIs, the URL can be any image that a model
            accepts.

    Raises:
        ValueError: A message is invalid; the message names it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of dicts with role and content, got {messages!r:.100}")
    return make_turns([_parse_message(message) for message in messages])


def _parse_message(message: Any) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise ValueError(f"a message must be a dict with a role of {', '.join(ROLES)}, got {message!r:.100}")
    role, content = message["role"], message.get("content")
    if content is None or isinstance(content, str):
        return Message(role, content or "")
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"the content of a message must be text or a list of parts, got {content!r:.100}")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and part.get("image_url") is not None:
            images.append(_parse_image(part["image_url"]))
        else:
            raise ValueError(f"a part of a message must have the type text or image_url, got {part!r:.100}")
    return Message(role, "\n".join(text for text in texts if text), tuple(images))


def _parse_image(image: Any) -> Any:
    """Return the bytes of a data URI, and any other image unchanged."""
    url = image["url"] if isinstance(image, Mapping) and "url" in image else image
    if not isinstance(url, str) or not url.startswith("data:"):
        return url
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a data URI must be in base64: data:image/jpeg;base64,..., got {url!r:.60}") from error
