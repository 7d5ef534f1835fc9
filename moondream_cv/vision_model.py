"""The contract of every model, local or remote: `VisionModel`; `PublishedMethods` adds the published method names.

A class that implements `run` and inherits `PublishedMethods` has `caption`, `query`, `detect`, `point`, `detect_gaze`,
`answer_question` and `batch_answer` with the arguments and the return values of the published model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from moondream_cv.errors import UnsupportedSkill
from moondream_cv.images import to_rgb
from moondream_cv.requests import (
    Caption,
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
    """Moondream 2, here or elsewhere.

    Attributes:
        skills: Which of "detect", "point", "query", "caption" and "gaze" it has.
        has_scores: Whether confidences are real; otherwise they are 1.0.
    """

    skills: frozenset[str]
    has_scores: bool

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run any mix of requests; results come in their order, an `ErrorResult` in the place of one that failed."""

    def close(self) -> None:
        """Free what the model holds."""


class PublishedMethods:
    """The published model's methods, on top of `run`."""

    skills: frozenset[str]

    def run(self, requests: Sequence[Request]) -> list[Result]:
        raise NotImplementedError

    def stream(self, request: Request) -> Iterator[Any]:
        """Pieces of one reply as they come: text of answers and captions, objects and points one by one.

        Raises:
            UnsupportedSkill: This model replies in one piece only.
        """
        raise UnsupportedSkill(f"{type(self).__name__} does not stream; a model from load() does")

    def caption(
        self, image: Any, length: str = "normal", stream: bool = False, settings: SettingsLike = None
    ) -> dict[str, Any]:
        """Describe an image: `{"caption": str}`, or an iterator of its pieces with `stream`.

        Unstreamed, `logprob` is there as well, the mean log-probability of a token, where the model gives one.

        Args:
            image: Anything that `moondream_cv.images.to_rgb` takes, or an encoded image.
            length: "short", "normal" or "long".

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
        """Answer a question: `{"answer": str}`, with `"reasoning": {"text", "grounding"}` on request.

        Unstreamed, `logprob` is there as well, the mean log-probability of the answer's tokens.

        Args:
            image: As in `caption`; None asks without an image.
            reasoning: Think first. Points that the thoughts speak of are in `grounding`, as fractions.
            spatial_refs: Points (x, y) and boxes (x_min, y_min, x_max, y_max) that the question is about, as fractions.
            stream: Give the answer as an iterator; the reasoning is complete before it starts.

        Raises:
            ImageError: The image cannot be read.
            ValueError: An argument is out of range.
        """
        _check_flag("reasoning", reasoning)
        _check_flag("stream", stream)
        if question is None:
            raise ValueError("question must be given")
        request = Query(image, question, reasoning, tuple(spatial_refs or ()), Settings.of(settings))  # type: ignore[arg-type]
        if not stream:
            return self._one(request)
        pieces = self.stream(request)
        if not reasoning:
            return {"answer": pieces}
        return {"reasoning": next(pieces).to_dict(), "answer": pieces}

    def detect(self, image: Any, object: str, settings: SettingsLike = None, stream: bool = False) -> dict[str, Any]:
        """Find objects: `{"objects": [{"x_min", "y_min", "x_max", "y_max", "confidence"}], "truncated"}`, fractions.

        Args:
            image: As in `caption`.
            object: The name of the objects, such as "dog".
            settings: `max_objects`, `max_crops` and `variant` apply.
            stream: Return an iterator under `objects`, which yields each object as soon as it is complete. The
                published method has no such argument.

        Raises:
            ImageError: The image cannot be read.
            ValueError: An argument is out of range.
        """
        _check_flag("stream", stream)
        request = Detect(image, object, Settings.of(settings))
        return {"objects": self._dicts(request)} if stream else self._one(request)

    def point(self, image: Any, object: str, settings: SettingsLike = None, stream: bool = False) -> dict[str, Any]:
        """Point at objects: `{"points": [{"x", "y", "confidence"}], "truncated"}`, fractions.

        Arguments and errors are those of `detect`.
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
        """Find where somebody looks: `{"gaze": {"x", "y"}}`, or None where the model sees no target.

        Args:
            eye: (x, y) between the eyes, as fractions.
            face: `x_min`, `y_min`, `x_max`, `y_max` of the face, for `prioritize_accuracy`.
            unstable_settings: `force_detect`: always give a point. `prioritize_accuracy`: the mean over points in the
                face, on the image and on its mirror image, without outliers. `flip_enc_img`: the mirror image, encoded,
                where `image` is encoded too. `seed`: makes the choice of points repeatable.

        Raises:
            ValueError: `eye`, or `face` where accuracy is asked for, is missing or out of range.
        """
        options = dict(unstable_settings or {})
        force = bool(options.get("force_detect", False))
        if not options.get("prioritize_accuracy", False):
            if eye is None:
                raise ValueError("eye must be given unless prioritize_accuracy is set")
            return self._one(Gaze(image, (eye[0], eye[1]), force))
        if face is None:
            raise ValueError("face must be given when prioritize_accuracy is set")
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
        """Return the answer to a question about an image, without surrounding whitespace; `query` is the newer method.

        As in the published model, `tokenizer`, `chat_history`, `max_new_tokens` and further keyword arguments are
        accepted and do not affect the answer.

        Args:
            image_embeds: As `image` in `caption`.
            question: The question.
            result_queue: A queue; the answer is also put into it.

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
        """Return the answers to one question per image, without surrounding whitespace. They decode together.

        As in the published model, `tokenizer` and further keyword arguments are accepted and do not affect the answers.

        Args:
            images: Images, each as `image` in `caption`.
            prompts: As many questions, in the order of the images.

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
        reply: dict[str, Any] = _raised(self.run([request])[0]).to_dict()
        return reply

    def _dicts(self, request: Request) -> Iterator[dict[str, float]]:
        items: Iterator[DetectedObject | DetectedPoint] = self.stream(request)
        return (item.to_dict() for item in items)


def _check_flag(name: str, value: object) -> None:
    """Reject settings in the position of a flag: a truthy dict would silently turn the flag on."""
    if isinstance(value, (Settings, Mapping)):
        raise ValueError(f"{name} must be True or False, got {value!r}; pass settings as a keyword: settings={value!r}")
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _raised(result: Result) -> Any:
    if isinstance(result, ErrorResult):
        raise result.error
    return result


def _without_outliers(points: np.ndarray, neighbours: int = 2, threshold: float = 2.0) -> np.ndarray:
    """[N, 2] points less those whose mean distance to the `neighbours` nearest exceeds `threshold` medians.

    A point counts among its own neighbours, at distance 0: that is how the published model does it.
    """
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    k = min(neighbours, len(points) - 1)
    nearest = np.partition(distances, k, axis=1)[:, :k].mean(1)
    return points[nearest <= threshold * np.median(nearest)]
