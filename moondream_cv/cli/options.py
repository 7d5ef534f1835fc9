"""Arguments and options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE",
        help="Files, folders, globs (quoted or not) or URLs; - reads one image from standard input.",
        show_default=False,
    ),
]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Search the subfolders of folders too.")]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        "-c",
        metavar="NAME",
        help="Name of an object to find; repeat it or separate names by commas.",
        show_default=False,
    ),
]
ClassesFile = Annotated[
    Path | None,
    typer.Option(
        "--classes-file", metavar="FILE", help="Text file with class names, one per line.", show_default=False
    ),
]
Confidence = Annotated[float, typer.Option("--confidence", min=0, max=1, metavar="0..1", help="Minimum confidence.")]
MaxObjects = Annotated[
    int, typer.Option("--max-objects", min=1, metavar="N", help="Maximum number of objects per image and class.")
]
Nms = Annotated[
    float | None,
    typer.Option(
        "--nms",
        min=0,
        max=1,
        metavar="0..1",
        help="Drop boxes whose IoU with a more confident box of their class is higher.",
        show_default=False,
    ),
]
MaxArea = Annotated[
    float | None,
    typer.Option(
        "--max-area",
        min=0,
        max=1,
        metavar="0..1",
        help="Drop boxes that cover more than this fraction of the image, such as 0.95.",
        show_default=False,
    ),
]
MinSize = Annotated[
    float, typer.Option("--min-size", min=0, metavar="PIXELS", help="Drop boxes with a shorter side than this.")
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Name of the model: moondream2, tiny, a hub repo@revision, a folder, or a server's URL.",
        autocompletion=lambda: ["moondream2", "tiny"],
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, mps, cuda or cuda:1. [dim]\\[default: the best available][/]",
        show_default=False,
        autocompletion=lambda: ["cpu", "cuda", "mps"],
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|float16",
        help="Number format of the weights. [dim]\\[default: the best for the device][/]",
        show_default=False,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FILE|ID", help="LoRA adapter for the model.", show_default=False),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print JSON: a document for one image, JSON Lines for several."),
]
AsLines = Annotated[bool, typer.Option("--jsonl", help="Print JSON Lines, even for a single image.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE|FOLDER",
        help="Save the annotated image as this .png, .jpg or .webp, or several in this folder; - prints a PNG.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")]
Show = Annotated[
    bool, typer.Option("--show", help="Show each annotated image in a window; any key goes on, q closes it.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print debug messages on standard error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors on standard error.")]
QuietLong = Annotated[bool, typer.Option("--quiet", help="Print only errors on standard error.")]
"""`--quiet` of a command in which -q is taken."""

Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0, metavar="T", help="Sampling temperature; 0 always gives the same text."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Maximum length of the text.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, metavar="N", help="Random seed, for repeatable sampling.", show_default=False),
]
