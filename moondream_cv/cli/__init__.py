"""Command line `moondream-cv`, with one module per command.

Exit status: 0 for success, 1 if an image or the model failed, 2 for wrong arguments, 130 after Ctrl-C, 143 after
SIGTERM. Large libraries are imported when a command runs.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moondream_cv import __version__
from moondream_cv.errors import MoondreamError
from moondream_cv.escaping import EscapingFormatter

from . import caption, demo, detect, download, evaluate, finetune, label, point, quantize, query, serve, video
from .report import OutputError, discard_stdout, error_text, shown
from .signals import Terminated, exit_status, interrupted_line, stop_on_signals


class _Commands(TyperGroup):
    """Prints expected errors and file errors as one line, and exits with their status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line. Errors of writing standard output are reported for `--help` and `--version` as well."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            discard_stdout()
            logging.getLogger("moondream_cv").debug("unexpected error of the operating system", exc_info=True)
            place = f"{shown(str(error.filename))}: " if error.filename is not None else ""
            typer.echo(f"Error: {place}{shown(error.strerror or str(error))}", err=True)
            sys.exit(1)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (MoondreamError, ValueError) as error:
            typer.echo(f"Error: {error_text(error)}", err=True)
            raise typer.Exit(1 if isinstance(error, MoondreamError) else 2) from error
        except OutputError as error:
            discard_stdout()
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            if not isinstance(error, Terminated):
                typer.echo(interrupted_line(), err=True)
            raise typer.Exit(exit_status(error)) from error


app = typer.Typer(
    name="moondream-cv",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moondream-cv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Moondream 2 for computer vision: detect, point, query and caption, for images and videos.

    \b
    Start with [bold]moondream-cv demo[/], which needs no download.
    The other commands download the weights (3.7 GB) on first use,
    unless --model names another model.
    """


for _command in (
    demo.demo,
    detect.detect,
    point.point,
    query.query,
    caption.caption,
    video.video,
    label.label,
    serve.serve,
    download.download,
    quantize.quantize,
    evaluate.evaluate,
):
    app.command()(_command)
app.add_typer(finetune.app, name="finetune")


def main() -> None:
    """Run the command line."""
    handler = _StderrHandler()
    handler.setFormatter(EscapingFormatter("%(message)s"))
    logger = logging.getLogger("moondream_cv")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    stop_on_signals()
    app()


class _StderrHandler(logging.Handler):
    """Writes to the current `sys.stderr`, which rich replaces while a status is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning without its source line."""
    if logging.getLogger("moondream_cv").isEnabledFor(logging.WARNING):  # not with --quiet
        typer.echo(f"Warning: {shown(str(message))}", err=True)
