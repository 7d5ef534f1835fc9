"""Arguments and options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE",
        help="Files, folders or globs, quoted or not; - reads one image from standard input.",
        show_default=False,
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        "-c",
        metavar="NAME",
        help="What to look for; repeat it or separate names by commas.",
        show_default=False,
    ),
]
Confidence = Annotated[
    float, typer.Option("--confidence", min=0, max=1, metavar="0..1", help="Leave out what the model is less sure of.")
]
MaxObjects = Annotated[
    int, typer.Option("--max-objects", min=1, metavar="N", help="Objects per image and class at the most.")
]
Model = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="A name, a hub repo@revision, a folder, a URL, or tiny.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="cpu, mps, cuda or cuda:1. [dim]\\[default: the best][/]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE|FOLDER",
        help="Save the annotated picture here; several go into a folder.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0, metavar="T", help="0 always takes the likeliest word, and repeats exactly."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Length of the text at the most.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, metavar="N", help="Makes the choice of words repeatable.", show_default=False),
]
