"""`python -m moondream_cv` and the command `moondream-cv`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C during the imports ends the process without a traceback."""
    try:
        from moondream_cv.cli import main as run
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)  # noqa: T201 - typer may not be imported yet
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
