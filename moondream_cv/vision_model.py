"""Interface of all models, local and remote: `VisionModel`, and the methods of the published model on top of it.

A class that implements `run` and inherits `PublishedMethods` has `caption`, `query`, `detect`, `point`, `detect_gaze`,
`answer_question` and `batch_answer` with the arguments and return values of the published model, and the `chat` of the
authors' client.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from moondream_cv.conversations import parse_messages
from moondream_cv.errors import UnsupportedSkill
from moondream_cv.images import to_rgb
from moondream_cv.requests import (
    Caption,
    Chat,
    Detect,
    DetectedObject,
    DetectedPoint,
    ErrorResult,
    Gaze,
    Point,
    Query,
    Request,
    Result,
    Settings,
)

SettingsLike = Settings | Mapping[str, Any] | None
GAZE_SAMPLES = 10


@runtime_checkable
class VisionModel(Protocol):
    """A local or remote model.

    Attributes:
        skills: Skills of the model: any of "detect", "point", "query", "caption" and "gaze".
        has_scores: Whether confidences are real; otherwise every confidence is 1.0.
    """

    skills: frozenset[str]
    has_scores: bool

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests of any skills, and return results in their order; an `ErrorResult` for each failed request."""

    def close(self) -> None:
        """Release the resources of the model."""


class PublishedMethods:
    """Methods of the published model, on top of `run`."""

    skills: frozenset[str]

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests of any skills, and return results in their order."""
        raise NotImplementedError

    def stream(self, request: Request) -> Iterator[Any]:
        """Run one request, and return its result in parts: text chunks, or objects and points one by one.

        Raises:
            UnsupportedSkill: The model does not stream.
        """
        raise UnsupportedSkill(f"{type(self).__name__} does not stream; use a model from moondream_cv.load()")

    def caption(
        self, image: Any, length: str = "normal", stream: bool = False, settings: SettingsLike = None
    ) -> dict[str, Any]:
        """Return a description of an image.

        Args:
            image: Image of any type that `moondream_cv.images.to_rgb` accepts, or an encoded image.
            length: "short", "normal" or "long".
            stream: Return an iterator of text chunks.
            settings: Sampling settings.

        Returns:
            `{"caption": str}` with the mean log-probability of a token as `logprob`, if the model returns it. With
            `stream`, `caption` is an iterator of text chunks, and there is no `logprob`.

        Raises:
            ImageError: The image cannot be read.
            ValueError: An argument is out of range.
        """
        _check_flag("stream", stream)
        request = Caption(image, length, Settings.of(settings))
        return {"caption": self.stream(request)} if stream else self._one(request)

    def query(
        self,
        image: Any = None,
        question: str | None = None,
        reasoning: bool = False,
        spatial_refs: Sequence[Sequence[float]] | None = None,
        stream: bool = False,
        settings: SettingsLike = None,
    ) -> dict[str, Any]:
        """Return the answer to a question about an image.

        Args:
            image: Image, as for `caption`; None for a question without an image.
            question: Question text.
            reasoning: Generate reasoning before the answer, and return it.
            spatial_refs: Points (x, y) and boxes (x_min, y_min, x_max, y_max) in the question, as fractions.
            stream: Return the answer as an iterator of text chunks; the reasoning is complete before it starts.
            settings: Sampling settings.

        Returns:
            `{"answer": str}` with the mean log-probability of a token as `logprob`, if the model returns it. With
            `reasoning` also `"reasoning": {"text", "grounding"}`; `grounding` has the points in the image that the
            reasoning refers to, as fractions.

        Raises:
            ImageError: The image cannot be read.
            ValueError: An argument is out of range.
        """
        _check_flag("reasoning", reasoning)
        _check_flag("stream", stream)
        if question is None:
            raise ValueError("question must be a string, got None")
        request = Query(image, question, reasoning, tuple(spatial_refs or ()), Settings.of(settings))  # type: ignore[arg-type]
        if not stream:
            return self._one(request)
        parts = self.stream(request)
        if not reasoning:
            return {"answer": parts}
        return {"reasoning": next(parts).to_dict(), "answer": parts}

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        stream: bool = False,
        settings: SettingsLike = None,
        reasoning: bool | None = None,
    ) -> dict[str, Any]:
        """Return the answer to the last question of a conversation, as the `chat` of the authors' client does.

        Moondream 2 was not trained on conversations. The conversation is written as one question after another, with
        their answers, and its last question is answered.

        Args:
            messages: Messages in OpenAI's layout: dicts with `role` ("system", "user" or "assistant") and `content`,
                which is text or a list of the parts `{"type": "text", "text": ...}` and `{"type": "image_url",
                "image_url": {"url": ...}}`. The URL is a data URI or any image that `caption` accepts. Only user
                messages have images. An image takes 729 of the 2048 positions of the context.
            stream: Return the answer as an iterator of text chunks; the reasoning is complete before it starts.
            settings: Sampling settings.
            reasoning: Generate reasoning before the answer, and return it; None: no reasoning.

        Returns:
            `{"message": {"role": "assistant", "content": str}, "finish_reason"}`, where `finish_reason` is "length" if
            `max_tokens` ended the answer, and otherwise "stop". With `reasoning`, the message has `reasoning` as
            `query` returns it. With `stream`, `{"message": iterator}`, which yields no reasoning.

        Raises:
            ImageError: An image cannot be read.
            UnsupportedSkill: The model is remote.
            ValueError: A message is invalid, or the conversation is longer than the context of the model.
        """
        _check_flag("stream", stream)
        if reasoning is not None:
            _check_flag("reasoning", reasoning)
        request = Chat(parse_messages(messages), bool(reasoning), Settings.of(settings))
        if stream:
            return {"message": (piece for piece in self.stream(request) if isinstance(piece, str))}
        result = _raised(self.run([request])[0])
        message = {"role": "assistant", "content": result.answer}
        if result.reasoning is not None:
            message["reasoning"] = result.reasoning.to_dict()
        return {"message": message, "finish_reason": "length" if result.truncated else "stop"}

    def detect(self, image: Any, object: str, settings: SettingsLike = None, stream: bool = False) -> dict[str, Any]:
        """Return the boxes of all objects of a class.

        Args:
            image: Image, as for `caption`.
            object: Class name, such as "dog".
            settings: `max_objects`, `max_crops` and `variant` apply.
            stream: Return the objects as an iterator, which yields each one as soon as it is complete. The published
                method does not have this argument.

        Returns:
            `{"objects": [{"x_min", "y_min", "x_max", "y_max", "confidence"}], "truncated"}` with fractions of the
            image; `truncated` is True if `max_objects` ended the list.

        Raises:
            ImageError: The image cannot be read.
            ValueError: An argument is out of range.
        """
        _check_flag("stream", stream)
        request = Detect(image, object, Settings.of(settings))
        return {"objects": self._dicts(request)} if stream else self._one(request)

    def point(self, image: Any, object: str, settings: SettingsLike = None, stream: bool = False) -> dict[str, Any]:
        """Return one point on each object of a class.

        Arguments and errors are those of `detect`.

        Returns:
            `{"points": [{"x", "y", "confidence"}], "truncated"}` with fractions of the image.
        """
        _check_flag("stream", stream)
        request = Point(image, object, Settings.of(settings))
        return {"points": self._dicts(request)} if stream else self._one(request)

    def detect_gaze(
        self,
        image: Any,
        eye: Sequence[float] | None = None,
        face: Mapping[str, float] | None = None,
        unstable_settings: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the gaze target of a person.

        Args:
            image: Image, as for `caption`.
            eye: (x, y) between the eyes, as fractions.
            face: `x_min`, `y_min`, `x_max`, `y_max` of the face as fractions, for `prioritize_accuracy`.
            unstable_settings: `force_detect` always returns a point. `prioritize_accuracy` returns the mean over random
                points in the face, on the image and on its mirror image, without outliers. `flip_enc_img` is the
                encoded mirror image, if `image` is encoded. `seed` makes the random points repeatable.

        Returns:
            `{"gaze": {"x", "y"}}` with fractions of the image, or `{"gaze": None}` if the model finds no target.

        Raises:
            ValueError: `eye`, or `face` with `prioritize_accuracy`, is missing or out of range.
        """
        options = dict(unstable_settings or {})
        force = bool(options.get("force_detect", False))
        if not options.get("prioritize_accuracy", False):
            if eye is None:
                raise ValueError("eye must be (x, y) unless prioritize_accuracy is set, got None")
            return self._one(Gaze(image, (eye[0], eye[1]), force))
        if face is None:
            raise ValueError("face must be a box if prioritize_accuracy is set, got None")

        # Sample points in the face, on the image and on its mirror image
        mirrored = options.get("flip_enc_img")
        if mirrored is None:
            mirrored = Image.fromarray(np.ascontiguousarray(to_rgb(image)[:, ::-1]))
        draw = random.Random(options.get("seed"))
        requests, flipped = [], []
        for mirror in (False, True):
            for _ in range(GAZE_SAMPLES):
                x = draw.uniform(face["x_min"], face["x_max"])
                y = draw.uniform(face["y_min"], face["y_max"])
                requests.append(Gaze(mirrored if mirror else image, (1 - x if mirror else x, y), force))
                flipped.append(mirror)

        # Average the targets without outliers
        points = []
        for result, mirror in zip(self.run(requests), flipped, strict=True):
            gaze = _raised(result).gaze
            if gaze is not None:
                points.append((1 - gaze.x if mirror else gaze.x, gaze.y))
        if len(points) < GAZE_SAMPLES:
            return {"gaze": None}
        x, y = _without_outliers(np.array(points)).mean(0)
        return {"gaze": {"x": float(x), "y": float(y)}}

    def answer_question(
        self,
        image_embeds: Any,
        question: str,
        tokenizer: Any = None,
        chat_history: str = "",
        result_queue: Any = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> str:
        """Return the answer to a question about an image, without surrounding whitespace. `query` is the newer method.

        Some arguments of the published method have no effect there either.

        Args:
            image_embeds: Image, as for `caption`.
            question: Question text.
            tokenizer: Ignored.
            chat_history: Ignored.
            result_queue: Queue that also receives the answer.
            max_new_tokens: Ignored.
            **kwargs: Ignored.

        Raises:
            ImageError: The image cannot be read.
            ValueError: The question is empty.
        """
        answer: str = self.query(image_embeds, question)["answer"].strip()
        if result_queue is not None:
            result_queue.put(answer)
        return answer

    def batch_answer(
        self, images: Sequence[Any], prompts: Sequence[str], tokenizer: Any = None, **kwargs: Any
    ) -> list[str]:
        """Return the answers to one question per image, without surrounding whitespace. All are decoded in one batch.

        Some arguments of the published method have no effect there either.

        Args:
            images: Images, as for `caption`.
            prompts: Questions, one per image.
            tokenizer: Ignored.
            **kwargs: Ignored.

        Raises:
            ImageError: An image cannot be read.
            ValueError: A question is empty, or there are more or fewer questions than images.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"images and prompts must have the same length, got {len(images)} and {len(prompts)}; "
                "repeat an image to ask several questions about it"
            )
        requests = [Query(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [str(_raised(result).answer).strip() for result in self.run(requests)]

    def _one(self, request: Request) -> dict[str, Any]:
        result: dict[str, Any] = _raised(self.run([request])[0]).to_dict()
        return result

    def _dicts(self, request: Request) -> Iterator[dict[str, float]]:
        items: Iterator[DetectedObject | DetectedPoint] = self.stream(request)
        return (item.to_dict() for item in items)


def _check_flag(name: str, value: object) -> None:
    """Reject settings in the position of a flag: a non-empty dict would silently set the flag."""
    if isinstance(value, (Settings, Mapping)):
        raise ValueError(f"{name} must be True or False, got {value!r}; pass settings as a keyword: settings={value!r}")
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _raised(result: Result) -> Any:
    if isinstance(result, ErrorResult):
        raise result.error
    return result


def _without_outliers(points: np.ndarray, neighbors: int = 2, threshold: float = 2.0) -> np.ndarray:
    """Return the points [N, 2] whose mean distance to the nearest neighbors is at most `threshold` times the median.

    Each point is also a neighbor of itself, at distance 0, as in the published model.
    """
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    k = min(neighbors, len(points) - 1)
    nearest = np.partition(distances, k, axis=1)[:, :k].mean(1)
    return points[nearest <= threshold * np.median(nearest)]
