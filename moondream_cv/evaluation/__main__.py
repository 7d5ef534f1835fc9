"""Print how good a model is on held-out scenes.

python -m moondream_cv.evaluation --model tiny --scenes 200
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moondream_cv.evaluation.scenes import RENDERERS, evaluate_scenes, held_out_scenes
from moondream_cv.loading import connect, is_url, load


def main(
    model: Annotated[str, typer.Option(help="A name, a folder, a server's URL, or tiny.")] = "tiny",
    device: Annotated[str | None, typer.Option(help="cpu, mps, cuda or cuda:1; the best there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the best for the device.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes of each renderer.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Print how good a model is on held-out scenes of both renderers."""
    if is_url(model) and (device or dtype):
        raise typer.BadParameter("device and format are for a model that is loaded here, and this is a server")
    with connect(model) if is_url(model) else load(model, device=device, dtype=dtype) as opened:
        figures = {name: evaluate_scenes(opened, held_out_scenes(name, scenes)).figures() for name in RENDERERS}
    if as_json:
        typer.echo(json.dumps({"model": model, "scenes": scenes, "figures": figures}, indent=1))
        return
    table = Table(f"{scenes} scenes of each renderer", *RENDERERS)
    for name in figures["own"]:
        table.add_row(name, *(f"{figures[renderer][name]:.3f}" for renderer in RENDERERS))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
