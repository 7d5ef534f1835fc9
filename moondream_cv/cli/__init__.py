"""The command line: `moondream-cv`, one file per subcommand.

Exit status: 0 if all went well, 1 if an image or the model failed, 2 for wrong arguments, 130 after Ctrl-C, 143 after
SIGTERM. Nothing heavy is imported until a subcommand runs.
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

from . import caption, demo, detect, download, point, query, serve, video
from .output import OutputError, discard_stdout, error_text, shown
from .stopping import Terminated, exit_status, stop_on_signals


class _Commands(TyperGroup):
    """Turns the errors that are raised on purpose, and those of files, into one line and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; a standard output that cannot be written also fails for `--help` and `--version`."""
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
        except Terminated as error:
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
    """Moondream 2 for computer vision: find, point at, ask about and describe objects in images.

    \b
    Start with [bold]moondream-cv demo[/], which needs no download.
    The other commands fetch the real weights, 3.7 GB, when first
    needed, unless --model names something else.
    """


for _command in (
    demo.demo,
    detect.detect,
    point.point,
    query.query,
    caption.caption,
    video.video,
    serve.serve,
    download.download,
):
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EscapingFormatter("%(message)s"))
    logger = logging.getLogger("moondream_cv")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    stop_on_signals()
    app()


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Show a warning without the line of code that it came from."""
    if logging.getLogger("moondream_cv").isEnabledFor(logging.WARNING):  # not with --quiet
        typer.echo(f"Warning: {shown(str(message))}", err=True)
