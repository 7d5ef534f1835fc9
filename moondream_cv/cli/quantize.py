"""`moondream-cv quantize`: write a model with 8-bit or 4-bit weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import AsDocument
from .report import SCHEMA, shown
from .signals import exit_on_interrupt


def quantize(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Model in full precision: moondream2, a hub repo@revision or a folder."),
    ],
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for weights, config and tokenizer.")],
    mode: Annotated[
        Literal["int8", "int4"], typer.Option("--mode", metavar="int8|int4", help="Quantization of the weights.")
    ] = "int8",
    as_json: AsDocument = False,
) -> None:
    """Quantize a model, and print the path of the new folder.

    An int8 folder takes half of the space of the model, an int4 folder a third.
    It loads without the weights in full precision: use it as --model FOLDER.

    \b
    [bold]Examples[/]
    $ moondream-cv quantize moondream2 ./moondream2-int8
    $ moondream-cv quantize moondream2 ./moondream2-int4 --mode int4
    """
    from moondream_cv.loading import quantize as write

    with exit_on_interrupt():
        path = write(name, to, mode)
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "model": name, "mode": mode, "path": str(path)}, indent=2))
    else:
        typer.echo(shown(str(path)))
