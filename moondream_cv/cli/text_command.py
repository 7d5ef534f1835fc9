"""Implementation of `query` and `caption`: one request per image; text is printed while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from moondream_cv.requests import CaptionResult, ErrorResult, QueryResult, Reasoning, Request

from .image_command import ImageCommand, Item
from .options import ImageOptions
from .report import Report, shown

if TYPE_CHECKING:
    from PIL import Image

    from moondream_cv.vision_model import VisionModel


def run_text_command(
    command: str, make_request: Callable[[Any], Request], images: Sequence[str], options: ImageOptions, **header: Any
) -> None:
    """Run one request per image, and print and save the answers.

    Args:
        command: "query" or "caption".
        make_request: Function that creates the request for an image, or for None if there is no image.
        images: Image arguments of the command line. Without images, one request without an image is sent.
        options: Model and outputs.
        **header: Keys at the head of the JSON output.

    Raises:
        ValueError: An argument is invalid.
        typer.Exit: With status 1 if an image failed.
    """
    run = ImageCommand(command, images, options, **header)
    several = len(run.images) > 1
    with run.opened_model() as model:

        def process(item: Item) -> None:
            with run.report.working(item.progress):
                image = item.source.open()
            if several:
                run.report.print(f"{shown(item.source.title)}:")
            entry: dict[str, Any] = {"image": item.source.name, "width": image.width, "height": image.height}
            request = make_request(image)
            result = _print_answer(run.report, model, request, entry, item.progress)
            if several:
                run.report.print()
            if item.target is not None or options.show:
                run.show_and_save(_illustrate(image, request, result), item, entry)
            run.report.add(entry)

        if not run.images:
            entry: dict[str, Any] = {"image": None}
            _print_answer(run.report, model, make_request(None), entry, "Generating")
            run.report.add(entry)
        run.for_each(process)
    run.report.finish()


def _print_answer(
    report: Report, model: VisionModel, request: Request, entry: dict[str, Any], progress: str
) -> QueryResult | CaptionResult:
    """Run a request, print its text, and add the result to the JSON entry of the image.

    Args:
        report: Output of the command.
        model: Model that runs the request.
        request: Query or caption.
        entry: JSON entry of the image; the result is added to it.
        progress: Text of the status line.
    """
    if report.streams and hasattr(model, "stream"):
        result = _stream(report, model, request, progress)
    else:
        with report.working(progress):
            (outcome,) = model.run([request])
        if isinstance(outcome, ErrorResult):
            raise outcome.error
        result = cast("QueryResult | CaptionResult", outcome)
        if isinstance(result, QueryResult) and result.reasoning is not None:
            _print_reasoning(report, result.reasoning)
        report.print(result.answer if isinstance(result, QueryResult) else result.caption)
    if result.truncated:
        report.notice("The text was truncated; increase --max-tokens.")
    entry.update(result.to_dict())
    return result


def _stream(report: Report, model: Any, request: Request, progress: str) -> QueryResult | CaptionResult:
    """Run a request, and print its text while it is generated."""
    reasoning: Reasoning | None = None
    with report.working(progress):
        chunks = model.stream(request)
        first = next(chunks, "")
    if isinstance(first, Reasoning):
        reasoning, first = first, ""
        _print_reasoning(report, reasoning)
    parts = [first]
    report.print(first, end="")
    for chunk in chunks:
        parts.append(chunk)
        report.print(chunk, end="")
    report.print()
    text = "".join(parts)
    return QueryResult(text, reasoning) if report.command == "query" else CaptionResult(text)


def _print_reasoning(report: Report, reasoning: Reasoning) -> None:
    report.print(f"Reasoning: {reasoning.text.strip()}")
    report.print()


def _illustrate(image: Image.Image, request: Request, result: QueryResult | CaptionResult) -> Image.Image:
    """Return the image with the points and boxes of question and reasoning drawn, and the text below it."""
    import numpy as np
    import supervision as sv

    from moondream_cv.drawing import annotate, with_text

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
