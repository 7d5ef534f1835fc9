"""`moondream-cv download`: download a model ahead of time, or for another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AsDocument
from .report import SCHEMA, shown
from .signals import exit_on_interrupt


def download(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Model: moondream2, a hub repo@revision with weights or a tokenizer, or a folder."
        ),
    ] = "moondream2",
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FOLDER",
            help="Folder for weights, config and tokenizer, for a machine without a network.",
            show_default=False,
        ),
    ] = None,
    as_json: AsDocument = False,
) -> None:
    """Download a model, and print the path of its folder.

    An interrupted download resumes when the command is run again.
    After the download, the model loads without a network (HF_HUB_OFFLINE=1).
    A folder written by --to can be copied to another machine: use it as --model.

    \b
    [bold]Examples[/]
    $ moondream-cv download
    $ moondream-cv download vikhyatk/moondream2@2025-06-21
    $ moondream-cv download moondream2 --to ./moondream2
    """
    from moondream_cv.loading import download as fetch

    with exit_on_interrupt():
        path = fetch(name, to)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "model": name, "path": str(path)}, indent=2))
    else:
        typer.echo(shown(str(path)))
