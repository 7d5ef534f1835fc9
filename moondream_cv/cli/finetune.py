"""`moondream-cv finetune`: train an adapter on a dataset, list or delete finetunes, and merge or export adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

from moondream_cv.urls import is_url

from . import models, options
from .models import ModelOptions
from .report import SCHEMA, Report, set_verbosity, shown, shown_model
from .signals import exit_on_interrupt

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.finetune.finetune import Finetune
    from moondream_cv.finetune.training_run import TrainingResult

_TRAIN = "train"


class _TrainByDefault(TyperGroup):
    """Runs `train` if the first argument is no command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_TRAIN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_TrainByDefault,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Root = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="FOLDER",
        help="Folder of the finetunes. [dim]\\[default: MOONDREAM_CV_FINETUNES or a user data folder][/]",
        show_default=False,
    ),
]
AdapterName = Annotated[
    str,
    typer.Argument(metavar="ID@STEP|FILE", help="Checkpoint of a finetune, or a .pt or .safetensors file."),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Base model in full precision. [dim]\\[default: that of the finetune, otherwise moondream2][/]",
        show_default=False,
    ),
]


@app.callback()
def finetune() -> None:
    """Fine-tune a model on a dataset, and manage the resulting adapters.

    [bold]moondream-cv finetune DATASET[/] is short for [bold]finetune train DATASET[/].
    --adapter of the other commands loads the result.

    \b
    [bold]Examples[/]
    $ moondream-cv finetune ./parts --class bolt,nut
    $ moondream-cv finetune train ./parts --method rl --steps 100
    $ moondream-cv finetune list
    $ moondream-cv finetune merge 01K5ZJ3W8Q4T7X2M9N6P1R0SVA@200 ./moondream2-parts
    """


@app.command(_TRAIN)
def train(
    dataset: Annotated[
        Path,
        typer.Argument(metavar="DATASET", help="COCO, YOLO or VOC folder.", show_default=False),
    ],
    skill: Annotated[
        Literal["detect", "point"], typer.Option("--skill", metavar="detect|point", help="Skill to train.")
    ] = "detect",
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            "-c",
            metavar="NAME",
            help="Class name; repeat it or separate names by commas. [dim]\\[default: all classes of the dataset][/]",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Name of the finetune; an existing one is continued. [dim]\\[default: the name of DATASET][/]",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", metavar="8|16|24|32", help="Rank of the adapter.")] = 8,
    method: Annotated[
        Literal["sft", "rl"],
        typer.Option("--method", metavar="sft|rl", help="Supervised training on the boxes, or reinforcement learning."),
    ] = "sft",
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Maximum number of steps.")] = 300,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, max=64, metavar="N", help="Examples per step, each a class in an image."),
    ] = 16,
    lr: Annotated[float, typer.Option("--lr", metavar="RATE", help="Learning rate.")] = 2e-3,
    rollouts: Annotated[
        int,
        typer.Option("--rollouts", min=2, max=16, metavar="N", help="Sampled replies per example of --method rl."),
    ] = 8,
    held_out: Annotated[
        float,
        typer.Option("--held-out", metavar="0..1", help="Share of held-out images if the dataset has no valid split."),
    ] = 0.1,
    evaluate_every: Annotated[
        int, typer.Option("--evaluate-every", min=1, metavar="N", help="Steps between two held-out scores.")
    ] = 25,
    patience: Annotated[
        int,
        typer.Option("--patience", min=1, metavar="N", help="Held-out scores without improvement before the end."),
    ] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the adapter and of the data.")] = 0,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Base model: moondream2, tiny, a hub repo@revision or a folder.",
            autocompletion=lambda: ["moondream2", "tiny"],
        ),
    ] = "moondream2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    root: Root = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the report with plots and images. [dim]\\[default: NAME-report][/]",
            show_default=False,
        ),
    ] = None,
    as_json: options.AsDocument = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Train an adapter on a dataset, and write a report.

    The held-out score selects the best checkpoint. The run ends early without improvement.
    After Ctrl-C, the same command continues.

    \b
    [bold]Examples[/]
    $ moondream-cv finetune ./parts --class bolt,nut
    $ moondream-cv finetune ./parts --skill point --method rl --steps 100
    """
    from moondream_cv.finetune.datasets import load_dataset
    from moondream_cv.finetune.records import check_name, check_rank
    from moondream_cv.finetune.training_run import TrainingOptions

    # Check the arguments
    set_verbosity(verbose, quiet)
    run_options = TrainingOptions(skill, method, steps, batch, lr, rollouts, evaluate_every, patience, seed)
    report = Report("finetune train", as_json, quiet=quiet, model=model)
    chosen, _ = check_name(_name_of(dataset) if name is None else name), check_rank(rank)
    if is_url(model):
        raise ValueError(
            f"--model must be a local model, got the server {shown_model(model)}; train on a server with its tuning API"
        )
    folder = output or Path(f"{chosen}-report")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder, got the file {shown(str(folder))}")
    with report.working("Reading labels"):
        data = load_dataset(dataset, _class_names(classes), held_out, seed)
    report.notice(
        f"{data.layout} dataset, {len(data.train)} images to train, {len(data.held_out)} held out, classes: "
        f"{_listed(data.classes)}"
    )

    # Train and write the report
    loading = ModelOptions(model, device, dtype, None, quantize)
    with models.opened_model(loading, {skill}, report) as opened:
        from moondream_cv.finetune import ft
        from moondream_cv.finetune.report import write_report

        with ft(chosen, rank, model=cast("LocalModel", opened), root=root, seed=seed) as finetune:
            result = _run(finetune, data, run_options, report, folder)
            with report.working("Writing the report"):
                path = write_report(folder, chosen, data, run_options, result)
            _print_result(finetune, result, path, root, report)


@app.command("list")
def list_finetunes(root: Root = None, as_json: options.AsDocument = False) -> None:
    """List the finetunes with their saved checkpoints, also during a training run.

    \b
    [bold]Examples[/]
    $ moondream-cv finetune list
    """
    from moondream_cv.finetune.store import read_finetunes

    listed = read_finetunes(_root(root))
    found = [
        {
            "id": record.finetune_id,
            "name": record.name,
            "model": record.model,
            "rank": record.rank,
            "step": record.step,
            "checkpoints": steps,
        }
        for record, steps in listed
    ]
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "finetunes": found}, indent=2))
        return
    for record, steps in listed:
        saved = ", ".join(map(str, steps)) or "none"
        typer.echo(
            f"{record.finetune_id}  {shown(record.name)}: {shown(record.model)}, rank {record.rank}, "
            f"step {record.step}, checkpoints: {saved}"
        )
    if not listed:
        typer.echo(f"No finetunes in {shown(str(_root(root)))}", err=True)


@app.command("delete")
def delete(
    name: Annotated[
        str, typer.Argument(metavar="ID|ID@STEP", help="Finetune, or one of its checkpoints.", show_default=False)
    ],
    root: Root = None,
) -> None:
    """Delete a finetune with all checkpoints, or one checkpoint.

    It cannot be undone. Without its latest checkpoint, a finetune cannot be trained further.

    \b
    [bold]Examples[/]
    $ moondream-cv finetune delete 01K5ZJ3W8Q4T7X2M9N6P1R0SVA
    $ moondream-cv finetune delete 01K5ZJ3W8Q4T7X2M9N6P1R0SVA@200
    """
    from moondream_cv.finetune.store import FinetuneStore

    finetune_id, separator, step = name.partition("@")
    if separator and not re.fullmatch(r"[0-9]{1,15}", step):
        raise ValueError(f"the step must be a number, as in ID@200, got {name!r}")
    folder = _root(root)
    if not folder.is_dir():  # the store would create it
        raise ValueError(f"there are no finetunes in {str(folder)!r}; give their folder with --root")
    with FinetuneStore(folder) as store:
        record = store.get(finetune_id)
        if separator:
            store.delete_checkpoint(finetune_id, int(step))
        else:
            store.delete(finetune_id)
    typer.echo(f"Deleted {shown(record.name)}" + (f", step {int(step)}" if separator else ""))


@app.command("merge")
def merge(
    adapter: AdapterName,
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for weights, config and tokenizer.")],
    model: BaseModel = None,
    root: Root = None,
    as_json: options.AsDocument = False,
) -> None:
    """Write a model with an adapter in its weights, and print the path of the new folder.

    It loads without the adapter: use it as --model FOLDER, or quantize it.

    \b
    [bold]Examples[/]
    $ moondream-cv finetune merge 01K5ZJ3W8Q4T7X2M9N6P1R0SVA@200 ./moondream2-parts
    """
    from moondream_cv.finetune.merge import merge as write

    with exit_on_interrupt():
        path = write(_adapter(adapter, root), to, model)
    _print_path(path, adapter, as_json)


@app.command("export")
def export(
    adapter: AdapterName,
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the adapter.")],
    model: BaseModel = None,
    root: Root = None,
    as_json: options.AsDocument = False,
) -> None:
    """Write an adapter in PEFT's layout, and print the path of the new folder.

    \b
    [bold]Examples[/]
    $ moondream-cv finetune export 01K5ZJ3W8Q4T7X2M9N6P1R0SVA@200 ./parts-peft
    """
    from moondream_cv.finetune.merge import export_peft

    with exit_on_interrupt():
        path = export_peft(_adapter(adapter, root), to, model)
    _print_path(path, adapter, as_json)


def _run(finetune: Finetune, data: Any, run_options: Any, report: Report, folder: Path) -> TrainingResult:
    """Run the training with a progress bar."""
    from moondream_cv.finetune.training_run import run_training
    from moondream_cv.progress import showing_on

    from .finetune_progress import TrainingProgress

    progress = TrainingProgress(report, run_options)
    progress.step = finetune.service.store.get(finetune.finetune_id).step
    try:
        with progress, showing_on(progress):
            return run_training(finetune, data, run_options, on_step=progress.update, log_folder=folder / "tensorboard")
    except KeyboardInterrupt:
        report.notice(f"Stopped after step {progress.step}; the same command continues from there")
        raise


def _print_result(finetune: Finetune, result: TrainingResult, path: Path, root: Path | None, report: Report) -> None:
    """Print the scores and the use of the best checkpoint."""
    adapter = None
    if result.checkpoint is not None:
        adapter = f"{finetune.finetune_id}@{result.best_step}" if root is None else str(result.checkpoint)
    before, after = result.before, result.best
    if report.as_json:
        document = {
            "schema": SCHEMA,
            "command": report.command,
            "finetune_id": finetune.finetune_id,
            "name": finetune.name,
            "step": result.step,
            "best_step": result.best_step,
            "adapter": adapter,
            "before": {"f1": before.f1, "reward": before.reward},
            "after": {"f1": after.f1, "reward": after.reward},
            "reason": result.reason,
            "report": str(path),
        }
        typer.echo(json.dumps(document, indent=2))
        return
    report.print(f"End: {result.reason} (step {result.step})")
    report.print(f"Report: {path}")
    if adapter is None:
        report.print(f"No checkpoint has a better held-out score than the base model (F1 {before.f1:.3f})")
        return
    report.print(f"Best: step {result.best_step}, held-out F1 {before.f1:.3f} -> {after.f1:.3f}")
    report.print(f"Adapter: {adapter}")


def _print_path(path: Path, adapter: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "adapter": adapter, "path": str(path)}, indent=2))
    else:
        typer.echo(shown(str(path)))


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _name_of(dataset: Path) -> str:
    """Return the name of a finetune from the name of its dataset."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset.expanduser().resolve().name).strip("-")[:64]
    if not found:
        raise ValueError(f"the name of the folder {str(dataset)!r} has no letters or digits; add --name NAME")
    return found


def _class_names(classes: list[str] | None) -> list[str] | None:
    from moondream_cv.arguments import check_unique

    from .detect_command import split_class

    return check_unique("class names", [one for text in classes for one in split_class(text)]) if classes else None


def _root(root: Path | None) -> Path:
    from moondream_cv.model.variants import finetunes_root

    return finetunes_root() if root is None else root.expanduser()


def _adapter(adapter: str, root: Path | None) -> str | Path:
    """Return the file of a checkpoint in `root`, or the adapter itself."""
    from moondream_cv.model.variants import finetune_checkpoint

    found = finetune_checkpoint(adapter, root) if root is not None else None
    return adapter if found is None else found
