"""`moondream-cv caption`: describe pictures."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .output import Report
from .telling import tell


def caption(
    images: options.Images,
    length: Annotated[
        str, typer.Option("--length", "-l", metavar="short|normal|long", help="How much is said.")
    ] = "normal",
    temperature: options.Temperature = 0.5,
    max_tokens: options.MaxTokens = 768,
    seed: options.Seed = None,
    output: options.Output = None,
    model: options.Model = "moondream2",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe pictures in words.

    \b
    [bold]Examples[/]
    $ moondream-cv caption photo.jpg
    $ moondream-cv caption photos/ --length short --temperature 0 --json > captions.json
    """
    from moondream_cv.requests import Caption, Settings

    settings = Settings(temperature=temperature, max_tokens=max_tokens, seed=seed)

    def make_request(image: Any) -> Caption:
        return Caption(image, length, settings)

    make_request(...)  # wrong options end the command before a model is loaded
    tell(Report("caption", as_json, model=model, length=length), make_request, images, output, model, device)
