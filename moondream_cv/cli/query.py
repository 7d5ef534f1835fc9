"""`moondream-cv query`: ask a question about images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as shared
from .text_command import run_text_command


@shared.image_command(quiet=shared.QuietLong)
def query(
    question: Annotated[str, typer.Option("--question", "-q", metavar="TEXT", help="Question about the images.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help="Optional files, folders, globs (quoted or not) or URLs; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="Generate reasoning before the answer, and print it.")
    ] = False,
    points: Annotated[
        list[str] | None,
        typer.Option(
            "--point", metavar="X,Y", help="Point that the question refers to, as fractions of the image; repeatable."
        ),
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option(
            "--box",
            metavar="X0,Y0,X1,Y1",
            help="Box that the question refers to, as fractions of the image; repeatable.",
        ),
    ] = None,
    temperature: shared.Temperature = 0.5,
    max_tokens: shared.MaxTokens = 768,
    seed: shared.Seed = None,
    *,
    options: shared.ImageOptions,
) -> None:
    """Ask a question about images.

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
        raise ValueError("--point and --box need an image; name one before them")
    if not images and (options.output is not None or options.show):
        raise ValueError("--output and --show need an image to annotate; name one")
    make_request(... if images else None)  # raises for invalid options before the model is loaded
    run_text_command("query", make_request, images or (), options, question=question)


def parse_numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """Return numbers separated by commas.

    Args:
        option: Name of the option, for error messages.
        text: Value of the option.
        count: Required number of numbers.

    Raises:
        ValueError: There are more or fewer numbers, or one is not between 0 and 1.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise ValueError(f"{option} must be {count} numbers separated by commas, got {text!r}")
    if not all(0 <= number <= 1 for number in numbers):
        raise ValueError(
            f"{option} must be fractions of the image between 0 and 1, got {text}; divide pixels by the image size"
        )
    return numbers
