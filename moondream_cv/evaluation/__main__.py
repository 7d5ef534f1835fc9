"""Print the metrics of a model on held-out scenes.

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
    model: Annotated[str, typer.Option(help="Model name, checkpoint folder or server URL.")] = "tiny",
    device: Annotated[
        str | None, typer.Option(help="Device, such as cpu, mps, cuda or cuda:1. Default: the fastest available.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the best for the device.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes per renderer.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the metrics of a model on held-out scenes of both renderers."""
    if is_url(model) and (device or dtype):
        raise typer.BadParameter(f"--device and --dtype apply to local models only, got the server {model}")
    with connect(model) if is_url(model) else load(model, device=device, dtype=dtype) as opened:
        metrics = {name: evaluate_scenes(opened, held_out_scenes(name, scenes)).metrics() for name in RENDERERS}
    if as_json:
        typer.echo(json.dumps({"model": model, "scenes": scenes, "figures": metrics}, indent=1))
        return
    table = Table(f"{scenes} scenes of each renderer", *RENDERERS)
    for name in metrics["own"]:
        table.add_row(name, *(f"{metrics[renderer][name]:.3f}" for renderer in RENDERERS))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
