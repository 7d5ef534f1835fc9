"""`moondream-cv caption`: describe images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .images_command import ImageOptions
from .models import ModelOptions
from .text_command import tell


def caption(
    images: options.Images,
    length: Annotated[
        str, typer.Option("--length", "-l", metavar="short|normal|long", help="Length of the caption.")
    ] = "normal",
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
    quiet: options.Quiet = False,
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

    make_request(...)  # wrong options end the command before a model is loaded
    shared = ImageOptions(
        images,
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
    tell("caption", make_request, shared, length=length)
