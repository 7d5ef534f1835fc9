"""`moondream-cv query`: ask about images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .images_command import ImageOptions
from .models import ModelOptions
from .text_command import tell


def query(
    question: Annotated[str, typer.Option("--question", "-q", metavar="TEXT", help="The question.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help="Files, folders, globs (quoted or not) or URLs; - reads standard input. Optional.",
            show_default=False,
        ),
    ] = None,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="Reason first, and print the reasoning.")] = False,
    points: Annotated[
        list[str] | None,
        typer.Option("--point", metavar="X,Y", help="Point in the image, as fractions; repeatable."),
    ] = None,
    boxes: Annotated[
        list[str] | None,
        typer.Option(
            "--box",
            metavar="X0,Y0,X1,Y1",
            help="Region in the image, as fractions; repeatable.",
        ),
    ] = None,
    temperature: options.Temperature = 0.5,
    max_tokens: options.MaxTokens = 768,
    seed: options.Seed = None,
    output: options.Output = None,
    overwrite: options.Overwrite = False,
    recursive: options.Recursive = False,
    model: options.Model = "moondream2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    adapter: options.Adapter = None,
    show: options.Show = False,
    as_json: options.AsJson = False,
    as_lines: options.AsLines = False,
    verbose: options.Verbose = False,
    quiet: options.QuietLong = False,
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
        raise ValueError("--point and --box are places in an image, and no image is given")
    if not images and (output is not None or show):
        raise ValueError("--output and --show are about annotated images, and no image is given")
    make_request(... if images else None)  # wrong options end the command before a model is loaded
    shared = ImageOptions(
        images or (),
        ModelOptions(model, device, dtype, adapter),
        recursive=recursive,
        output=output,
        overwrite=overwrite,
        as_json=as_json,
        as_lines=as_lines,
        show=show,
        verbose=verbose,
        quiet=quiet,
    )
    tell("query", make_request, shared, question=question)


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
