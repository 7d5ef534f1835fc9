"""`moondream-cv evaluate`: run a published benchmark, and compare the scores with the model card."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moondream_cv.errors import MoondreamError
from moondream_cv.urls import is_url

from . import models, options
from .models import ModelOptions, check_remote
from .progress_bar import ProgressBar
from .report import Report, set_verbosity, shown, shown_model
from .signals import exit_on_interrupt

if TYPE_CHECKING:
    from moondream_cv.evaluation.benchmarks.dataset import Benchmark
    from moondream_cv.evaluation.benchmarks.predictions import PredictionsFolder

_CARD_MODELS = ("moondream2", "moondream2@2025-06-21", "vikhyatk/moondream2@2025-06-21")
_MAX_LISTED = 20


def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Folder of a benchmark in its published layout, or one of its files with labels.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="RESULTS",
            help="Folder for predictions and results; an interrupted run continues there.",
            show_default=False,
        ),
    ],
    task: Annotated[
        Literal["coco", "screenspot", "countbenchqa", "docvqa", "textvqa", "chartqa", "ocrbench"] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Task: coco, screenspot, countbenchqa, docvqa, textvqa, chartqa or ocrbench. "
            "[dim]\\[default: recognized by the files][/]",
            show_default=False,
        ),
    ] = None,
    skill: Annotated[
        Literal["detect", "point"] | None,
        typer.Option(
            "--skill",
            metavar="detect|point",
            help="Boxes or points for COCO ground truth. [dim]\\[default: detect][/]",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="train|valid|test",
            help="Split. [dim]\\[default: valid for COCO, DocVQA and TextVQA, otherwise test][/]",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="Maximum number of images. [dim]\\[default: all][/]", show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Number of images per batch.")] = 8,
    max_objects: options.MaxObjects = 50,
    model: options.Model = "moondream2",
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    as_json: options.AsDocument = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a published benchmark from disk, and compare the scores with the model card.

    The same command continues an interrupted run.
    If the model has scores, boxes and points also yield a calibration.json.

    \b
    [bold]Examples[/]
    $ moondream-cv evaluate coco/ -o results/
    $ moondream-cv evaluate coco/ --skill point --limit 500 -o points/
    $ moondream-cv evaluate docvqa/ --model http://gpu-box:2020 -o docvqa_results/
    """  # fmt: skip
    from moondream_cv.evaluation.benchmarks.layouts import load_benchmark
    from moondream_cv.evaluation.benchmarks.predictions import PredictionsFolder
    from moondream_cv.evaluation.benchmarks.scoring import check_libraries

    # Check the arguments and the data
    set_verbosity(verbose, quiet)
    report = Report("evaluate", as_json, quiet=quiet, model=model)
    loading = ModelOptions(model, device, dtype, adapter, quantize)
    if is_url(model):
        check_remote(loading)
    with exit_on_interrupt(), report.working("Reading labels"):
        benchmark = load_benchmark(data.expanduser(), task=task, skill=skill, split=split, limit=limit)
        check_libraries(benchmark)
    settings = {
        "model": shown_model(model),
        "adapter": adapter,
        "quantize": quantize,
        "dtype": dtype,
        "task": benchmark.task,
        "skill": benchmark.skill,
        "split": benchmark.split,
        "images": len(benchmark.examples),
        "batch": batch,
        "max_objects": max_objects,
        "prompts": benchmark.digest(),
    }
    folder = PredictionsFolder(output.expanduser())
    folder.check_settings(settings)
    report.notice(_summary(benchmark))

    # Run the model and score its predictions
    with exit_on_interrupt(), folder.locked():
        if not folder.is_complete(benchmark):
            _run(loading, benchmark, folder, settings, report)
        _score(benchmark, folder, settings, loading, report)


def _run(
    loading: ModelOptions, benchmark: Benchmark, folder: PredictionsFolder, settings: dict[str, Any], report: Report
) -> None:
    """Run the model on the remaining images, with a progress bar."""
    with models.opened_model(loading, {benchmark.skill}, report) as opened:
        from moondream_cv.evaluation.benchmarks.model_run import run_model
        from moondream_cv.progress import showing_on

        folder.start(settings, opened)
        progress = _EvaluationProgress(report, len(benchmark.examples))
        with progress, showing_on(progress) if progress.is_visible else nullcontext():
            run_model(
                opened,
                benchmark,
                folder,
                batch=settings["batch"],
                max_objects=settings["max_objects"],
                on_progress=progress.update,
            )


def _score(
    benchmark: Benchmark, folder: PredictionsFolder, settings: dict[str, Any], loading: ModelOptions, report: Report
) -> None:
    """Score the predictions, write and print the results."""
    from moondream_cv.engine.calibration import FILE_NAME
    from moondream_cv.evaluation.benchmarks.results import counted, result_tables, results_document, write_results
    from moondream_cv.evaluation.benchmarks.scoring import score_predictions
    from moondream_cv.evaluation.benchmarks.tasks import CARD_MODEL

    # Write the results
    with report.working("Scoring"):
        scores = score_predictions(benchmark, folder)
    document = results_document(benchmark, scores, settings)
    path = write_results(folder.folder, document)
    if scores.calibration is not None:
        scores.calibration.write(folder.folder / FILE_NAME)

    # Print them
    if report.as_json:
        typer.echo(json.dumps(document, indent=2))
    for table in result_tables(document, shown_model(loading.name)):
        report.print(table)
    is_card_model = loading.name in _CARD_MODELS and not loading.adapter and not loading.quantize
    if document["model_card"]["figures"] and not is_card_model:
        report.print(f"The model card is that of {CARD_MODEL} in full precision, without adapter")
    report.print(f"Results: {path}")
    if scores.calibration is not None:
        report.print(f"Calibration: {folder.folder / FILE_NAME}")
    elif benchmark.skill != "query" and not folder.has_scores:
        report.notice(
            "The model returns no scores: all confidences are 1.0, and mAP depends on the order of its objects"
        )
    elif benchmark.skill != "query":
        report.notice("There are too few predictions to fit a calibration")

    # List the unreadable images
    for name, error in list(scores.unreadable.items())[:_MAX_LISTED]:
        report.show_failure(name, MoondreamError(error))
    if scores.unreadable:
        number = counted(len(scores.unreadable), "unreadable image")
        report.notice(f"Scored as misses: {number}; {path} lists all of them")
        raise typer.Exit(1)


def _summary(benchmark: Benchmark) -> str:
    """Return a line about the benchmark."""
    from moondream_cv.evaluation.benchmarks.results import counted

    split = f", split {benchmark.split}" if benchmark.split else ""
    num_questions = sum(len(example.questions) for example in benchmark.examples)
    prompts = f"classes: {len(benchmark.classes)}" if benchmark.classes else counted(num_questions, "question")
    return shown(f"{benchmark.title}{split}, {counted(len(benchmark.examples), 'image')}, {prompts}")


class _EvaluationProgress(ProgressBar):
    """Progress of an evaluation: a bar on a terminal, otherwise a notice for each tenth of the images."""

    def __init__(self, report: Report, total: int) -> None:
        super().__init__("Evaluating", total, is_shown=not report.quiet)
        self._report, self._total = report, total
        self._tenths = 0

    def update(self, done: int) -> None:
        """Show the number of images that have predictions."""
        self._set(completed=done)
        tenths = 10 * done // self._total
        if tenths > self._tenths and not self.is_visible:
            self._report.notice(f"Evaluated {done} of {self._total} images")
        self._tenths = tenths

    def show(self, text: str) -> None:
        """Show the progress of the model behind the bar."""
        self._set(detail=shown(text))

    def clear(self) -> None:
        """Remove the progress of the model."""
        self._set(detail="")
