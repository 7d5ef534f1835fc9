"""Results of an evaluation: `results.json` and a table, with the figures of the model card for comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moondream_cv import __version__
from moondream_cv.durable_files import write_file
from moondream_cv.escaping import escaped
from moondream_cv.evaluation.benchmarks.dataset import Benchmark
from moondream_cv.evaluation.benchmarks.scoring import Scores
from moondream_cv.evaluation.benchmarks.tasks import CARD_FIGURES, CARD_MODEL

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

RESULTS = "results.json"
"""Metrics of the run."""

_SCHEMA = 1
_FRACTIONS = ("calibration error", "calibration error, refitted")  # everything else is shown in percent


def results_document(benchmark: Benchmark, scores: Scores, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results as a JSON-compatible dict. Metrics are between 0 and 1, and figures of the card in percent.

    Args:
        benchmark: Benchmark of the run.
        scores: Its scores.
        settings: Settings of the run.
    """
    card = {
        metric: {"percent": figure.percent, "release": figure.release}
        for (task, metric), figure in CARD_FIGURES.items()
        if benchmark.is_on_card and task == benchmark.task and metric in scores.metrics
    }
    return {
        "schema": _SCHEMA,
        "version": __version__,
        "settings": dict(settings),
        "benchmark": benchmark.title,
        "split": benchmark.split or None,
        "images": len(benchmark.examples),
        "questions": sum(len(example.questions) for example in benchmark.examples) or None,
        "metrics": scores.metrics,
        "best_threshold": scores.threshold,
        "model_card": {"model": CARD_MODEL, "figures": card},
        "classes": scores.classes,
        "groups": {name: {"value": value, "questions": count} for name, (value, count) in scores.groups.items()},
        "unreadable": scores.unreadable,
    }


def write_results(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write `results.json`, and return its path.

    Args:
        folder: Folder of the results.
        document: Results from `results_document`.
    """
    path = folder / RESULTS
    write_file(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def result_tables(document: Mapping[str, Any], model: str) -> list[Table]:
    """Return the tables of the metrics, and of classes or groups.

    Args:
        document: Results from `results_document`.
        model: Name of the model.
    """
    # Metrics
    split = f", {document['split']}" if document["split"] else ""
    title = f"{document['benchmark']}{split}, {counted(document['images'], 'image')}"
    figures = document["model_card"]["figures"]
    rows = []
    for name, value in document["metrics"].items():
        is_best = name.endswith("best threshold")
        label = f"{name} ({document['best_threshold']:.2f})" if is_best else name
        card = figures.get(name)
        rows.append([label, _shown(name, value), f"{card['percent']:.1f} ({card['release']})" if card else ""])
    columns = 3 if figures else 2
    tables = [_table(title, ["metric", model, "model card"][:columns], [row[:columns] for row in rows])]

    # Classes and groups
    if document["classes"]:
        names = list(dict.fromkeys(name for found in document["classes"].values() for name in found))
        rows = [
            [label, *(_shown(one, found.get(one)) for one in names)] for label, found in document["classes"].items()
        ]
        tables.append(_table("Classes", ["class", *names], rows))
    if document["groups"]:
        rows = [[name, _shown("", one["value"]), str(one["questions"])] for name, one in document["groups"].items()]
        tables.append(_table("Groups", ["group", next(iter(document["metrics"])), "questions"], rows))
    return tables


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "2 images".

    Args:
        number: Number.
        noun: Noun in the singular, with a regular plural.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with a left-aligned first column. Its texts are not interpreted as markup."""
    from rich.table import Table

    table = Table(title=_text(title))
    for index, column in enumerate(columns):
        table.add_column(_text(column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(value: str) -> Text:
    from rich.text import Text

    return Text(escaped(value))


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name in _FRACTIONS else f"{100 * value:.1f}"
