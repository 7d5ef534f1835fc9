"""What `query` and `caption` have in common: one request per image, and text that appears as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moondream_cv.requests import CaptionResult, ErrorResult, QueryResult, Reasoning, Request

from .inputs import Picture, expand
from .models import opened_model
from .output import Report, shown
from .saving import plan_outputs, save

if TYPE_CHECKING:
    from PIL import Image

    from moondream_cv.vision_model import VisionModel


def tell(
    report: Report,
    make_request: Callable[[Any], Request],
    images: Sequence[str],
    output: Path | None,
    model: str,
    device: str | None,
) -> None:
    """Put one request per image to a model, and print and save what it says.

    Args:
        report: Where replies go.
        make_request: Makes the request from an image, or from None where no image is given.
        images: As `inputs.expand` takes them; none asks without an image.
        output: As `saving.plan_outputs` takes it.
        model: What `moondream_cv.load` takes.
        device: Where to load it.
    """
    pictures = expand(images)
    targets = plan_outputs(output, pictures)
    with opened_model(model, device, {report.command}, report) as vision_model:
        if not pictures:
            _print_and_add(report, vision_model, make_request(None), {"image": None})
        for number, (picture, target) in enumerate(zip(pictures, targets, strict=True), 1):
            with report.image(picture.name):
                progress = f"{picture.name} ({number} of {len(pictures)})"
                _tell_one(report, vision_model, make_request, picture, target, progress, len(pictures) > 1)
    report.finish()


def _tell_one(
    report: Report,
    model: VisionModel,
    make_request: Callable[[Any], Request],
    picture: Picture,
    target: Path | None,
    progress: str,
    several: bool,
) -> None:
    with report.working(progress):
        image = picture.open()
    if several:
        report.print(f"{shown(picture.name)}:")
    entry: dict[str, Any] = {"image": picture.name, "width": image.width, "height": image.height}
    request = make_request(image)
    result = _print_and_add(report, model, request, entry, target)
    if several:
        report.print()
    if target is not None:
        save(_illustrate(image, request, result), target)
        report.notice(f"Saved {shown(str(target))}")


def _print_and_add(
    report: Report, model: VisionModel, request: Request, entry: dict[str, Any], target: Path | None = None
) -> QueryResult | CaptionResult:
    if report.streams and hasattr(model, "stream"):
        result = _stream(report, model, request)
    else:
        with report.working("Thinking"):
            (reply,) = model.run([request])
        if isinstance(reply, ErrorResult):
            raise reply.error
        result = cast("QueryResult | CaptionResult", reply)
        if isinstance(result, QueryResult) and result.reasoning is not None:
            _print_reasoning(report, result.reasoning)
        report.print(result.answer if isinstance(result, QueryResult) else result.caption)
    if result.truncated:
        report.notice("The text was cut off; --max-tokens allows for more.")
    saved = {} if target is None else {"annotated": str(target)}
    report.add({**entry, **result.to_dict(), **saved})
    return result


def _stream(report: Report, model: Any, request: Request) -> QueryResult | CaptionResult:
    reasoning: Reasoning | None = None
    with report.working("Thinking"):
        pieces = model.stream(request)
        first = next(pieces, "")
    if isinstance(first, Reasoning):
        reasoning, first = first, ""
        _print_reasoning(report, reasoning)
    parts = [first]
    report.print(first, end="")
    for piece in pieces:
        parts.append(piece)
        report.print(piece, end="")
    report.print()
    text = "".join(parts)
    return QueryResult(text, reasoning) if report.command == "query" else CaptionResult(text)


def _print_reasoning(report: Report, reasoning: Reasoning) -> None:
    report.print(f"Thoughts: {reasoning.text.strip()}")
    report.print()


def _illustrate(image: Image.Image, request: Request, result: QueryResult | CaptionResult) -> Image.Image:
    """The picture, with what was asked about and what the thoughts spoke of, above the text."""
    import numpy as np
    import supervision as sv

    from .pictures import annotate, with_text

    if isinstance(result, CaptionResult):
        return with_text(image, [result.caption])
    marks = [(ref if len(ref) == 4 else ref * 2, "") for ref in getattr(request, "spatial_refs", ())]
    if result.reasoning is not None:
        text = result.reasoning.text
        marks += [
            ((*point, *point), text[ground.start : ground.end].strip())
            for ground in result.reasoning.grounding
            for point in ground.points
        ]
    if marks:
        boxes = np.array([box for box, _ in marks], dtype=np.float32) * np.tile(image.size, 2)
        detections = sv.Detections(
            xyxy=boxes,
            class_id=np.zeros(len(marks), dtype=int),
            data={"class_name": np.array([name for _, name in marks], dtype=np.str_)},
        )
        image = annotate(image, detections, has_scores=False)
    return with_text(image, [f"Q: {getattr(request, 'question', '')}", f"A: {result.answer.strip()}"])
