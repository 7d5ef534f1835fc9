"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from .models import ModelOptions

Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE",
        help="Files, folders, globs (quoted or not) or URLs; - reads one image from standard input.",
        show_default=False,
    ),
]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Include images in subfolders.")]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        "-c",
        metavar="NAME",
        help="Class name; repeat it or separate names by commas.",
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
        help="IoU threshold of non-maximum suppression within each class. [dim]\\[default: off][/]",
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
        help="Maximum box area as a fraction of the image, such as 0.95. [dim]\\[default: off][/]",
        show_default=False,
    ),
]
SliceSize = Annotated[
    int | None,
    typer.Option(
        "--slice",
        min=32,
        metavar="PIXELS",
        help="Size of overlapping slices in pixels, for small objects in large images. [dim]\\[default: off][/]",
        show_default=False,
    ),
]
MinSize = Annotated[
    float,
    typer.Option("--min-size", min=0, metavar="PIXELS", help="Minimum length of the shorter box side in pixels."),
]
Masks = Annotated[
    str | None,
    typer.Option(
        "--masks",
        metavar="NAME",
        help="Model for masks: a hub repository or a folder of SAM or SAM 2. [dim]\\[default: no masks][/]",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Model: moondream2, tiny, a hub repo@revision, a folder or a server URL.",
        autocompletion=lambda: ["moondream2", "tiny"],
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Device: cpu, mps, cuda or cuda:1. [dim]\\[default: the best available][/]",
        show_default=False,
        autocompletion=lambda: ["cpu", "cuda", "mps"],
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|float16",
        help="Data type of the weights. [dim]\\[default: the best for the device][/]",
        show_default=False,
    ),
]
Quantize = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(
        "--quantize",
        metavar="int8|int4",
        help="Quantization of the weights. [dim]\\[default: as stored][/]",
        show_default=False,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="ID@STEP|FILE",
        help="LoRA adapter: a checkpoint of a finetune, a file or folder, or a published ID. [dim]\\[default: none][/]",
        show_default=False,
    ),
]  # fmt: skip
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Run on a Ray cluster: its address, auto, or local. [dim]\\[default: off][/]",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print JSON: a document for one image, JSON Lines for several."),
]
AsDocument = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AsLines = Annotated[bool, typer.Option("--jsonl", help="Print JSON Lines, even for a single image.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE|FOLDER",
        help="File (.png, .jpg or .webp) or folder for annotated images; - prints a PNG.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")]
Show = Annotated[
    bool,
    typer.Option("--show", help="Show each annotated image in a window; any key shows the next one, q closes it."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print debug messages on standard error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors on standard error.")]
QuietLong = Annotated[bool, typer.Option("--quiet", help="Print only errors on standard error.")]
"""`--quiet` for a command that uses -q for another option."""

Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0, metavar="T", help="Sampling temperature; 0 is greedy decoding."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, metavar="N", help="Maximum length of the text in tokens.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, metavar="N", help="Random seed for repeatable sampling. [dim]\\[default: none][/]",
        show_default=False,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class ImageOptions:
    """Options that all commands about images share; `image_command` adds them to a command.

    Attributes:
        output: File, folder or "-" for annotated images, see `saving.plan_outputs`.
        overwrite: Replace existing files.
        recursive: Include images in subfolders.
        model: Model name or server URL.
        device: Device for the model.
        dtype: Data type of the weights.
        quantize: "int8" or "int4"; None loads the weights as they are stored.
        adapter: LoRA adapter, as a file, a folder, "ID@STEP" of a finetune or a published ID.
        show: Show each annotated image in a window.
        as_json: Print JSON instead of text.
        as_lines: Print JSON Lines, even for a single image.
        verbose: Log debug messages.
        quiet: Print only errors on standard error.
    """

    output: Output = None
    overwrite: Overwrite = False
    recursive: Recursive = False
    model: Model = "moondream2"
    device: Device = None
    dtype: Dtype = None
    quantize: Quantize = None
    adapter: Adapter = None
    show: Show = False
    as_json: AsJson = False
    as_lines: AsLines = False
    verbose: Verbose = False
    quiet: Quiet = False

    @property
    def model_options(self) -> ModelOptions:
        """The model and its loading options."""
        return ModelOptions(self.model, self.device, self.dtype, self.adapter, self.quantize)


def image_command(**annotations: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options of `ImageOptions` to a command.

    The command receives them as its argument `options`.

    Args:
        **annotations: Annotations that replace those of `ImageOptions`, by option.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = {**get_type_hints(ImageOptions, include_extras=True), **annotations}
        shared = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields(ImageOptions)
        ]
        own = inspect.signature(function, eval_str=True).parameters
        names = {parameter.name for parameter in shared}

        def command(**values: Any) -> None:
            options = ImageOptions(**{name: values.pop(name) for name in names})
            function(**values, options=options)

        parameters = [*(parameter for name, parameter in own.items() if name != "options"), *shared]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate
