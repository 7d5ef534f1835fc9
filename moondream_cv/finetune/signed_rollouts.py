"""Rollouts as clients receive them and send them back, with signatures.

A training step only accepts rollouts that its finetune sampled. The signature is HMAC-SHA256 (RFC 2104) over the
finetune, the request, the pixels of its image and the rollout, as JSON with sorted keys. All numbers are floats there,
because JavaScript writes 1.0 as 1 and −0.0 as 0.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from moondream_cv.arguments import check_choice, check_flag
from moondream_cv.finetune.values import (
    BOX_KEYS,
    POINT_KEYS,
    check_coordinates,
    check_finite,
    check_grounding,
    check_index,
    check_items,
    check_mapping,
    check_string,
    limited_nesting,
)
from moondream_cv.finetune.wire import SKILLS, RolloutRequest
from moondream_cv.requests import Reasoning

FINISH_REASONS = ("stop", "length")
MIN_KEY_BYTES = 16

_OUTPUT_KEYS = {"query": "answer", "point": "points", "detect": "objects"}
_REGION_KEYS = {"point": POINT_KEYS, "detect": BOX_KEYS}
_ROLLOUT_KEYS = (
    "skill",
    "finish_reason",
    "output",
    "answer_tokens",
    "thinking_tokens",
    "has_answer_separator",
    "coords",
    "sizes",
    "log_probs",
    "signature",
)


@dataclass(frozen=True)
class Rollout:
    """One sampled reply with the choices behind it. Clients send it back unchanged in a training step.

    Attributes:
        skill: Skill of the request.
        finish_reason: "stop" if the model ended the reply, "length" if a limit did.
        output: Reply of the model: {"answer", "reasoning"?}, {"points"} or {"objects"}.
        answer_tokens: Token IDs of an answer.
        thinking_tokens: Token IDs of the reasoning.
        has_answer_separator: Whether the model ended the reasoning.
        coords: Coordinates in the order of sampling, as fractions.
        sizes: Widths and heights in the order of sampling, as fractions.
        log_probs: Log-probabilities of the choices when they were sampled.
        signature: Signature of the finetune that sampled the rollout; empty before `sign`.
    """

    skill: str
    finish_reason: str
    output: Mapping[str, Any]
    answer_tokens: tuple[int, ...] = ()
    thinking_tokens: tuple[int, ...] = ()
    has_answer_separator: bool = False
    coords: tuple[float, ...] = ()
    sizes: tuple[tuple[float, float], ...] = ()
    log_probs: tuple[float, ...] = ()
    signature: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the rollout as JSON values."""
        return {
            "skill": self.skill,
            "finish_reason": self.finish_reason,
            "output": dict(self.output),
            "answer_tokens": list(self.answer_tokens),
            "thinking_tokens": list(self.thinking_tokens),
            "has_answer_separator": self.has_answer_separator,
            "coords": list(self.coords),
            "sizes": [list(size) for size in self.sizes],
            "log_probs": list(self.log_probs),
            "signature": self.signature,
        }


def parse_rollout(value: object, path: str = "rollout") -> Rollout:
    """Check the form of a rollout that a client sends back. `verify` checks its content.

    Args:
        value: Dict of `Rollout.to_dict`, possibly as JSON: integers may be floats, and keys have any order.
        path: Path of the value for error messages.

    Raises:
        ValueError: A key is unknown or missing, or a value has another type.
    """
    with limited_nesting(path):
        given = check_mapping(path, value, _ROLLOUT_KEYS, required=_ROLLOUT_KEYS)
        skill = check_choice(f"{path}.skill", given["skill"], SKILLS)
        return Rollout(
            skill=skill,
            finish_reason=check_choice(f"{path}.finish_reason", given["finish_reason"], FINISH_REASONS),
            output=_output(f"{path}.output", given["output"], skill),
            answer_tokens=check_items(f"{path}.answer_tokens", given["answer_tokens"], check_index),
            thinking_tokens=check_items(f"{path}.thinking_tokens", given["thinking_tokens"], check_index),
            has_answer_separator=check_flag(f"{path}.has_answer_separator", given["has_answer_separator"]),
            coords=check_items(f"{path}.coords", given["coords"], check_finite),
            sizes=check_items(f"{path}.sizes", given["sizes"], _size),
            log_probs=check_items(f"{path}.log_probs", given["log_probs"], check_finite),
            signature=check_string(f"{path}.signature", given["signature"]),
        )


def sign(key: bytes, finetune_id: str, request: RolloutRequest, rollout: Rollout, image_digest: bytes | None) -> str:
    """Return the signature of a rollout.

    Args:
        key: Secret key, at least 16 bytes.
        finetune_id: ID of the finetune that sampled the rollout.
        request: Request of the rollout. Defaults count like values, so a client may leave them out later.
        rollout: Rollout; its own signature is ignored.
        image_digest: Digest of the image's RGB pixels and their shape; None without an image.

    Raises:
        ValueError: The key is too short, or a number is not finite.
    """
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"key must have at least {MIN_KEY_BYTES} bytes, got {len(key)}")
    content = rollout.to_dict()
    del content["signature"]
    signed = {
        "finetune_id": finetune_id,
        "image": None if image_digest is None else image_digest.hex(),
        "request": request.to_dict(),
        "rollout": content,
    }
    text = json.dumps(_canonical(signed), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def verify(
    key: bytes,
    finetune_id: str,
    request: RolloutRequest,
    rollout: Rollout,
    image_digest: bytes | None,
    path: str = "rollout",
) -> None:
    """Check that a finetune sampled a rollout for a request.

    Args:
        key: Secret key of `sign`.
        finetune_id: ID of the finetune.
        request: Request that the rollout is sent back with.
        rollout: Rollout with its signature.
        image_digest: Digest as in `sign`.
        path: Path of the rollout for the error message, such as "groups[2].rollouts[1]".

    Raises:
        ValueError: The rollout, the request or the image has changed, or another finetune sampled it.
    """
    expected = sign(key, finetune_id, request, rollout, image_digest)
    # compare_digest raises TypeError for text outside ASCII
    if not hmac.compare_digest(expected.encode(), rollout.signature.encode(errors="replace")):
        raise ValueError(
            f"{path} was not returned by this finetune for this request and image; send rollouts and requests back "
            "unchanged"
        )


def _output(path: str, value: object, skill: str) -> dict[str, Any]:
    """Return the output of a rollout. Coordinates may be outside the image, because nothing clips samples."""
    key = _OUTPUT_KEYS[skill]
    if skill != "query":
        names = _REGION_KEYS[skill]
        regions = check_mapping(path, value, (key,), required=(key,))[key]
        found = check_items(f"{path}.{key}", regions, lambda at, item: check_coordinates(at, item, names, check_finite))
        return {key: [dict(zip(names, item, strict=True)) for item in found]}
    given = check_mapping(path, value, ("answer", "reasoning"), required=("answer",))
    output: dict[str, Any] = {"answer": check_string(f"{path}.answer", given["answer"])}
    if "reasoning" in given:
        parts = check_mapping(f"{path}.reasoning", given["reasoning"], ("text", "grounding"), required=("text",))
        text = check_string(f"{path}.reasoning.text", parts["text"])
        grounding = check_items(
            f"{path}.reasoning.grounding",
            parts.get("grounding", ()),
            lambda at, item: check_grounding(at, item, check_finite),
        )
        output["reasoning"] = Reasoning(text, grounding).to_dict()
    return output


def _size(path: str, value: object) -> tuple[float, float]:
    width, height = check_coordinates(path, value, ("width", "height"), check_finite)
    return width, height


def _canonical(value: object) -> object:
    """Return a JSON value with floats as its numbers, without the keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return float(value) + 0.0  # adding 0 turns −0.0 into 0.0
