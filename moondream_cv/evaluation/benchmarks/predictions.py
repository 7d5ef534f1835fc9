"""Predictions of a benchmark in a folder: settings, one line per image, and a lock.

A batch is a fixed range of images, so a run that was killed and started again writes the same bytes as an uninterrupted
one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moondream_cv import __version__
from moondream_cv.durable_files import PART_SUFFIX, find_complete_lines, make_folder, write_file
from moondream_cv.errors import MoondreamError
from moondream_cv.evaluation.benchmarks.dataset import Benchmark
from moondream_cv.vision_model import VisionModel

PREDICTIONS = "predictions.jsonl"
"""One line per image, in the order of the benchmark."""

SETTINGS = "evaluation.json"
"""Settings of the run."""

MODEL_CALIBRATION = "model_calibration.json"
"""Calibration of the model during the run; missing if it had none."""

_LOCK = ".lock"
_SCHEMA = 1

Record = dict[str, Any]


class EvaluationError(MoondreamError):
    """A benchmark cannot be evaluated: the folder of the results is not usable, or the model failed."""


class PredictionsFolder:
    """Folder with the predictions of a run, complete or not."""

    def __init__(self, folder: Path) -> None:
        """Create an object for a folder, without creating the folder.

        Args:
            folder: Folder of the results.
        """
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, and prevent other processes from using it in the `with`.

        Raises:
            EvaluationError: The folder cannot be created, or another process uses it.
        """
        lock = FileLock(self.folder / _LOCK)
        try:
            make_folder(self.folder)
            lock.acquire(timeout=0)
        except Timeout:
            raise EvaluationError(f"another process writes to {self.folder}; wait, or give a new folder") from None
        except OSError as error:
            raise EvaluationError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Check that the folder is empty or contains the same run.

        Args:
            settings: Settings that determine the predictions.

        Raises:
            EvaluationError: The folder contains another run, or other files.
        """
        path = self.folder / SETTINGS
        if not path.exists():
            if self.folder.exists() and not self.folder.is_dir():
                raise EvaluationError(f"{self.folder} is a file; give a new folder for the results")
            started = {_LOCK, MODEL_CALIBRATION, f"{SETTINGS}{PART_SUFFIX}"}  # a killed run leaves them
            if self.folder.exists() and any(one.name not in started for one in self.folder.iterdir()):
                raise EvaluationError(f"{self.folder} is not empty and has no {SETTINGS}; give a new folder")
            return
        found = self._saved().get("settings", {})
        names = [name for name in settings if settings[name] != found.get(name)]
        if names:
            name = names[0]
            raise EvaluationError(
                f"{self.folder} has the results of another run, with {name} {found.get(name)!r} instead of "
                f"{settings[name]!r}; give a new folder"
            )

    def start(self, settings: Mapping[str, Any], model: VisionModel) -> None:
        """Write the settings and the calibration of the model, unless an earlier run has.

        Args:
            settings: Settings that determine the predictions.
            model: Model of the run.
        """
        if (self.folder / SETTINGS).exists():
            return
        calibration = model.calibration if getattr(model, "calibrated", False) else None  # type: ignore[attr-defined]
        (self.folder / MODEL_CALIBRATION).unlink(missing_ok=True)  # a killed run leaves it
        if calibration is not None:
            calibration.write(self.folder / MODEL_CALIBRATION)
        content = {"schema": _SCHEMA, "version": __version__, "has_scores": model.has_scores, "settings": settings}
        write_file(self.folder / SETTINGS, (json.dumps(content, indent=1) + "\n").encode())

    @property
    def has_scores(self) -> bool:
        """Whether the confidences of the model of this run are real."""
        return bool(self._saved().get("has_scores"))

    def is_complete(self, benchmark: Benchmark) -> bool:
        """Return whether all images have predictions.

        Args:
            benchmark: Benchmark of the run.
        """
        path = self.folder / PREDICTIONS
        if not path.exists():
            return False
        with path.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file) == len(benchmark.examples)

    def resume(self, benchmark: Benchmark, batch: int) -> int:
        """Remove incomplete batches from the predictions, and return the number of the others.

        Args:
            benchmark: Benchmark of the run.
            batch: Number of images per batch.

        Raises:
            EvaluationError: The predictions are not those of the benchmark.
        """
        path, total = self.folder / PREDICTIONS, len(benchmark.examples)
        if not path.exists():
            return 0
        with path.open("r+b") as file:
            complete = find_complete_lines(file, lambda count: count % batch == 0 or count == total)
            if complete.num_found > total:
                raise EvaluationError(f"{path} has more lines than the benchmark has images; give a new folder")
            file.truncate(complete.num_bytes)
            os.fsync(file.fileno())
        return complete.num_lines

    def append(self, records: Sequence[Record]) -> None:
        """Append the predictions of a batch, and wait until they are on the disk.

        Args:
            records: Predictions of each image.

        Raises:
            OSError: The file cannot be written; `resume` removes a part that was written.
        """
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with (self.folder / PREDICTIONS).open("ab") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> Iterator[Record]:
        """Yield the predictions of each image.

        Raises:
            EvaluationError: A line is damaged.
        """
        path = self.folder / PREDICTIONS
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError, RecursionError) as error:
                    raise EvaluationError(f"line {number} of {path} is damaged ({error}); give a new folder") from error

    def _saved(self) -> dict[str, Any]:
        path = self.folder / SETTINGS
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise EvaluationError(f"{path} cannot be read ({error}); give a new folder") from error
        is_known = isinstance(content, dict) and content.get("schema") == _SCHEMA
        if not is_known or not isinstance(content.get("settings"), dict):
            raise EvaluationError(f"{path} was written by another version; give a new folder")
        return content
