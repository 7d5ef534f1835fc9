"""`moondream-cv caption`: describe images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as shared
from .text_command import run_text_command


@shared.image_command()
def caption(
    images: shared.Images,
    length: Annotated[
        str, typer.Option("--length", "-l", metavar="short|normal|long", help="Length of the caption.")
    ] = "normal",
    temperature: shared.Temperature = 0.5,
    max_tokens: shared.MaxTokens = 768,
    seed: shared.Seed = None,
    *,
    options: shared.ImageOptions,
) -> None:
    """Describe images in words.

    \b
    [bold]Examples[/]
    $ moondream-cv caption photo.jpg
    $ moondream-cv caption photos/ --length short --temperature 0 --json > captions.jsonl
    """
    from moondream_cv.requests import Caption, Settings

    settings = Settings(temperature=temperature, max_tokens=max_tokens, seed=seed)

    def make_request(image: Any) -> Caption:
        return Caption(image, length, settings)

    make_request(...)  # raises for invalid options before the model is loaded
    run_text_command("caption", make_request, images, options, length=length)
