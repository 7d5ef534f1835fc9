"""The common part of `query` and `caption`: one request per image, and text that is printed while it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from moondream_cv.requests import CaptionResult, ErrorResult, QueryResult, Reasoning, Request

from .images_command import ImageOptions, ImagesCommand, Item
from .output import Report, shown

if TYPE_CHECKING:
    from PIL import Image

    from moondream_cv.vision_model import VisionModel


def tell(command: str, make_request: Callable[[Any], Request], options: ImageOptions, **header: Any) -> None:
    """Run one request per image, and print and save the answers.

    Args:
        command: "query" or "caption".
        make_request: Makes the request from an image, or from None if no image is given.
        options: Images, model and outputs; without images, the question is asked without one.
        header: Keys at the head of the JSON output.
    """
    run = ImagesCommand(command, options, **header)
    several = len(run.pictures) > 1
    with run.opened_model() as model:

        def tell_one(item: Item) -> None:
            with run.report.working(item.progress):
                image = item.picture.open()
            if several:
                run.report.print(f"{shown(item.picture.title)}:")
            entry: dict[str, Any] = {"image": item.picture.name, "width": image.width, "height": image.height}
            request = make_request(image)
            result = _print_answer(run.report, model, request, entry)
            if several:
                run.report.print()
            if item.target is not None or options.show:
                run.show_and_save(_illustrate(image, request, result), item, entry)
            run.report.add(entry)

        if not run.pictures:
            entry: dict[str, Any] = {"image": None}
            _print_answer(run.report, model, make_request(None), entry)
            run.report.add(entry)
        run.for_each(tell_one)
    run.report.finish()


def _print_answer(
    report: Report, model: VisionModel, request: Request, entry: dict[str, Any]
) -> QueryResult | CaptionResult:
    """Run a request, print its answer, and add it to the JSON of the image."""
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
    entry.update(result.to_dict())
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
    """Return the image with marks at the places in the question and in the reasoning, above the text."""
    import numpy as np
    import supervision as sv

    from .images import annotate, with_text

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
