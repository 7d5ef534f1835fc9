"""`moondream-cv download`: fetch the weights before they are needed."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .options import AsJson
from .output import SCHEMA, shown


def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="moondream2, or a hub repo@revision.")] = "moondream2",
    as_json: AsJson = False,
) -> None:
    """Fetch a model's weights, and print where they lie.

    An interrupted download goes on where it stopped. Afterwards the model loads without a network (HF_HUB_OFFLINE=1).

    \b
    [bold]Examples[/]
    $ moondream-cv download
    $ moondream-cv download vikhyatk/moondream2@2025-06-21
    """
    from moondream_cv.loading import download as fetch

    path = fetch(name)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "model": name, "path": str(path)}, indent=2))
    else:
        typer.echo(shown(str(path)))
