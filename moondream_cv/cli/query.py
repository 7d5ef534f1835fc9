"""`moondream-cv query`: ask about pictures."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .output import Report
from .telling import tell


def query(
    question: Annotated[str, typer.Option("--question", "-q", metavar="TEXT", help="What to ask.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]",
            help="Files, folders or globs, quoted or not; - reads standard input; none asks without an image.",
            show_default=False,
        ),
    ] = None,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="Think first, and print the thoughts.")] = False,
    points: Annotated[
        list[str] | None,
        typer.Option("--point", metavar="X,Y", help="Ask about this place, as fractions of the image; repeatable."),
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Ask about this region, as fractions; repeatable."),
    ] = None,
    temperature: options.Temperature = 0.5,
    max_tokens: options.MaxTokens = 768,
    seed: options.Seed = None,
    output: options.Output = None,
    model: options.Model = "moondream2",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask a question about pictures.

    \b
    [bold]Examples[/]
    $ moondream-cv query kitchen.jpg -q "How many cups are on the table?"
    $ moondream-cv query shelf.jpg -q "What is this?" --point 0.4,0.7 --reasoning
    $ moondream-cv query "receipts/*.png" -q "What is the total?" --json
    """
    from moondream_cv.requests import Query, Settings

    settings = Settings(temperature=temperature, max_tokens=max_tokens, seed=seed)
    refs = tuple([parse_numbers("--point", text, 2) for text in points or ()])
    refs += tuple([parse_numbers("--box", text, 4) for text in boxes or ()])

    def make_request(image: Any) -> Query:
        return Query(image, question, reasoning, refs, settings)

    if refs and not images:
        raise ValueError("--point and --box are places in an image, and no image is given")
    make_request(... if images else None)  # wrong options end the command before a model is loaded
    report = Report("query", as_json, model=model, question=question)
    tell(report, make_request, images or (), output, model, device)


def parse_numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """Read numbers separated by commas.

    Raises:
        ValueError: There are not `count` of them, or they are no fractions in 0..1.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise ValueError(f"{option} takes {count} numbers separated by commas, not {text!r}")
    if not all(0 <= number <= 1 for number in numbers):
        raise ValueError(
            f"{option} {text}: coordinates are fractions of the image in 0..1; divide pixels by its width and height"
        )
    return numbers
